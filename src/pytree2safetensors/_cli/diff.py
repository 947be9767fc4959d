"""`diff`: the leaves, nodes and metadata that differ between two files."""

from collections.abc import Callable, Iterator
from typing import Any

from pytree2safetensors._cli.answer import MOST_LINES, Answer, left_out
from pytree2safetensors._cli.comparison import Change, Comparison, Difference, Values, compare_files
from pytree2safetensors._cli.show import leaf_text, leaves_text, value_text
from pytree2safetensors._cli.summary import leaf_json
from pytree2safetensors._cli.terminal import Cells, labelled, plain, size, table
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.remote_path import shown_url


def diff(first: str, second: str, *, everything: bool) -> Answer:
    """Compare two files and list the differences."""
    found = compare_files(first, second)
    return Answer(
        lambda: _lines(found, everything),
        lambda: _content(first, second, found),
        "" if found.same else f"{plain(shown_url(first))} and {plain(shown_url(second))} differ",
    )


def _lines(found: Comparison, everything: bool) -> Iterator[str]:
    rows = [_difference(difference) for difference in found.leaves]
    rows += [_change("node", change, plain) for change in found.nodes]
    rows += [
        _change("metadata", change, lambda text: shorten(text, 32)) for change in found.metadata
    ]
    shown = rows if everything else rows[:MOST_LINES]
    yield from table(shown)
    if len(shown) < len(rows):
        yield left_out(len(rows) - len(shown))
    if rows:
        yield ""
    yield from _sum(found)


def _sum(found: Comparison) -> Iterator[str]:
    if found.same:
        yield f"The same: {leaves_text(found.compared)}, bit for bit."
        return
    missing = sum("missing" in difference.aspects for difference in found.leaves)
    added = sum("added" in difference.aspects for difference in found.leaves)
    changed = len(found.leaves) - missing - added
    counts = [f"of the {found.compared:,} in both files, {changed:,} differ"]
    counts += [f"{missing:,} only in the first"] if missing else []
    counts += [f"{added:,} only in the second"] if added else []
    yield from labelled("leaves", ", ".join(counts))
    for label, changes in (("nodes", found.nodes), ("metadata", found.metadata)):
        yield from labelled(label, f"{len(changes):,} differ" if changes else "")


def _difference(found: Difference) -> Cells:
    before, after = found.before, found.after
    name = plain(found.name)
    if before is None or after is None:
        leaf = before or after
        nbytes = leaf.nbytes if leaf else 0
        cells = leaf_text(leaf) if leaf else "", (size(nbytes) if nbytes else "",)
        return Cells(f"{'+' if after else '-'} {name}", *cells, "green" if after else "red")
    if found.aspects != ["values"]:
        text = f"{before.type} -> {after.type}"
    elif before.value is not None:
        text = f"{after.type} {value_text(before)} -> {value_text(after)}"
    elif before.kind == "key" or found.values is None:
        text = f"{after.type} another key"
    else:
        text = f"{after.type} {_values_text(found.values)}"
    return Cells(f"~ {name}", text, ("",), "yellow")


def _values_text(values: Values) -> str:
    text = f"{values.differing:,} of {values.elements:,} differ"
    if values.largest is not None:
        shown = f"{values.largest:,}" if type(values.largest) is int else f"{values.largest:.6g}"
        text += f", by at most {shown}"
    if values.not_finite:
        text += f", {values.not_finite:,} not finite"
    return text


def _change(what: str, change: Change, show: Callable[[str], str]) -> Cells:
    before = "absent" if change.before is None else show(change.before)
    after = "absent" if change.after is None else show(change.after)
    return Cells(f"~ {what} {plain(change.name)}", f"{before} -> {after}", ("",), "yellow")


def _content(first: str, second: str, found: Comparison) -> dict[str, Any]:
    return {
        "files": [shown_url(first), shown_url(second)],
        "same": found.same,
        "leaves": [
            {
                "name": leaf.name,
                "differs": leaf.aspects,
                "before": leaf.before and leaf_json(leaf.before),
                "after": leaf.after and leaf_json(leaf.after),
                "values": leaf.values and leaf.values._asdict(),
            }
            for leaf in found.leaves
        ],
        "nodes": [change._asdict() for change in found.nodes],
        "metadata": [change._asdict() for change in found.metadata],
    }

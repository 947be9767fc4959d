"""`show`: the outline of a file and its metadata."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from pytree2safetensors._cli.answer import Answer
from pytree2safetensors._cli.outline import Row, clip, outline
from pytree2safetensors._cli.summary import Leaf, Summary, leaf_json, summarize, with_values
from pytree2safetensors._cli.terminal import (
    GLUE,
    Cells,
    columns,
    count,
    labelled,
    line,
    plain,
    size,
    table,
)
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._messages import plural, shorten
from pytree2safetensors._storage.remote_path import shown_url

_MOST_METADATA: Final = 20
_LONGEST_ENTRY: Final = 1000
_LONGEST_VALUE: Final = 32


def show(file: str, prefix: str, *, everything: bool, paths: bool) -> Answer:
    """Show what a file has below `prefix`. With `paths`, each row has the whole key path."""
    return Answer(
        lambda: _lines(file, prefix, everything, paths),
        lambda: _content(file, prefix),
    )


def _lines(file: str, prefix: str, everything: bool, paths: bool) -> Iterator[str]:
    with collector_paused(), open_checkpoint(file) as checkpoint:
        summary = summarize(checkpoint, prefix)
        rows, more = outline(summary.leaves, summary.nodes, fold=not everything), 0
        if not everything:
            rows, more = clip(rows)
        shown = [row.leaf for row in rows if row.leaf and row.times == 1]
        read = {leaf.name: leaf for leaf in with_values(shown, checkpoint)}
        rows = [
            row._replace(leaf=read.get(row.leaf.name, row.leaf)) if row.leaf else row
            for row in rows
        ]
    yield line(plain(shown_url(file)), "bold")
    yield from _head(summary)
    if rows:
        yield ""
        yield from table([_HEADER, *(_cells(row, paths) for row in rows)])
    if more or any(row.closed for row in rows):
        yield ""
        rest = (
            plural(more, "row is left out", "rows are left out") if more else "... has more below"
        )
        yield line(f"{rest}; --prefix NAME shows a part, --all everything")


def _content(file: str, prefix: str) -> dict[str, Any]:
    with collector_paused(), open_checkpoint(file) as checkpoint:
        summary = summarize(checkpoint, prefix)
        leaves = with_values(summary.leaves, checkpoint)
    return {
        "file": shown_url(file),
        "files": summary.files,
        "file_bytes": summary.file_bytes,
        "tensor_bytes": sum(leaf.nbytes for leaf in leaves),
        "parameters": sum(leaf.parameters for leaf in leaves),
        "digests": summary.digests,
        "metadata": dict(summary.metadata),
        "nodes": dict(summary.nodes),
        "leaves": [leaf_json(leaf) for leaf in leaves],
    }


def _head(summary: Summary) -> Iterator[str]:
    leaves = summary.leaves
    parameters = sum(leaf.parameters for leaf in leaves)
    text = leaves_text(len(leaves))
    if parameters:
        text += f" with {plural(parameters, 'parameter', 'parameters')}"
    yield from labelled("contents", text)
    files = "a file" if summary.files == 1 else f"{summary.files:,} shards"
    tensors = size(sum(leaf.nbytes for leaf in leaves))
    yield from labelled("size", f"{tensors} of tensors, in {files} of {size(summary.file_bytes)}")
    types = Counter(leaf.type.partition("[")[0] for leaf in leaves).most_common()
    yield from labelled("types", ", ".join(f"{times:,}{GLUE}{name}" for name, times in types))
    if summary.digests:
        yield from labelled("digests", "one for each tensor; verify checks them")
    entries = sorted(summary.metadata.items())
    for number, (key, value) in enumerate(entries[:_MOST_METADATA]):
        text = f"{plain(key)}: {shorten(value, _LONGEST_ENTRY)}"
        yield from labelled("" if number else "metadata", text)
    if len(entries) > _MOST_METADATA:
        yield from labelled("", f"... and {len(entries) - _MOST_METADATA:,} more in --json")


_HEADER: Final = Cells("name", "type", ("params", "size"), "dim")


def _cells(row: Row, paths: bool) -> Cells:
    parameters, nbytes = row.parameters * row.times, row.nbytes * row.times
    if row.leaf is not None:  # other names may begin with its own
        parameters, nbytes = row.leaf.parameters * row.times, row.leaf.nbytes * row.times
    times = f"{row.times:,} x " if row.times > 1 else ""
    return Cells(
        "  " * row.depth + plain(row.name if paths else row.label),
        times + _what(row),
        (count(parameters) if parameters else "", size(nbytes) if nbytes else ""),
        "" if row.leaf else "bold",
    )


def _what(row: Row) -> str:
    """Describe what is at a row: a leaf, an empty node, or a node with leaves below."""
    more = " ..." if row.closed else ""
    if row.leaf is not None:
        return leaf_text(row.leaf) + more
    kind = row.kind.partition("(")[0]
    if not row.leaves:
        return kind if kind == "None" else f"empty {kind}"
    return f"{kind}{', ' if kind else ''}{leaves_text(row.leaves)}{more}"


def leaves_text(number: int) -> str:
    """Write a number of leaves."""
    return plural(number, "leaf", "leaves")


def leaf_text(leaf: Leaf) -> str:
    """Write the type of a leaf, and its value if it is known."""
    return leaf.type if leaf.value is None else f"{leaf.type} = {value_text(leaf)}"


def value_text(leaf: Leaf) -> str:
    """Write the value of a leaf in a few columns: a str as a literal, other values as they are."""
    value = (leaf.value or "") + (f" (bits {leaf.bits})" if leaf.bits else "")
    write, quotes = (repr, 2) if leaf.kind == "str" else (str, 0)
    start = value[:_LONGEST_VALUE]
    while columns(write(start)) - quotes > _LONGEST_VALUE:
        start = start[:-1]
    more = f"... ({len(value):,} characters)" if len(start) < len(value) else ""
    return write(start) + more

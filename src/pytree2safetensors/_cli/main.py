"""The command: `pytree2safetensors show FILE`, `diff A B` and `verify FILE`."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from pytree2safetensors._cli.diff import (
    Change,
    Comparison,
    Difference,
    Values,
    compare_files,
    comparison_json,
)
from pytree2safetensors._cli.outline import Row, outline
from pytree2safetensors._cli.summary import Leaf, Summary, summarise_file, summary_json
from pytree2safetensors._cli.terminal import GLUE, Cells, labelled, plain, size, table
from pytree2safetensors._cli.verify import Verdict, verdict_json, verify_file
from pytree2safetensors._errors import Pytree2SafetensorsError, shorten
from pytree2safetensors._version import __version__

FINE: Final = 0
DIFFERENT: Final = 1  # or broken; argparse itself exits with 2
_INTERRUPTED: Final = 130  # as a shell reports it

_MOST_LINES: Final = 100  # of a list of differences, unless all are asked for
_MOST_METADATA: Final = 20
_LONGEST_ENTRY: Final = 1000
_LONGEST_VALUE: Final = 32


class Answer(NamedTuple):
    """What a command has to say: the exit code, lines for people, an object for programs."""

    code: int
    lines: Callable[[], Iterable[str]]
    content: Callable[[], dict[str, Any]]
    complaint: str = ""  # the one line for stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; `sys.argv` has it otherwise.

    Returns:
        The exit code: 0 where all is fine, 1 where files differ or one is broken.
    """
    options = _parser().parse_args(_with_command(sys.argv[1:] if arguments is None else arguments))
    try:
        answer: Answer = options.run(options)
        lines = (
            [json.dumps(answer.content(), indent=1, allow_nan=False)]
            if options.json
            else answer.lines()
        )
        _print(lines)
        if answer.complaint:
            _complain(answer.complaint)
    except OSError as error:
        _complain(_os_error(error))
        return DIFFERENT
    except Pytree2SafetensorsError as error:
        _complain(str(error))
        return DIFFERENT
    except KeyboardInterrupt:
        return _INTERRUPTED
    return answer.code


# --- arguments --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pytree2safetensors",
        description="Look into safetensors files, of pytrees and of any other program.",
        epilog="Exit codes: 0 fine, 1 different or broken, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="show | diff | verify")

    show = commands.add_parser("show", help="what a file holds, from its header alone")
    show.add_argument("file", metavar="FILE", help="a file, a folder of shards or its index")
    show.add_argument("--prefix", default="", help="a key path: show what is below it")
    show.add_argument("--all", action="store_true", help="fold nothing, leave nothing out")
    show.set_defaults(run=_run_show)

    diff = commands.add_parser("diff", help="which leaves of two files differ, and how")
    diff.add_argument("first", metavar="A", help="a file, a folder of shards or its index")
    diff.add_argument("second", metavar="B", help="another")
    diff.add_argument("--all", action="store_true", help="list every difference")
    diff.set_defaults(run=_run_diff)

    verify = commands.add_parser("verify", help="whether a file is sound; reads all of it")
    verify.add_argument("file", metavar="FILE", help="a file, a folder of shards or its index")
    verify.add_argument("--all", action="store_true", help="list every problem")
    verify.set_defaults(run=_run_verify)

    for command in (show, diff, verify):
        command.add_argument("--json", action="store_true", help="answer as JSON, for programs")
    return parser


def _with_command(arguments: Sequence[str]) -> list[str]:
    """A file alone is shown, whatever options come with it."""
    of_all = {"show", "diff", "verify", "-h", "--help", "--version"}
    given = not arguments or arguments[0] in of_all
    return [*arguments] if given else ["show", *arguments]


def _run_show(options: argparse.Namespace) -> Answer:
    summary = summarise_file(options.file, options.prefix)
    return Answer(
        FINE,
        lambda: _show_lines(options.file, summary, options.all),
        lambda: summary_json(options.file, summary),
    )


def _run_diff(options: argparse.Namespace) -> Answer:
    found = compare_files(options.first, options.second)
    return Answer(
        FINE if found.same else DIFFERENT,
        lambda: _diff_lines(found, options.all),
        lambda: comparison_json(options.first, options.second, found),
        "" if found.same else f"{plain(options.first)} and {plain(options.second)} differ",
    )


def _run_verify(options: argparse.Namespace) -> Answer:
    verdict = verify_file(options.file)
    count = len(verdict.problems)
    complaint = f"{plain(options.file)} is broken: "
    complaint += verdict.problems[0] if count == 1 else f"{count:,} problems"
    return Answer(
        DIFFERENT if count else FINE,
        lambda: _verify_lines(options.file, verdict, options.all),
        lambda: verdict_json(options.file, verdict),
        complaint if count else "",
    )


# --- printing ---------------------------------------------------------------------------------


def _print(lines: Iterable[str]) -> None:
    """Print, and end quietly where nobody reads on."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        for line in lines:
            sys.stdout.write(_encodable(line, sys.stdout.encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python would flush at its exit goes nowhere either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    if sys.stderr is None:
        return
    line = "pytree2safetensors: " + " ".join(message.splitlines())
    print(_encodable(line, sys.stderr.encoding), file=sys.stderr)


def _encodable(line: str, encoding: str | None) -> str:
    encoding = encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{plain(os.fsdecode(error.filename))}: {reason}" if error.filename else reason


def _leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count:,} leaves"


# --- show -------------------------------------------------------------------------------------


def _show_lines(file: str, summary: Summary, everything: bool) -> Iterator[str]:
    yield from _show_head(file, summary)
    rows = outline(summary.leaves, summary.nodes, everything=everything)
    if rows:
        yield ""
        yield from table([_show_row(row) for row in rows])
    if any(row.left_out or row.closed for row in rows):
        yield ""
        yield "Where it says ..., there is more: show it with --prefix NAME, or all with --all."


def _show_head(file: str, summary: Summary) -> Iterator[str]:
    leaves = summary.leaves
    yield plain(file)
    amount = size(sum(leaf.nbytes for leaf in leaves))
    shards = f" in {summary.files:,} shards" if summary.files > 1 else ""
    whole = f"{size(summary.file_bytes)} on disk{shards}"
    yield from labelled("leaves", f"{len(leaves):,}, {amount}; {whole}")
    types = Counter(leaf.type.partition("[")[0] for leaf in leaves).most_common()
    yield from labelled("types", ", ".join(f"{count:,}{GLUE}{name}" for name, count in types))
    if summary.digests:
        yield from labelled("digests", "one for each tensor, which verify checks")
    entries = sorted(summary.metadata.items())
    for number, (key, value) in enumerate(entries[:_MOST_METADATA]):
        text = f"{plain(key)}: {shorten(value, _LONGEST_ENTRY)}"
        yield from labelled("" if number else "metadata", text)
    if len(entries) > _MOST_METADATA:
        yield from labelled("", f"... and {len(entries) - _MOST_METADATA:,} more in --json")


def _show_row(row: Row) -> Cells:
    indent = "  " * row.depth
    # A tensor in whose name others begin is a leaf all the same.
    nbytes = row.nbytes if row.leaf is None else row.times * row.leaf.nbytes
    amount = size(nbytes) if nbytes else ""
    if row.left_out:
        return Cells(f"{indent}...", f"{row.times:,} more, {_leaves(row.leaves)}", amount)
    times = f"{row.times:,} x " if row.times > 1 else ""
    return Cells(indent + plain(row.name), times + _describe(row), amount)


def _describe(row: Row) -> str:
    """What stands at a row: a leaf, an empty node, or a node with leaves below."""
    if row.leaf is not None:
        return _leaf_text(row.leaf)
    kind = row.kind.partition("(")[0]
    if not row.leaves:
        return kind if kind == "None" else f"empty {kind}"
    more = " ..." if row.closed else ""
    return f"{kind}{', ' if kind else ''}{_leaves(row.leaves)}{more}"


def _leaf_text(leaf: Leaf) -> str:
    if leaf.value is None:
        return leaf.type
    return f"{leaf.type} = {_value_text(leaf)}"


def _value_text(leaf: Leaf) -> str:
    value = leaf.value or ""
    if leaf.kind == "str":
        return shorten(value, _LONGEST_VALUE)
    return value if len(value) <= _LONGEST_VALUE else shorten(value, _LONGEST_VALUE)


# --- diff -------------------------------------------------------------------------------------


def _diff_lines(found: Comparison, everything: bool) -> Iterator[str]:
    rows = [_difference_row(difference) for difference in found.leaves]
    rows += [_change_row("node", change, plain) for change in found.nodes]
    rows += [_change_row("metadata", change, _entry_text) for change in found.metadata]
    shown = rows if everything else rows[:_MOST_LINES]
    yield from table(shown)
    if len(shown) < len(rows):
        yield f"... and {len(rows) - len(shown):,} more, which --all lists"
    if rows:
        yield ""
    yield _diff_sum(found)


def _diff_sum(found: Comparison) -> str:
    if found.same:
        return f"The same: {_leaves(found.compared)}, bit for bit."
    missing = sum("missing" in difference.aspects for difference in found.leaves)
    added = sum("added" in difference.aspects for difference in found.leaves)
    changed = len(found.leaves) - missing - added
    return (
        f"{changed:,} of {_leaves(found.compared)} in both differ; {missing:,} only in the first, "
        f"{added:,} only in the second; nodes {len(found.nodes):,}, "
        f"metadata {len(found.metadata):,}."
    )


def _difference_row(found: Difference) -> Cells:
    before, after = found.before, found.after
    name = plain(found.name)
    if before is None or after is None:
        there = after or before
        mark = "-" if after is None else "+"
        text = "" if there is None else _leaf_text(there)
        return Cells(f"{mark} {name}", text, size(there.nbytes) if there else "")
    if found.aspects != ["values"]:
        return Cells(f"~ {name}", f"{before.type} -> {after.type}", "")
    if before.kind == "key":
        return Cells(f"~ {name}", f"{after.type} another key", "")
    if found.values is None:
        changed = f"{_value_text(before)} -> {_value_text(after)}"
        return Cells(f"~ {name}", f"{after.type} {changed}", "")
    return Cells(f"~ {name}", f"{after.type} {_values_text(found.values)}", "")


def _values_text(values: Values) -> str:
    text = f"{values.differing:,} of {values.elements:,} differ"
    if values.largest is not None:
        largest = values.largest
        text += (
            f", by at most {largest:,}" if type(largest) is int else f", by at most {largest:.6g}"
        )
    if values.not_finite:
        text += f", {values.not_finite:,} not finite"
    return text


def _change_row(what: str, change: Change, show: Callable[[str], str]) -> Cells:
    absent = "not noted" if what == "node" else "absent"
    before = absent if change.before is None else show(change.before)
    after = absent if change.after is None else show(change.after)
    return Cells(f"~ {what} {plain(change.name)}", f"{before} -> {after}", "")


def _entry_text(value: str) -> str:
    return shorten(value, _LONGEST_VALUE)


# --- verify -----------------------------------------------------------------------------------


def _verify_lines(file: str, verdict: Verdict, everything: bool) -> Iterator[str]:
    yield f"{plain(file)}: {'broken' if verdict.problems else 'sound'}"
    if verdict.opened:
        tensors = "1 tensor" if verdict.tensors == 1 else f"{verdict.tensors:,} tensors"
        yield from labelled("read", f"{tensors}, {size(verdict.nbytes)}")
        yield from labelled("digests", _digests_text(verdict))
    for label, texts in (("problem", verdict.problems), ("remark", verdict.remarks)):
        shown = texts if everything else texts[:_MOST_LINES]
        for text in shown:
            yield from labelled(label, text)
        if len(shown) < len(texts):
            yield from labelled("", f"... and {len(texts) - len(shown):,} more, which --all lists")


def _digests_text(verdict: Verdict) -> str:
    if not verdict.digests:
        return "none, so changed values cannot be told; checksum=True saves them"
    return "one for each tensor" if verdict.problems else "one for each tensor, and all match"


if __name__ == "__main__":
    sys.exit(main())

"""The command: `pytree2safetensors show FILE...`, `diff A B` and `verify FILE...`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from pytree2safetensors._cli.answer import DIFFERENT, Answer
from pytree2safetensors._cli.fitting import fitting, named_object, template_from
from pytree2safetensors._cli.terminal import complain, plain, write
from pytree2safetensors._errors import Pytree2SafetensorsError
from pytree2safetensors._storage.remote_path import shown_url
from pytree2safetensors._version import __version__

FINE: Final = 0
_INTERRUPTED: Final = 130  # as a shell reports it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default, from `sys.argv`.

    Returns:
        The exit code: 0 if all is fine, 1 if files differ, or one does not fit the template, is
        broken or cannot be read.
    """
    options = _options(_with_command(sys.argv[1:] if arguments is None else arguments))
    code = FINE
    between: list[str] = []
    try:
        for question in options.questions(options):
            lines, complaint = _answer(question, options.json)
            if lines:
                try:
                    write([*between, *lines])
                except OSError as error:  # such as a full disk
                    complaint = _text(error)
                between = [] if options.json else [""]
            if complaint:
                complain(complaint)
                code = DIFFERENT
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _answer(question: "_Question", as_json: bool) -> tuple[list[str], str]:
    """Return the lines to print, and the line for stderr if the exit code is 1."""
    try:
        answer = question.ask()
        lines = [_json(answer.content())] if as_json else [*answer.lines()]
    except (OSError, ValueError, Pytree2SafetensorsError) as error:  # ValueError: for URLs
        text = _text(error)
        return [_json(question.about | {"error": text})] if as_json else [], text
    return lines, answer.complaint


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False)


def _text(error: Exception) -> str:
    return _os_error(error) if isinstance(error, OSError) else str(error)


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{plain(os.fsdecode(error.filename))}: {reason}"


# --- arguments --------------------------------------------------------------------------------


class _Question(NamedTuple):
    """Gives an answer to print, and is about some files, which JSON names in any case."""

    about: dict[str, Any]
    ask: Callable[[], Answer]


_Questions: TypeAlias = list[_Question]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # the parser itself would print its own usage, not that of the command
        options.command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pytree2safetensors",
        description="Show, compare and verify safetensors files from any program.",
        epilog="Exit codes: 0 success, 1 different, misfitting, damaged or unreadable, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="show | diff | verify")
    a_file = "a file, a folder of shards or its index: a path or URL"

    command = commands.add_parser(
        "show", help="list what is in files, without reading large arrays (the default)"
    )
    command.add_argument("files", metavar="FILE", nargs="+", help=a_file)
    command.add_argument("--prefix", default="", help="show only the leaves below this key path")
    command.add_argument("--paths", action="store_true", help="print whole key paths in each row")
    command.add_argument(
        "--all", action="store_true", help="print a row for every leaf, or whole lists"
    )
    command.add_argument(
        "--template",
        metavar="MODULE:NAME",
        type=named_object,
        default=argparse.SUPPRESS,
        help="a template, or a function that returns one: show how files fit it, and exit with 1 if "
        "a strict load would fail",
    )
    command.add_argument(
        "--rules",
        metavar="MODULE:NAME",
        type=named_object,
        help="a sequence of rules, as for rename=; needs --template",
    )
    command.set_defaults(questions=_ask_show)

    command = commands.add_parser("diff", help="list the leaves that differ between two files")
    command.add_argument("first", metavar="A", help=a_file)
    command.add_argument("second", metavar="B", help="what to compare it with")
    command.add_argument("--all", action="store_true", help="print every difference")
    command.set_defaults(questions=_ask_diff)

    command = commands.add_parser("verify", help="read all data of files, and check it for damage")
    command.add_argument("files", metavar="FILE", nargs="+", help=a_file)
    command.add_argument("--all", action="store_true", help="print every problem")
    command.set_defaults(questions=_ask_verify)

    for command in commands.choices.values():
        command.set_defaults(command=command)
        command.add_argument(
            "--json", action="store_true", help="print a line of JSON for each answer"
        )
    return parser


def _with_command(arguments: Sequence[str]) -> list[str]:
    """Insert `show` if the arguments name no command."""
    known = {"show", "diff", "verify", "-h", "--help", "--version"}
    named = not arguments or arguments[0] in known
    return [*arguments] if named else ["show", *arguments]


# The modules of the commands import JAX, which takes most of the time. The help does not need them.


def _ask_show(options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._arguments import check_argument
    from pytree2safetensors._cli.show import show

    if "template" in options:  # which may be None
        try:
            check_argument("--rules", "rename", options.rules)
        except TypeError as error:
            options.command.error(str(error))
        template = template_from(options.template)
        ask = partial(
            fitting,
            prefix=options.prefix,
            template=template,
            rules=options.rules,
            everything=options.all,
        )
        return _for_each_file(options, ask)
    if options.rules is not None:
        options.command.error("--rules needs --template")
    ask = partial(show, prefix=options.prefix, everything=options.all, paths=options.paths)
    return _for_each_file(options, ask)


def _for_each_file(options: argparse.Namespace, ask: Callable[[str], Answer]) -> _Questions:
    return [_Question({"file": shown_url(file)}, partial(ask, file)) for file in options.files]


def _ask_diff(options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._cli.diff import diff

    files = options.first, options.second
    shown = [shown_url(file) for file in files]
    return [_Question({"files": shown}, partial(diff, *files, everything=options.all))]


def _ask_verify(options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._cli.verify import verify

    return _for_each_file(options, partial(verify, everything=options.all))

"""The command: `pytree2safetensors show FILE...`, `diff A B` and `verify FILE...`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

from pytree2safetensors._cli.answer import DIFFERENT, Answer
from pytree2safetensors._cli.fitting import fitting, named_object, template_from
from pytree2safetensors._cli.terminal import complain, plain, write
from pytree2safetensors._errors import Pytree2SafetensorsError
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
    options = _parser().parse_args(_with_command(sys.argv[1:] if arguments is None else arguments))
    code = FINE
    try:
        for number, ask in enumerate(options.questions(options)):
            code |= _print_answer(ask, options.json, "" if number else None)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _print_answer(ask: Callable[[], Answer], as_json: bool, between: str | None) -> int:
    """Print one answer, and before it a line that separates it from the previous one."""
    try:
        answer = ask()
        lines = [json.dumps(answer.content(), allow_nan=False)] if as_json else [*answer.lines()]
    except (OSError, ValueError, Pytree2SafetensorsError) as error:  # ValueError: for URLs
        return _failed(error)
    try:
        write(lines if as_json or between is None else (between, *lines))
    except OSError as error:  # such as a full disk
        return _failed(error)
    if answer.complaint:
        complain(answer.complaint)
    return DIFFERENT if answer.complaint else FINE


def _failed(error: Exception) -> int:
    complain(_os_error(error) if isinstance(error, OSError) else str(error))
    return DIFFERENT


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{plain(os.fsdecode(error.filename))}: {reason}"


# --- arguments --------------------------------------------------------------------------------

_Questions: TypeAlias = list[Callable[[], Answer]]  # one for each answer to print


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
    command.add_argument("--all", action="store_true", help="print a row for every leaf")
    command.add_argument(
        "--template",
        metavar="MODULE:NAME",
        type=named_object,
        help="a template, or a function that returns one: show how files fit it, and exit with 1 if "
        "a strict load would fail",
    )
    command.add_argument(
        "--rules",
        metavar="MODULE:NAME",
        type=named_object,
        help="a sequence of rules, as for rename=; needs --template",
    )
    command.set_defaults(questions=partial(_ask_show, command))

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


def _ask_show(command: argparse.ArgumentParser, options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._arguments import check_argument
    from pytree2safetensors._cli.show import show

    if options.template is not None:
        try:
            check_argument("--rules", "rename", options.rules)
        except TypeError as error:
            command.error(str(error))
        template = template_from(options.template)
        return [
            partial(fitting, file, options.prefix, template, options.rules)
            for file in options.files
        ]
    if options.rules is not None:
        command.error("--rules needs --template")
    return [
        partial(show, file, options.prefix, everything=options.all, paths=options.paths)
        for file in options.files
    ]


def _ask_diff(options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._cli.diff import diff

    return [partial(diff, options.first, options.second, everything=options.all)]


def _ask_verify(options: argparse.Namespace) -> _Questions:
    from pytree2safetensors._cli.verify import verify

    return [partial(verify, file, everything=options.all) for file in options.files]

"""`show --template`: whether a file fits a template, with or without rules.

Specification: *Loading into a template*, *Rules*.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from itertools import groupby
from types import TracebackType
from typing import Any, Final

from pytree2safetensors._cli.answer import DIFFERENT, MOST_LINES, Answer, left_out
from pytree2safetensors._cli.terminal import complain, plain
from pytree2safetensors._errors import Pytree2SafetensorsError
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.remote_path import shown_url


def fitting(file: str, prefix: str, template: Any, rules: Any, *, everything: bool) -> Answer:
    """Explain what loading a file into a template would do."""
    from pytree2safetensors._load.explaining import explanation

    renaming = _reporting(rules) if callable(rules) else rules
    lines, misfits = explanation(template, file, prefix=prefix, rename=renaming)
    fits = not any(misfits)
    return Answer(
        lambda: lines if everything else _cut(lines),
        lambda: {"file": shown_url(file), "fits": fits, **misfits._asdict(), "lines": lines},
        "" if fits else f"{plain(shown_url(file))} does not fit the template",
    )


def _cut(lines: list[str]) -> Iterator[str]:
    """Leave lines out of long lists: at first those of leaves that fit, then the last ones."""
    for is_list, group in groupby(lines, lambda text: text.startswith("  ")):
        items = [*group]
        order = sorted(range(len(items)), key=lambda place: items[place].startswith("  fits "))
        yield from (items[place] for place in sorted(order[:MOST_LINES]))
        if is_list and len(items) > MOST_LINES:
            yield f"  {left_out(len(items) - MOST_LINES)}"


# --- the caller's code ------------------------------------------------------------------------


def named_object(text: str) -> Any:
    """Import the object MODULE:NAME. The module may be in the current folder.

    Raises:
        argparse.ArgumentTypeError: The module or the name does not exist, or the module raises an
            error, whose traceback is printed.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:NAME")
    try:
        folder = os.getcwd()  # noqa: PTH109 - as `python -m` does, which leaves it there, too
        if sys.path[:1] != [folder]:
            sys.path.insert(0, folder)
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # noqa: BLE001 - argparse reports it
        _print_traceback(error)
        raise argparse.ArgumentTypeError(f"cannot import {text!r}: {_described(error)}") from None


def template_from(named: Any) -> Any:
    """Return a template, or call the object to get one if it is callable and not a pytree node.

    Raises:
        SystemExit: The call raises an error, or the caller's pytree nodes do, which is printed.
    """
    import jax

    template = named
    # A module of Equinox can be called, too, but JAX can flatten it.
    if callable(named) and jax.tree_util.all_leaves([named]):
        template = _result_of("the function of --template", named)
    _result_of("flattening the template", _flatten, template)
    return template


def _flatten(template: Any) -> None:
    """Raise the errors of the caller's pytree nodes. The answers say those of this package."""
    from pytree2safetensors._load.flat_template import flat_template

    with suppress(Pytree2SafetensorsError):
        flat_template(template)


def _reporting(rules: Callable[[str], Any]) -> Callable[[str], str]:
    """Return a function that gives the same names, and prints errors of the function."""

    def name_of(path: str) -> str:
        name = _result_of("the function of --rules", rules, path)
        if isinstance(name, str):
            return name
        complain(f"the function of --rules gave {type(name).__name__} for {shorten(path)}, not str")
        raise SystemExit(DIFFERENT)

    return name_of


def _result_of(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that runs the caller's code. If it raises an error, print this and exit."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - it is printed
        _print_traceback(error)
        complain(f"{what} raised {_described(error)}")
        raise SystemExit(DIFFERENT) from None


def _described(error: Exception) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}".removesuffix(": ")
    except Exception:  # noqa: BLE001 - a foreign __str__ may raise anything
        return name


_NOT_THE_CALLERS: Final = {"pytree2safetensors", "importlib", "jax"}


def _print_traceback(error: Exception) -> None:
    """Print the traceback of an error from where the caller's code begins, if it got there."""
    trace: TracebackType | None = error.__traceback__
    while trace and _package(trace) in _NOT_THE_CALLERS:
        trace = trace.tb_next
    if trace and sys.stderr:
        traceback.print_exception(type(error), error, trace)


def _package(trace: TracebackType) -> str:
    return str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]

"""`show --template`: whether a file fits a template, with or without rules.

Specification: *Rules*.
"""

import argparse
import importlib
import inspect
import os
import sys
from functools import reduce
from typing import Any

from pytree2safetensors._cli.answer import Answer
from pytree2safetensors._cli.terminal import plain


def fitting(file: str, prefix: str, template: Any, rules: Any) -> Answer:
    """Explain what loading a file into a template would do."""
    from pytree2safetensors._load.explaining import explanation

    tree = template() if inspect.isroutine(template) else template
    lines, misfits = explanation(tree, file, prefix=prefix, rename=rules)
    fits = not any(misfits)
    return Answer(
        lambda: lines,
        lambda: {"file": file, "fits": fits, **misfits._asdict(), "lines": lines},
        "" if fits else f"{plain(file)} does not fit the template",
    )


def named_object(text: str) -> Any:
    """Import the object MODULE:NAME. The module may be in the current folder.

    Raises:
        argparse.ArgumentTypeError: The module or the name does not exist.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:NAME")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as `python -m` does
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"cannot import {text!r}: {error}") from None
    finally:
        sys.path.pop(0)

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


def fitting(file: str, prefix: str, template: Any, rules: Any) -> Answer:
    """Explain what loading a file into a template would do."""
    from pytree2safetensors._load.explaining import explain

    tree = template() if inspect.isroutine(template) else template

    def lines() -> list[str]:
        return explain(tree, file, prefix=prefix, rename=rules).splitlines()

    return Answer(lines, lambda: {"file": file, "lines": lines()})


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

"""Which file an error of the system is about, and the names of unfinished files."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TEMPORARY: Final = ".pytree2safetensors-"  # what the names of unfinished files begin with
_FOREIGN: Final = "_pytree2safetensors_foreign"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the system's errors the path that the caller asked for."""
    try:
        yield
    except OSError as error:
        is_systems = error.errno is not None and type(error).__module__ == "builtins"
        if not is_systems or hasattr(error, _FOREIGN):
            raise
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextmanager
def foreign() -> Iterator[None]:
    """Mark errors of code that the caller passed, which are not about the file."""
    try:
        yield
    except OSError as error:
        setattr(error, _FOREIGN, True)
        raise


def temporary_name(target: str = "") -> str:
    """Return a new name for a file that is to become `target`."""
    return f"{temporary_prefix(target)}{secrets.token_hex(8)}.tmp"


def temporary_prefix(target: str) -> str:
    """Return what the temporary names of a target begin with, and those of no other."""
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()
    return f"{TEMPORARY}{digest[:8]}-"

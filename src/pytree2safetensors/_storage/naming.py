"""Naming files: in errors of the system, and while they are unfinished.

Specification: *Saving*.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TEMPORARY: Final = ".pytree2safetensors-"  # the prefix of the names of unfinished files
_KEPT: Final = "_pytree2safetensors_kept"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the path that the caller passed into errors of the system."""
    try:
        yield
    except OSError as error:
        is_systems = error.errno is not None and type(error).__module__ == "builtins"
        if not is_systems or hasattr(error, _KEPT):
            raise
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextmanager
def not_naming() -> Iterator[None]:
    """Leave errors as they are, such as those of the caller's own code, which are not about the file."""
    try:
        yield
    except OSError as error:
        setattr(error, _KEPT, True)
        raise


def temporary_name(target: str) -> str:
    """Return a new name for a file that is to become `target`."""
    return f"{temporary_prefix(target)}{secrets.token_hex(8)}.tmp"


def temporary_prefix(target: str) -> str:
    """Return how the temporary names of a target begin."""
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()
    return f"{TEMPORARY}{digest[:8]}-"

"""The exceptions, one class for each kind of problem.

Specification: *Errors*.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from pytree2safetensors._messages import shorten


class Pytree2SafetensorsError(Exception):
    """The base class of the exceptions of this package."""

    __module__ = "pytree2safetensors"


class KeyPathError(Pytree2SafetensorsError, ValueError):
    """A string is not a key path, or a key path cannot be spelled."""

    __module__ = "pytree2safetensors"


class TreeStructureError(Pytree2SafetensorsError, ValueError):
    """Names do not form a tree, or JAX cannot flatten a tree."""

    __module__ = "pytree2safetensors"


class UnsupportedLeafError(Pytree2SafetensorsError, TypeError):
    """A safetensors file cannot hold some of the leaves, such as functions."""

    __module__ = "pytree2safetensors"


class DeletedLeaf(UnsupportedLeafError, RuntimeError):  # JAX raises this for it, too
    """An array was deleted or donated."""

    __module__, __qualname__ = "pytree2safetensors", "UnsupportedLeafError"  # for tracebacks

    def __reduce__(self) -> tuple[object, ...]:
        return _deleted_leaf, self.args, vars(self)


DeletedLeaf.__name__ = UnsupportedLeafError.__name__


def _deleted_leaf(*args: object) -> DeletedLeaf:
    return DeletedLeaf(*args)  # pickle finds the other class by the name of this one


class FileFormatError(Pytree2SafetensorsError, ValueError):
    """A file violates the format, or the format cannot express the contents."""

    __module__ = "pytree2safetensors"


class ReplacedError(FileFormatError):
    """Another file has taken the place of one that was not open. Loads start again."""


class UnreadableLeaf(FileFormatError):
    """A stored leaf that cannot be loaded, although the others of its file can."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{shorten(self.name)} {self.reason}"


class UnknownHere(UnreadableLeaf):
    """A stored leaf that may be valid, but is unknown to the installed libraries."""


class WeightsMismatchError(Pytree2SafetensorsError, ValueError):
    """The stored leaves do not fit the template.

    Attributes:
        missing: Spelled key paths that only the template has.
        unexpected: Names that only the file or dictionary has.
        mismatched: A line for each leaf that does not fit: the `repr` of its spelled key path, and why.
    """

    __module__ = "pytree2safetensors"

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing: tuple[str, ...] = tuple(missing)
        self.unexpected: tuple[str, ...] = tuple(unexpected)
        self.mismatched: tuple[str, ...] = tuple(mismatched)


_UNREAD: Final = "_unread"


def unread(message: str) -> FileFormatError:
    """Return the error for a file that could not be read, and may be sound."""
    error = FileFormatError(message)
    vars(error)[_UNREAD] = True
    return error


def may_be_sound(error: Exception) -> bool:
    """Return whether an error does not say that its file is damaged."""
    return isinstance(error, ReplacedError) or _UNREAD in vars(error)


@contextmanager
def errors_of(file: str) -> Iterator[None]:
    """Add the name of the file to errors that only name a leaf."""
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"in {file}, {error}") from None

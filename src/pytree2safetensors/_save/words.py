"""The messages of processes that save together, and the conclusions from them, without I/O.

Specification: *Saving*.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    TreeStructureError,
    UnsupportedLeafError,
    WeightsMismatchError,
)

_TEXT: Final = 400  # characters of an error that are sent to the others
_VALUE: Final = 200  # characters of a term that an error shows

# What the processes must agree on, by its name in errors, which show the first line of the text.
Terms: TypeAlias = Mapping[str, str]
LAYOUT: Final = "the layout of the files"  # a term that the leaves determine
_LINES: Final = (
    "the part that is not shown",  # of a long line
    "its placement on the devices",
    "its rule or the shape of its leaf",
)


class Failure(NamedTuple):
    """An error, as it is sent to the other processes."""

    kind: str
    text: str
    errno: int | None = None


class Words(NamedTuple):
    """The message of a process that begins a save."""

    call: int  # how many saves this process has begun
    digest: str  # of the terms
    failure: Failure | None = None
    token: str = ""  # of process 0: a part of the temporary names
    start: int = 0  # of process 0: where the data of a single file begin


class Verdict(NamedTuple):
    """The conclusion from the words of all processes."""

    call: int  # the highest
    behind: int | None  # the first process with a lower call
    failed: tuple[int, Failure] | None  # the first process that failed in the highest call
    differs: int | None  # the first process whose digest is not that of process 0
    token: str
    start: int


def decide(said: Sequence[Words]) -> Verdict:
    """Return the conclusion from the words of all processes."""
    call = max(words.call for words in said)
    behind = failed = differs = None
    for process, words in enumerate(said):
        if behind is None and words.call < call:
            behind = process
        if failed is None and words.call == call and words.failure is not None:
            failed = process, words.failure
        if differs is None and words.digest != said[0].digest:
            differs = process
    return Verdict(call, behind, failed, differs, said[0].token, said[0].start)


def judge(verdict: Verdict, call: int) -> Literal["go", "again", "explain"]:
    """Return what a process does: save, meet again with the same words, or say what differs.

    Raises:
        FileFormatError: This process has begun fewer saves than another.
        Exception: An error like the one on another process.
    """
    if call < verdict.call:
        raise FileFormatError(
            f"this process begins save number {call} of arrays of several processes, and another "
            f"process begins number {verdict.call}; nothing was written; call save_pytree equally often on "
            "all processes"
        )
    if verdict.failed is not None:
        raise error_of(*verdict.failed)
    if verdict.behind is not None:
        return "again"  # the process that is behind raises now, and reaches this save next
    return "go" if verdict.differs is None else "explain"


def digest_of(terms: Terms) -> str:
    """Return the digest of terms."""
    return hashlib.sha256(json.dumps(list(terms.items())).encode()).hexdigest()


def difference(first: Terms, other: Terms, process: int) -> str:
    """Describe the first term in which a process differs from process 0."""
    for name in sorted({**first, **other}, key=LAYOUT.__eq__):  # last, as a leaf may explain it
        one, two = (terms.get(name, "missing").split("\n") for terms in (first, other))
        if one == two:
            continue
        shown, others = _shorten(one[0]), _shorten(two[0])
        if shown != others:
            return f"{name} is {shown} on process 0 and {others} on process {process}"
        lines = zip(_LINES, one, two, strict=False)
        line = next(line for line, of_first, of_other in lines if of_first != of_other)
        return f"{name} is {shown} on process 0 and on process {process}, but {line} differs"
    return f"process {process} has other names, or the same names in another order"


def _shorten(text: str) -> str:
    return text if len(text) <= _VALUE else f"{text[: _VALUE // 2]}...{text[-_VALUE // 2 :]}"


# --- errors -----------------------------------------------------------------------------------

LEFT: Final = Failure(
    "left", "it was interrupted, waited too long for the others, or could not reach them"
)

_KINDS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind
    for kind in (
        FileFormatError,
        KeyPathError,
        TreeStructureError,
        UnsupportedLeafError,
        WeightsMismatchError,
    )
}


def failure_of(error: BaseException) -> Failure:
    """Return an error in the form in which it is sent to the other processes."""
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f": {error.filename!r}"
        return Failure("OSError", f"{error.strerror}{where}"[:_TEXT], error.errno)
    names = [kind.__name__ for kind in type(error).__mro__]
    kind = next((name for name in names if name in _KINDS), names[0])
    return Failure(kind, str(error)[:_TEXT])


def error_of(process: int, failure: Failure) -> Exception:
    """Return what the other processes raise when one has failed."""
    text = f"process {process} could not save: {failure.text}"
    if failure.errno is not None:
        return OSError(failure.errno, text)
    if failure.kind in _KINDS:
        return _KINDS[failure.kind](text)
    if failure.kind == LEFT.kind:
        return RuntimeError(text)
    return RuntimeError(f"process {process} could not save: {failure.kind}: {failure.text}")


# --- JSON -------------------------------------------------------------------------------------


def read_words(text: str) -> Words:
    """Read words from JSON, which has tuples as lists."""
    words = Words(*json.loads(text))
    return words._replace(failure=_failure(words.failure))


def read_verdict(text: str) -> Verdict:
    """Read a verdict from JSON."""
    verdict = Verdict(*json.loads(text))
    return verdict._replace(failed=_pair(verdict.failed))


def read_failure(text: str) -> Failure | None:
    """Read the result of a step on one process from JSON."""
    return _failure(json.loads(text))


def read_failed(text: str) -> tuple[int, Failure] | None:
    """Read from JSON which process failed in a step, and how."""
    return _pair(json.loads(text))


def _failure(found: Any) -> Failure | None:
    return None if found is None else Failure(*found)


def _pair(found: Any) -> tuple[int, Failure] | None:
    return None if found is None else (found[0], Failure(*found[1]))

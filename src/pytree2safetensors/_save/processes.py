"""Saving from several processes: JAX moves nothing, each process writes what it owns.

Four times the processes tell each other how far they are, and whether something failed: when the
layout is known, when the file is there, when all is written, and when it is committed.

Specification: *Files*.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import jax
import numpy as np

from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    TreeStructureError,
    UnsupportedLeafError,
)
from pytree2safetensors._format.header import Plan, plan
from pytree2safetensors._format.tensor import BITS
from pytree2safetensors._leaves.extents import shape_of
from pytree2safetensors._leaves.spread import owned, owned_chunks, tensor_chunks
from pytree2safetensors._storage.atomic_file import (
    Writable,
    flush,
    is_special,
    joining,
    replacing,
    reserve,
    temporary_name,
    write_at,
)
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._tree.flatten import open_once
from pytree2safetensors._types import Chunk

if TYPE_CHECKING:
    from pytree2safetensors._save.contents import Contents

T = TypeVar("T")

_TEXT: Final = 400  # characters of an error that the others are told
_WORDS: Final = 8192  # bytes of what one process says; JSON takes up to 12 for a character
_SMALL: Final = 1 << 16  # bytes: smaller pieces are written together
_JOINED: Final = 4 << 20  # bytes that are written together
_LARGEST: Final = 32 << 20  # bytes of one write, so that progress is told often


def is_needed(leaves: Iterable[Any]) -> bool:
    """Whether some leaf is not wholly addressable by this process."""
    leaves = list(leaves)
    # To ask for the number of processes starts JAX's devices, which a tree of NumPy needs not.
    if not any(issubclass(kind, jax.Array) for kind in set(map(type, leaves))):
        return False
    return jax.process_count() > 1 and any(map(_is_global, leaves))


def _is_global(leaf: Any) -> bool:
    """Whether a leaf is an array of which this process holds a part only."""
    return (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and not leaf.is_fully_addressable
    )


def tell(tree: Any, error: BaseException) -> None:
    """Let the other processes know that this one failed before it could begin."""
    if is_needed(_arrays_in(tree)):
        _exchange(_described(error))


def _arrays_in(tree: Any) -> Iterator[jax.Array]:
    """The arrays of a tree that JAX may be unable to flatten, as far as they can be found."""
    pending, seen = [tree], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, jax.Array):
            yield node
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)
        else:
            with suppress(Exception):  # that there is one is what all are to be told
                pending.extend(child for _, child in open_once(node))


def save(
    contents: "Contents",
    path: PathLike | Writable,
    durable: bool,
    checksum: bool,
    max_shard_size: int | str | None,
    report: Progress | None,
) -> None:
    """Save together with the other processes."""
    first = jax.process_index() == 0

    def prepare() -> tuple[PathLike, Plan]:
        _refuse(checksum, max_shard_size)
        return _regular(path), plan(contents.infos, contents.metadata)

    def describe(prepared: tuple[PathLike, Plan]) -> dict[str, Any]:
        _, planned = prepared
        digest = _digest(contents, planned.order)
        return {"layout": digest, "start": len(planned.head), "name": temporary_name()}

    (target, planned), said = _together(prepare, describe)
    _check_layouts([words["layout"] for words in said])
    start, name = said[0]["start"], said[0]["name"]  # those of process 0, whose header it is
    with ExitStack() as stack:

        def begin() -> int:
            descriptor = stack.enter_context(replacing(target, durable=durable, name=name))
            reserve(descriptor, start + planned.size)
            return descriptor

        def write(descriptor: int) -> None:
            total = 0 if report is None else _total(contents, planned, first)
            told = Report(report, total)
            for offset, piece in _arranged(_pieces(contents, planned, start, first)):
                write_at(descriptor, piece, offset)
                told.add(len(piece))
            if durable:
                flush(descriptor)
            told.finish()

        def join() -> None:
            with joining(target, name) as descriptor:
                write(descriptor)

        descriptor, _ = _together(begin if first else lambda: -1)
        _together((lambda: write(descriptor)) if first else join)
        _together(stack.close)


def _refuse(checksum: bool, max_shard_size: int | str | None) -> None:
    if checksum:
        raise FileFormatError(
            "checksum=True does not go with several processes, none of which sees whole arrays"
        )
    if max_shard_size is not None:
        raise FileFormatError(
            "max_shard_size= does not go with several processes, which write one file"
        )


def _regular(path: PathLike | Writable) -> PathLike:
    if not isinstance(path, str | os.PathLike) or is_special(path):
        raise FileFormatError(
            "several processes save together into a regular file, which each of them opens by its "
            "path; a file object, a folder or a device does not do"
        )
    return path


# --- agreement --------------------------------------------------------------------------------


def _together(
    work: Callable[[], T], describe: Callable[[T], dict[str, Any]] = lambda _: {}
) -> tuple[T, list[dict[str, Any]]]:
    """Do something on every process, and hear what each has to say of it; if one fails, all do."""
    try:
        found = work()
        words = describe(found)
    except BaseException as error:
        _exchange(_described(error))
        raise
    said = _exchange(words)
    for process, others in enumerate(said):
        if "error" in others:
            raise _error_of(process, others)
    return found, said


_KINDS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind
    for kind in (FileFormatError, KeyPathError, TreeStructureError, UnsupportedLeafError)
}


def _described(error: BaseException) -> dict[str, Any]:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{error.strerror}: {error.filename!r}"
        return {"error": "OSError", "text": text[:_TEXT], "errno": error.errno}
    kinds = [kind.__name__ for kind in type(error).__mro__]
    public = next((kind for kind in kinds if kind in _KINDS), kinds[0])
    return {"error": public, "text": text[:_TEXT]}


def _error_of(process: int, words: dict[str, Any]) -> Exception:
    kind, text = words["error"], words["text"]
    if "errno" in words:
        return OSError(words["errno"], f"process {process} could not save: {text}")
    if kind in _KINDS:
        return _KINDS[kind](f"process {process} could not save: {text}")
    return RuntimeError(f"process {process} could not save: {kind}: {text}")


def _exchange(words: dict[str, Any]) -> list[dict[str, Any]]:
    """Say something to all processes, and hear what each of them says."""
    from jax.experimental import multihost_utils  # slow to import, and rarely needed

    text = json.dumps(words).encode("ascii").ljust(_WORDS)
    heard = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    return [json.loads(row.tobytes()) for row in np.asarray(heard)]


def _digest(contents: "Contents", order: Iterable[str]) -> str:
    """What the processes have to agree on: names, forms, and which arrays are global."""
    state = hashlib.sha256()
    for name in order:
        line = [name, *contents.infos[name], _is_global(contents.leaves[name])]
        state.update(json.dumps(line).encode())
    return state.hexdigest()


def _check_layouts(layouts: list[str]) -> None:
    other = [process for process, layout in enumerate(layouts) if layout != layouts[0]]
    if other:
        processes = ", ".join(map(str, other[:10])) + (", ..." if len(other) > 10 else "")
        raise FileFormatError(
            "the processes do not save the same tree: names, dtypes, shapes or shardings differ "
            f"between process 0 and process {processes}; give all of them one tree"
        )


# --- what this process writes -----------------------------------------------------------------


def _pieces(contents: "Contents", planned: Plan, start: int, first: bool) -> Iterator[Chunk]:
    """The bytes that this process owns: of global arrays its shards, the first one all others."""
    if first:
        yield 0, memoryview(planned.head)
    offset = start
    for name in planned.order:
        info, leaf = contents.infos[name], contents.leaves[name]
        pieces: Iterable[Chunk] = ()
        if _is_global(leaf):
            pieces = owned_chunks(leaf, info)
        elif first:
            pieces = tensor_chunks(leaf, info)
        for position, piece in pieces:
            yield offset + position, piece
        offset += info.nbytes


def _total(contents: "Contents", planned: Plan, first: bool) -> int:
    """How many bytes this process writes."""
    total = len(planned.head) if first else 0
    for name, info in contents.infos.items():
        leaf = contents.leaves[name]
        if _is_global(leaf):
            items = sum(math.prod(shape_of(region)) for region, _ in owned(leaf, info))
            total += items * BITS[info.dtype] // 8
        elif first:
            total += info.nbytes
    return total


def _arranged(pieces: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same bytes in pieces of a good size: small neighbours together, large ones cut."""
    waiting = bytearray()
    start = 0
    for offset, piece in pieces:
        follows = offset == start + len(waiting)
        if waiting and not (follows and len(piece) < _SMALL and len(waiting) < _JOINED):
            yield start, memoryview(waiting)
            waiting = bytearray()
        if len(piece) < _SMALL:
            start = start if waiting else offset
            waiting += piece
        else:
            for cut in range(0, len(piece), _LARGEST):
                yield offset + cut, piece[cut : cut + _LARGEST]
    if waiting:
        yield start, memoryview(waiting)

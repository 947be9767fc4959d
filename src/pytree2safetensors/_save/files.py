"""The files of a save: one, or shards and their index.

Specification: *Sharded folders*.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.header import MAX_SHARD_HEADER, Plan, plan
from pytree2safetensors._format.index import (
    SUFFIX,
    TOTAL_SIZE,
    index_name,
    parse_size,
    split,
    split_path,
    stem_of,
    write_index,
)
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._storage.atomic_file import Writable, named
from pytree2safetensors._storage.atomic_folder import Part, replace_together
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.progress import Progress


def save(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    path: PathLike | Writable,
    *,
    max_shard_size: int | str,
    durable: bool,
    report: Progress | None,
) -> None:
    """Save tensors as shards and their index, or as one file where that is enough.

    Args:
        infos: The tensors.
        metadata: The metadata of them all.
        pieces: Gives the bytes of a file that is laid out.
        path: The folder, or a file in it whose stem the names begin with.
        max_shard_size: How many bytes of tensors a shard has at most, if it has more than one.
        durable: Whether the files have reached the disk when this returns.
        report: What to call with bytes written, and bytes altogether.

    Raises:
        ValueError: The size is none, or the path is a file object.
        FileFormatError: The metadata or the index are beyond what the format allows.
        OSError: The files cannot be written.
    """
    limit = parse_size(max_shard_size)
    path = check_path(path)
    if TOTAL_SIZE in metadata:
        raise FileFormatError(
            f"the metadata may not set {TOTAL_SIZE!r}, which an index of shards says itself; "
            "choose another name"
        )
    folder, stem = split_path(os.fsdecode(path), is_folder=os.path.isdir(os.fsdecode(path)))
    own = {key: metadata[key] for key in metadata if key == "format"}  # of each shard
    shards = split(infos, limit, own)
    parts, rival = (
        _single(infos, metadata, pieces, stem)
        if len(shards) <= 1
        else _sharded(infos, metadata, own, pieces, stem, shards)
    )
    kept = {part.name for part in parts}

    def stale(found: Iterable[str]) -> list[str]:
        older = sorted(name for name in found if stem_of(name) == stem and name not in kept)
        return [rival, *older] if rival in found else older

    try:
        replace_together(folder, parts, stale, durable=durable, progress=report)
    except OSError as error:
        raise named(error, path) from error


def _single(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    stem: str,
) -> tuple[list[Part], str]:
    """The one file, and the name that may not stand beside it."""
    planned = plan(infos, metadata)
    return [_part(stem + SUFFIX, planned, pieces)], index_name(stem)


def _sharded(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    own: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    stem: str,
    shards: list[list[str]],
) -> tuple[list[Part], str]:
    """The shards and their index, and the name that may not stand beside them."""
    parts: list[Part] = []
    weights: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}"
        weights.update(dict.fromkeys(names, shard))
        planned = plan({name: infos[name] for name in names}, own, MAX_SHARD_HEADER)
        parts.append(_part(shard, planned, pieces))
    total = sum(info.nbytes for info in infos.values())
    index = write_index(metadata, weights, total)
    parts.append(Part(index_name(stem), len(index), [memoryview(index)]))
    return parts, stem + SUFFIX


def _part(name: str, planned: Plan, pieces: Callable[[Plan], Iterable[memoryview]]) -> Part:
    return Part(name, len(planned.head) + planned.size, pieces(planned))


def check_path(path: PathLike | Writable) -> PathLike:
    """The path itself; what is none can be no folder."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"max_shard_size= writes a folder, and {type(path).__name__} is none")
    if not os.fsdecode(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    return path

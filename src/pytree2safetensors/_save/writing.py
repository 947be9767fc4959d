"""Carrying out the plan of a save: to a file, a file object or a folder.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

from pytree2safetensors._format.index import SUFFIX, index_name, parse_size, split_path, stem_of
from pytree2safetensors._save.chunks import data_chunks
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.hashing import Hashing
from pytree2safetensors._save.plan import FilePlan, SavePlan, plan_file, plan_folder
from pytree2safetensors._storage.atomic_file import is_special, write_file
from pytree2safetensors._storage.atomic_folder import Part, replace_together
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.naming import naming
from pytree2safetensors._storage.progress import Progress, closing_bar
from pytree2safetensors._storage.stream import Writable, write_stream
from pytree2safetensors._types import Chunk


class Target(NamedTuple):
    """Where a save goes.

    Attributes:
        path: What the caller gave: a path or a file object.
        folder: The folder to write shards in; None for one file.
        stem: What the names in the folder begin with.
        limit: The bytes of tensors that a shard has at most.
    """

    path: Any
    folder: str | None = None
    stem: str = ""
    limit: int = 0


def target_of(path: PathLike | Writable, max_shard_size: int | str | None) -> Target:
    """Find where a save goes.

    Raises:
        ValueError: The size is not a size, or it is given for a file object.
    """
    if max_shard_size is None:
        return Target(path)
    limit = parse_size(max_shard_size)
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"max_shard_size= writes a folder, and {type(path).__name__} is none")
    name = os.fsdecode(path)
    if not name:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    return Target(path, *split_path(name, is_folder=os.path.isdir(name)), limit)


def plan_save(contents: Contents, target: Target, *, checksum: bool) -> SavePlan:
    """Plan what a save writes."""
    if target.folder is None:
        return plan_file(contents, checksum=checksum)
    return plan_folder(contents, target.stem, target.limit, checksum=checksum)


def write(
    plan: SavePlan,
    leaves: Mapping[str, Any],
    target: Target,
    *,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Carry out a plan.

    Raises:
        OSError: The files cannot be written; what was there before still is.
    """
    hasher = Hashing(plan.infos) if plan.checksum else nullcontext()
    with closing_bar(progress), hasher as hashing:
        if target.folder is not None:
            _write_folder(plan, leaves, target, hashing, durable, progress)
            return
        [file] = plan.files
        # Asked first: some paths have a method `write`.
        is_path = isinstance(target.path, str | os.PathLike)
        if is_path and not (hashing and is_special(target.path)):
            chunks = _chunks(plan, file, leaves, hashing)
            write_file(target.path, chunks, file.size, durable=durable, progress=progress)
            return
        if hashing is not None:  # a pass of its own: what is written cannot be changed later
            for _ in hashing.through(file, data_chunks(file, plan.infos, leaves)):
                pass
            file = file._replace(head=plan.sealed(hashing.digests()))
        chunks = _chunks(plan, file, leaves, None)
        if is_path:
            write_file(target.path, chunks, file.size, durable=durable, progress=progress)
        else:
            write_stream(target.path, chunks, file.size, progress)


def _chunks(
    plan: SavePlan, file: FilePlan, leaves: Mapping[str, Any], hashing: Hashing | None
) -> Iterator[Chunk]:
    """Give the bytes of a file; its head comes last if digests are to complete it."""
    data: Iterable[Chunk] = data_chunks(file, plan.infos, leaves)
    if hashing is not None:
        data = hashing.through(file, data)
    if hashing is None or plan.index_name:
        yield 0, memoryview(file.head)
        yield from data
    else:
        yield from data
        yield 0, memoryview(plan.sealed(hashing.digests()))


def _write_folder(
    plan: SavePlan,
    leaves: Mapping[str, Any],
    target: Target,
    hashing: Hashing | None,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write the files of a plan into their folder, in place of what an older save left there."""
    parts = [
        Part(file.name, file.size, _chunks(plan, file, leaves, hashing)) for file in plan.files
    ]
    if plan.index_name:
        parts.append(Part(plan.index_name, len(plan.sealed()), _index_chunks(plan, hashing)))
    rival, stale = older_names(plan, target)
    folder = target.folder or ""
    with naming(target.path):
        replace_together(folder, parts, rival, stale, durable=durable, progress=progress)


def older_names(plan: SavePlan, target: Target) -> tuple[str, Callable[[Iterable[str]], list[str]]]:
    """Return the name that goes before the commit, and what finds those that go after it.

    They are an older save's; a file and an index of one stem would make the folder ambiguous.
    """
    kept = {file.name for file in plan.files} | {plan.index_name}
    rival = target.stem + SUFFIX if plan.index_name else index_name(target.stem)

    def stale(found: Iterable[str]) -> list[str]:
        return sorted(n for n in found if stem_of(n) == target.stem and n not in kept)

    return rival, stale


def _index_chunks(plan: SavePlan, hashing: Hashing | None) -> Iterator[Chunk]:
    """Give the index; all shards are written by then."""
    yield 0, memoryview(plan.sealed(None if hashing is None else hashing.digests()))

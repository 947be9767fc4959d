"""Executing the plan of a save: to a file, a file object or a folder.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, SupportsIndex

from pytree2safetensors._format.index import SUFFIX, index_name, parse_size, split_path, stem_of
from pytree2safetensors._messages import shorten
from pytree2safetensors._save.chunks import data_chunks
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.hashing import Hashing
from pytree2safetensors._save.plan import FilePlan, SavePlan, plan_file, plan_folder
from pytree2safetensors._storage.atomic_file import is_special, write_file
from pytree2safetensors._storage.atomic_folder import NewFile, Older, replace_together
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.folder import absolute
from pytree2safetensors._storage.naming import naming
from pytree2safetensors._storage.progress import Progress, closing_bar
from pytree2safetensors._storage.remote_folder import replace_remotely
from pytree2safetensors._storage.remote_path import RemotePath, check_created, check_home, resolve
from pytree2safetensors._storage.remote_writing import write_remote
from pytree2safetensors._storage.stream import Writable, write_stream
from pytree2safetensors._types import Chunk


class SaveTarget(NamedTuple):
    """Where a save goes.

    Attributes:
        path: The path, here or in a store, or the file object.
        folder: The folder to write shards in, here or in a store; None for one file.
        stem: The prefix of the names in the folder.
        limit: The most bytes of tensors in a shard.
    """

    path: Any
    folder: Any = None
    stem: str = ""
    limit: int = 0


def label_of(target: SaveTarget) -> str:
    """Return what messages call a target."""
    path = target.path
    if isinstance(path, RemotePath):
        return path.label
    return shorten(path) if isinstance(path, str) else f"a {type(path).__name__}"


def target_of(
    path: PathLike | RemotePath | Writable, max_shard_size: SupportsIndex | str | None
) -> SaveTarget:
    """Find where a save goes.

    Raises:
        ValueError: The size is not a size, or it is given for a file object; or the path is a URL
            that cannot be opened.
    """
    where = resolve(path)
    if max_shard_size is None:
        if isinstance(where, str):
            check_home(where)
        return SaveTarget(where)
    limit = parse_size(max_shard_size)
    if isinstance(where, RemotePath):
        folder, stem = split_path(where.path, is_folder=False)
        return SaveTarget(where, where if folder == where.path else where.parent(), stem, limit)
    if not isinstance(where, str):
        raise ValueError(
            f"max_shard_size= writes a folder, so it needs a path, not {type(path).__name__}"
        )
    if not where:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    folder, stem = split_path(where, is_folder=os.path.isdir(where))
    check_created(folder)
    return SaveTarget(where, folder, stem, limit)


def settled(target: SaveTarget) -> SaveTarget:
    """Return a target that stays where it is if the working directory changes."""
    if not isinstance(target.path, str):
        return target
    folder = None if target.folder is None else absolute(target.folder or os.curdir)
    return target._replace(path=absolute(target.path), folder=folder)


def replacing_shards(plan: SavePlan, target: SaveTarget) -> tuple[SavePlan, SaveTarget]:
    """If one file goes where a load finds the index of shards, plan to replace them in their folder.

    Earlier saves must have finished. In a store, this would take another request for each save.
    """
    path = target.path
    if target.folder is not None or not isinstance(path, str) or not path.endswith(SUFFIX):
        return plan, target
    folder, stem = split_path(path, is_folder=False)
    if os.path.lexists(path) or not os.path.isfile(os.path.join(folder, index_name(stem))):
        return plan, target
    files = [file._replace(name=stem + SUFFIX) for file in plan.files]
    return plan._replace(files=files), target._replace(folder=folder, stem=stem)


def plan_save(contents: Contents, target: SaveTarget, *, checksum: bool) -> SavePlan:
    """Plan what a save writes."""
    if target.folder is None:
        return plan_file(contents, checksum=checksum)
    return plan_folder(contents, target.stem, target.limit, checksum=checksum)


def write(
    plan: SavePlan,
    leaves: Mapping[str, Any],
    target: SaveTarget,
    *,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Execute a plan.

    Raises:
        OSError: The files cannot be written. The old files are unchanged.
    """
    hashing = Hashing(plan.infos) if plan.checksum else None
    plan, target = replacing_shards(plan, target)
    with closing_bar(progress), hashing or nullcontext():
        if target.folder is not None:
            _write_folder(plan, leaves, target, hashing, durable, progress)
            return
        [file] = plan.files
        where = target.path
        if hashing is not None and (not isinstance(where, str) or is_special(where)):
            file, hashing = _sealed(plan, file, leaves, hashing), None
        chunks = _chunks(plan, file, leaves, hashing)
        if isinstance(where, str):
            write_file(where, chunks, file.size, durable=durable, progress=progress)
        elif isinstance(where, RemotePath):
            write_remote(where, chunks, file.size, progress)
        else:
            write_stream(where, chunks, file.size, progress)


def _sealed(
    plan: SavePlan, file: FilePlan, leaves: Mapping[str, Any], hashing: Hashing
) -> FilePlan:
    """Hash in a separate pass, for bytes that cannot be changed after they are written."""
    for _ in hashing.through(file, data_chunks(file, plan.infos, leaves)):
        pass
    return file._replace(head=plan.sealed(hashing.digests()))


def _chunks(
    plan: SavePlan, file: FilePlan, leaves: Mapping[str, Any], hashing: Hashing | None
) -> Iterator[Chunk]:
    """Yield the bytes of a file, with the head last if it has digests."""
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
    target: SaveTarget,
    hashing: Hashing | None,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write the files of a plan into their folder, and replace those of an older save."""
    files = plan.files
    if hashing is not None and isinstance(target.folder, RemotePath) and not plan.index_name:
        files, hashing = [_sealed(plan, file, leaves, hashing) for file in files], None
    new_files = [
        NewFile(file.name, file.size, _chunks(plan, file, leaves, hashing)) for file in files
    ]
    if plan.index_name:
        new_files.append(NewFile(plan.index_name, len(plan.sealed()), _index_chunks(plan, hashing)))
    older = older_files(plan, target)
    if isinstance(target.folder, RemotePath):
        replace_remotely(target.folder, new_files, older, progress)
        return
    folder = target.folder or ""
    with naming(target.path):
        replace_together(folder, new_files, older, durable=durable, progress=progress)


def older_files(plan: SavePlan, target: SaveTarget) -> Older:
    """Return what an older save may have left in the folder.

    The rival is the file or index of the same stem, since both together make a folder ambiguous.
    """
    kept = {file.name for file in plan.files} | {plan.index_name}
    rival = target.stem + SUFFIX if plan.index_name else index_name(target.stem)

    def stale(found: Iterable[str]) -> list[str]:
        return sorted(n for n in found if stem_of(n) == target.stem and n not in kept)

    return Older(rival, stale)


def _index_chunks(plan: SavePlan, hashing: Hashing | None) -> Iterator[Chunk]:
    """Yield the index, after all shards are written."""
    yield 0, memoryview(plan.sealed(None if hashing is None else hashing.digests()))

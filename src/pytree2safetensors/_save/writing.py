"""Executing the plan of a save: to a file, a folder, a store or a file object.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from pytree2safetensors._save.chunks import data_chunks
from pytree2safetensors._save.hashing import Hashing
from pytree2safetensors._save.plan import FilePlan, SavePlan
from pytree2safetensors._save.target import (
    LocalTarget,
    OtherTarget,
    SaveTarget,
    older_files,
    replacing_shards,
)
from pytree2safetensors._storage.atomic_file import is_special, write_file
from pytree2safetensors._storage.atomic_folder import NewFile, replace_together
from pytree2safetensors._storage.naming import naming
from pytree2safetensors._storage.progress import Progress, closing_bar
from pytree2safetensors._storage.remote_folder import replace_remotely
from pytree2safetensors._storage.remote_path import RemotePath
from pytree2safetensors._storage.remote_writing import write_remote
from pytree2safetensors._storage.stream import write_stream
from pytree2safetensors._types import Chunk


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
    with closing_bar(progress), hashing or nullcontext():
        if isinstance(target, LocalTarget):
            _write_locally(plan, leaves, target, hashing, durable, progress)
        else:
            _write_elsewhere(plan, leaves, target, hashing, progress)


def _write_locally(
    plan: SavePlan,
    leaves: Mapping[str, Any],
    target: LocalTarget,
    hashing: Hashing | None,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write one file, or files into their folder, where they replace those of an older save."""
    plan, target = replacing_shards(plan, target)
    if target.folder is not None:
        files = _new_files(plan, plan.files, leaves, hashing)
        older = older_files(plan, target)
        with naming(target.path):
            replace_together(target.folder, files, older, durable=durable, progress=progress)
        return
    [file] = plan.files
    if hashing is not None and is_special(target.path):
        file, hashing = _sealed(plan, file, leaves, hashing), None
    chunks = _chunks(plan, file, leaves, hashing)
    write_file(target.path, chunks, file.size, durable=durable, progress=progress)


def _write_elsewhere(
    plan: SavePlan,
    leaves: Mapping[str, Any],
    target: OtherTarget,
    hashing: Hashing | None,
    progress: Progress | None,
) -> None:
    """Write to a store or a file object, where bytes cannot be changed after they are written."""
    files = plan.files
    if hashing is not None and not plan.index_name:
        files, hashing = [_sealed(plan, file, leaves, hashing) for file in files], None
    if target.folder is not None:
        new_files = _new_files(plan, files, leaves, hashing)
        replace_remotely(target.folder, new_files, older_files(plan, target), progress)
        return
    [file] = files
    chunks = _chunks(plan, file, leaves, hashing)
    if isinstance(target.path, RemotePath):
        write_remote(target.path, chunks, file.size, progress)
    else:
        write_stream(target.path, chunks, file.size, progress)


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


def _new_files(
    plan: SavePlan, files: Iterable[FilePlan], leaves: Mapping[str, Any], hashing: Hashing | None
) -> list[NewFile]:
    """Return the files of a folder, the index last."""
    found = [NewFile(file.name, file.size, _chunks(plan, file, leaves, hashing)) for file in files]
    if plan.index_name:
        found.append(NewFile(plan.index_name, len(plan.sealed()), _index_chunks(plan, hashing)))
    return found


def _index_chunks(plan: SavePlan, hashing: Hashing | None) -> Iterator[Chunk]:
    """Yield the index, after all shards are written."""
    yield 0, memoryview(plan.sealed(None if hashing is None else hashing.digests()))

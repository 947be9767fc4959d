"""Executing the plan of a save: to a file, a file object or a folder.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from pytree2safetensors._save.chunks import data_chunks
from pytree2safetensors._save.hashing import Hashing
from pytree2safetensors._save.plan import FilePlan, SavePlan
from pytree2safetensors._save.target import SaveTarget, older_files, replacing_shards
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


def _index_chunks(plan: SavePlan, hashing: Hashing | None) -> Iterator[Chunk]:
    """Yield the index, after all shards are written."""
    yield 0, memoryview(plan.sealed(None if hashing is None else hashing.digests()))

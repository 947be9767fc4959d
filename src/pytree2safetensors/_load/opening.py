"""Opening a checkpoint: a file, a folder of shards or its index, wherever it is.

Specification: *Loading*.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import FileFormatError, ReplacedError, unread
from pytree2safetensors._format.header import (
    LENGTH_BYTES,
    Tensors,
    check_data,
    check_header,
    header_length,
    parse,
)
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.locate import has_parts, is_index, locate, locate_remotely, unlisted
from pytree2safetensors._load.shard_index import Index, read_index
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.file_source import descriptors_to_keep, open_source
from pytree2safetensors._storage.folder import without_saves
from pytree2safetensors._storage.locations import PathLike, Readable, check_home, resolve
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.remote_file import RemoteSource
from pytree2safetensors._storage.remote_path import RemotePath, shown_url
from pytree2safetensors._storage.stream import open_stream

_HEAD = 1 << 16  # bytes: the first read has nearly every header
_KEPT = descriptors_to_keep()  # shards that stay open
_ATTEMPTS = 5  # to open shards, or to load; only saves in a loop need more than two
Params = ParamSpec("Params")
R = TypeVar("R")


def again_if_replaced(load: Callable[Params, R]) -> Callable[Params, R]:
    """Start a load again if a save replaces a shard that could not be kept open."""

    @wraps(load)
    def call(*args: Any, **kwargs: Any) -> R:  # beartype 0.17 knows no Params.args
        for _ in range(_ATTEMPTS - 1):
            with suppress(ReplacedError):
                return load(*args, **kwargs)
        try:
            return load(*args, **kwargs)
        except ReplacedError as error:
            raise FileFormatError(str(error)) from None

    return call


def open_checkpoint(path: PathLike | Readable, mmap: bool = False) -> OpenCheckpoint:
    """Open a file, a folder of shards or its index, or a file object unless `mmap` is True."""
    where = resolve(path)
    if isinstance(where, str):
        check_home(where)
        return _open_path(where)
    if isinstance(where, RemotePath):
        if mmap:
            raise ValueError(f"mmap=True maps a file on disk; load {where.label} without it")
        return _open_remotely(where)
    if mmap:
        raise ValueError("mmap=True maps a file on disk; load a file object without it")
    return _open_file(open_stream(where))


def _open_remotely(path: RemotePath) -> OpenCheckpoint:
    """Open the checkpoint that a path in a store means."""
    missing: str | None = None  # what the first error says
    refused: PermissionError | None = None
    is_missing = False
    cause: OSError | None = None
    try:
        candidates = locate_remotely(path)
    except PermissionError as error:  # which may hold for the listing only
        candidates, cause = unlisted(path), error
    for found in candidates:
        try:
            return _open_shards(found) if is_index(found) else _open_file(open_source(found))
        except FileNotFoundError as error:
            missing = missing or error.strerror
            is_missing = is_missing or found is path
        except PermissionError as error:  # S3 refuses what is missing if a user may not list files
            refused = refused or error
        except IsADirectoryError as error:
            cause = cause or error
    if cause is not None:
        raise cause
    if refused is not None and not is_missing:
        raise refused
    raise FileNotFoundError(errno.ENOENT, missing, shown_url(path.url))


def _open_path(path: str) -> OpenCheckpoint:
    """Open the checkpoint that a path means. If a save is replacing its shards, wait for that."""
    try:
        return _open_located(path)
    except (FileFormatError, FileNotFoundError):
        if not has_parts(path):
            raise
    folder = path if os.path.isdir(path) else os.path.dirname(path) or os.curdir
    with without_saves(folder):
        return _open_located(path)


def _open_located(path: str) -> OpenCheckpoint:
    """Locate and open a checkpoint. Try again if a save has replaced it."""
    found = locate(path)
    for _ in range(_ATTEMPTS):
        try:
            if is_index(found):
                return _open_shards(found)
            return _open_file(open_source(found, regular=found != path))
        except FileNotFoundError:
            if not os.path.exists(found) and (found == path or os.path.islink(found)):
                raise
            found = locate(path)  # the file may be back already
        except FileFormatError:
            if os.path.lexists(found) or found == (again := locate(path)):
                raise
            found = again
    raise _replaced_again(path)


def _open_file(source: ByteSource) -> OpenCheckpoint:
    checkpoint = OpenCheckpoint(source.label, [source])
    with _closed_on_error(checkpoint):
        start, tensors, metadata = read_header(source)
        checkpoint.add(source, start, tensors)
        checkpoint.add_metadata(metadata)
    return checkpoint


def _replaced_again(path: str | RemotePath) -> FileFormatError:
    label = path.label if isinstance(path, RemotePath) else shorten(path)
    return unread(f"{label} is being replaced by another save; load it after that")


def _open_shards(path: str | RemotePath) -> OpenCheckpoint:
    """Open the shards of an index; try again if a save replaces them."""
    for _ in range(_ATTEMPTS):
        index = read_index(path)
        with closing(index.source):
            checkpoint = OpenCheckpoint(index.label, [])
            try:
                with _closed_on_error(checkpoint):
                    _read_shards(checkpoint, index)
            except (FileFormatError, OSError):
                if index.is_current():
                    raise
                continue
            with _closed_on_error(checkpoint):
                if index.is_current():
                    return checkpoint
            checkpoint.close()
    raise _replaced_again(path)


def _read_shards(checkpoint: OpenCheckpoint, index: Index) -> None:
    for shard, source in _sources(checkpoint, index):
        checkpoint.sources.append(source)
        start, tensors, _ = read_header(source)
        index.check(shard, tensors.names)
        tensors = tensors.keep(index.shards[shard])
        if len(checkpoint.sources) > _KEPT:
            source.shut()
        checkpoint.add(source, start, tensors)
    checkpoint.add_metadata(index.metadata)


def _sources(checkpoint: OpenCheckpoint, index: Index) -> Iterator[tuple[str, ByteSource]]:
    """Open the shards of an index."""
    if isinstance(index.path, RemotePath):  # many at a time, as each takes a request or two
        with ReadPool(RemoteSource.in_flight) as pool:
            futures = pool.map(index.open, index.shards)
            yield from (
                (s, future.result()) for s, future in zip(index.shards, futures, strict=True)
            )
        return
    for shard in index.shards:
        try:
            yield shard, index.open(shard)
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE}:  # descriptors are left
                raise
            for kept in checkpoint.sources:
                kept.shut()
            yield shard, index.open(shard)


@contextmanager
def _closed_on_error(checkpoint: OpenCheckpoint) -> Iterator[None]:
    try:
        yield
    except BaseException:
        checkpoint.close()
        raise


def read_header(source: ByteSource) -> tuple[int, Tensors, dict[str, str]]:
    """Read where the data of a file starts, its tensors and its metadata."""
    head = source.read(0, min(_HEAD, source.measure(LENGTH_BYTES)))
    length = header_length(bytes(head[:LENGTH_BYTES]), source.label)
    start = LENGTH_BYTES + length
    check_header(length, source.measure(start), source.label)
    header = head[LENGTH_BYTES:start]
    if len(header) < length:
        header += source.read(len(head), start - len(head))
    with collector_paused():
        tensors, metadata = parse(bytes(header), source.label)
    data_size = source.measure(start + tensors.size) - start
    check_data(tensors.size, data_size, source.label)
    return start, tensors, metadata

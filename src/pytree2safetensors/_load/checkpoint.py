"""An open checkpoint: a file or a folder of shards, checked and ready to read.

Specification: *Loading*.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial, wraps
from itertools import repeat
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    ReplacedError,
    errors_of,
    shorten,
)
from pytree2safetensors._format.digests import read_digests
from pytree2safetensors._format.header import (
    LENGTH_BYTES,
    Tensors,
    check_data,
    check_header,
    header_length,
    parse,
)
from pytree2safetensors._format.note import NOTE, Note, is_reserved, read_note
from pytree2safetensors._format.tensor import TensorInfo, check_kind
from pytree2safetensors._leaves.spec import LeafSpec, spec_of
from pytree2safetensors._load.locate import (
    Index,
    is_index,
    locate,
    locate_remotely,
    read_index,
)
from pytree2safetensors._storage.byte_source import ByteSource, PathLike, Readable
from pytree2safetensors._storage.file_source import (
    descriptors_to_keep,
    is_exhausted,
    open_source,
    shut,
)
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.remote_file import RemoteSource
from pytree2safetensors._storage.remote_path import RemotePath, hide_credentials, resolve
from pytree2safetensors._storage.stream_source import open_stream
from pytree2safetensors._tree.claims import check_nodes
from pytree2safetensors._tree.keypath import string2keypath

_PIECE = 8 << 20  # bytes to read at once; a multiple of every item size
_HEAD = 1 << 16  # bytes: the first read has nearly every header
_KEPT = descriptors_to_keep()  # shards that stay open
_ATTEMPTS = 5  # to open shards, or to load; only savers in a loop need more than two
Params = ParamSpec("Params")
R = TypeVar("R")
Place: TypeAlias = tuple[ByteSource, int]  # of the bytes of a tensor


class OpenCheckpoint:
    """A file or a folder of shards: its tensors and where they are, metadata, and the note.

    Attributes:
        label: Its name in messages.
        infos: How each leaf is stored, by name, including leaves without a tensor.
        places: Where the tensors are, in the order of their data.
        metadata: The metadata as stored.
        note: The kinds of nodes and leaves.
        digests: The digest of each tensor, if the file has digests.
    """

    def __init__(self, label: str, sources: Iterable[ByteSource]) -> None:
        self.label = label
        self.sources = list(sources)
        self.infos: dict[str, TensorInfo] = {}
        self.places: dict[str, Place] = {}
        self._logical: dict[int, LeafSpec] = {}
        self.metadata: dict[str, str] = {}
        self.note = Note({}, {})
        self.digests: Mapping[str, str] | None = None

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with closing(self):
            if kind is None:
                for source in self.sources:
                    source.verify()

    def close(self) -> None:
        """Close all sources, even if one of them raises an error."""
        with ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)

    @property
    def in_flight(self) -> int:
        """Return how many reads to have in progress; 0 if the number of cores decides."""
        return max((source.in_flight for source in self.sources), default=0)

    @collector_paused()
    def add(self, source: ByteSource, start: int, tensors: Tensors) -> None:
        """Add the tensors of a file whose data starts at `start`."""
        offsets = [start + begin for begin in tensors.starts]
        self.infos.update(zip(tensors.names, tensors.infos, strict=True))
        self.places.update(zip(tensors.names, zip(repeat(source), offsets), strict=True))

    @collector_paused()
    def read_metadata(self, metadata: dict[str, str]) -> None:
        """Check the metadata against the tensors, and add it."""
        self.metadata = metadata
        self.digests = read_digests(metadata, self.infos, self.label)
        self.note = read_note(metadata.get(NOTE), self.label)
        for name, kind in self.note.leaves.items():
            info = self.infos.get(name)
            if isinstance(kind, list) and kind[0] in {"int", "str"}:
                if info is not None:
                    raise FileFormatError(
                        f"{self.label} has a tensor {shorten(name)}, but its note says that there is none"
                    )
                _check_path(name, self.label)
                self.infos[name] = TensorInfo("", (), 0, kind)
            elif info is None:
                raise FileFormatError(
                    f"the note of {self.label} names {shorten(name)}, which is not a tensor"
                )
            else:
                with errors_of(self.label):
                    check_kind(kind, info.dtype, info.shape, name)
                self.infos[name] = info._replace(kind=kind)
        check_nodes(self.note.nodes, self.infos, self.label)

    def own_metadata(self) -> dict[str, str]:
        """Return the metadata without the entries of this package, except `format`."""
        return {key: value for key, value in self.metadata.items() if not is_reserved(key)}

    def spec_of(self, name: str) -> LeafSpec:
        """Return the leaf with this name, without its values."""
        info = self.infos[name]
        found = self._logical.get(id(info))  # equal tensors share their info
        if found is None:
            with errors_of(self.label):
                found = self._logical[id(info)] = spec_of(info, name)
        return found

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a tensor in order."""
        source, offset = self.places[name]
        nbytes = self.infos[name].nbytes
        for start in range(0, nbytes, _PIECE):
            yield np.frombuffer(source.read(offset + start, min(_PIECE, nbytes - start)), np.uint8)


def _check_path(name: str, label: str) -> None:
    """Raise an error if a leaf in the note has a name that no save writes."""
    try:
        string2keypath(name)
    except KeyPathError as error:
        raise FileFormatError(f"the note of {label} has an impossible leaf: {error}") from None


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
    *others, last = locate_remotely(path)
    for found in others:
        with suppress(FileNotFoundError):
            return _open_found(found)
    try:
        return _open_found(last)
    except FileNotFoundError:
        if not others:
            raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), hide_credentials(path.url))


def _open_found(path: RemotePath) -> OpenCheckpoint:
    return _open_shards(path) if is_index(path) else _open_file(open_source(path))


def _open_path(path: str) -> OpenCheckpoint:
    """Open the checkpoint that a path means. Try again if a save has replaced it."""
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
    store = OpenCheckpoint(source.label, [source])
    return _opened(store, lambda: _read_file(store, source))


def _replaced_again(path: str | RemotePath) -> FileFormatError:
    label = path.label if isinstance(path, RemotePath) else shorten(path)
    return FileFormatError(f"{label} is being replaced by another save; load it after that")


def _open_shards(path: str | RemotePath) -> OpenCheckpoint:
    """Open the shards of an index; try again if a save replaces them."""
    for _ in range(_ATTEMPTS):
        index = read_index(path)
        with closing(index.source):
            store = OpenCheckpoint(index.label, [])
            try:
                _opened(store, partial(_read_shards, store, index))
            except (FileFormatError, OSError):
                if index.is_current():
                    raise
            else:
                if index.is_current():
                    return store
                store.close()
    raise _replaced_again(path)


def _read_shards(store: OpenCheckpoint, index: Index) -> None:
    for shard, source in _sources(store, index):
        store.sources.append(source)
        start, tensors, _ = read_header(source)
        index.check(shard, tensors.names)
        tensors = tensors.keep(index.shards[shard])
        if len(store.sources) > _KEPT:
            shut(source)
        store.add(source, start, tensors)
    store.read_metadata(index.metadata)


def _sources(store: OpenCheckpoint, index: Index) -> Iterator[tuple[str, ByteSource]]:
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
            if not is_exhausted(error):
                raise
            for kept in store.sources:
                shut(kept)
            yield shard, index.open(shard)


def _opened(store: OpenCheckpoint, read: Callable[[], Any]) -> OpenCheckpoint:
    """Read into a checkpoint, and close it if that fails."""
    try:
        read()
    except BaseException:
        store.close()
        raise
    return store


def _read_file(store: OpenCheckpoint, source: ByteSource) -> None:
    start, tensors, metadata = read_header(source)
    store.add(source, start, tensors)
    store.read_metadata(metadata)


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

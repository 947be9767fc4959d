"""What is stored: a file, opened and checked, ready to give its tensors."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors import _digest, _hub
from pytree2safetensors._errors import FileFormatError, KeyPathError, errors_of, shorten
from pytree2safetensors._keypath import string2keypath
from pytree2safetensors._layout import (
    LENGTH_BYTES,
    Tensors,
    check_data,
    check_header,
    header_length,
    parse,
)
from pytree2safetensors._leaf import Form, Logical, check_kind, logical
from pytree2safetensors._source import PathLike, Readable, Source, open_source
from pytree2safetensors._structure import NOTE, Note, is_reserved, read_note

_PIECE = 8 << 20  # bytes of a tensor that are read at once; a multiple of every item size
_HEAD = 1 << 16  # bytes: nearly every header is read with the first call
_KEPT = 100  # shards that stay open; systems allow a process 256 files, or 1,024
_ATTEMPTS = 5  # at opening shards; only savers in a loop need more than two


Place: TypeAlias = tuple[Source, int]  # where the bytes of a tensor are


class Store:
    """A file, or a folder of shards: forms and places of tensors, metadata, and the note.

    Attributes:
        label: What messages call it.
        forms: What is stored of each leaf, by name, leaves without a tensor included.
        places: Where the tensors are, in the order of their data.
        metadata: The metadata as stored.
        note: What it says of nodes and leaves.
        digests: The digest of each tensor, where the file has them.
    """

    def __init__(self, label: str, sources: Iterable[Source]) -> None:
        self.label = label
        self.sources = list(sources)
        self.forms: dict[str, Form] = {}
        self.places: dict[str, Place] = {}
        self._logical: dict[int, Logical] = {}
        self.metadata: dict[str, str] = {}
        self.note = Note({}, {})
        self.digests: Mapping[str, str] | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for source in self.sources:
            source.close()

    def add(self, source: Source, start: int, tensors: Tensors) -> None:
        """Take in the tensors of a file whose data begin at `start`."""
        offsets = [start + begin for begin in tensors.starts]
        self.forms.update(zip(tensors.names, tensors.forms, strict=True))
        self.places.update(zip(tensors.names, zip(repeat(source), offsets), strict=True))

    def read_metadata(self, metadata: dict[str, str]) -> None:
        """Check the metadata against the tensors, and take them in."""
        self.metadata = metadata
        self.digests = _digest.read_digests(metadata, self.forms, self.label)
        self.note = read_note(metadata.get(NOTE), self.label)
        for name, kind in self.note.leaves.items():
            form = self.forms.get(name)
            if isinstance(kind, list) and kind[0] in {"int", "str"}:
                if form is not None:
                    raise FileFormatError(
                        f"{self.label} has a tensor {shorten(name)}, and a note that it has none"
                    )
                _check_path(name, self.label)
                self.forms[name] = Form("", (), 0, kind)
            elif form is None:
                raise FileFormatError(
                    f"the note of {self.label} speaks of {shorten(name)}, which is no tensor"
                )
            else:
                with errors_of(self.label):
                    check_kind(kind, form.dtype, form.shape, name)
                self.forms[name] = form._replace(kind=kind)

    def own_metadata(self) -> dict[str, str]:
        """The metadata without what this package adds, but for `format`."""
        return {key: value for key, value in self.metadata.items() if not is_reserved(key)}

    def logical(self, name: str) -> Logical:
        """The leaf that is stored under a name, without its values."""
        form = self.forms[name]
        found = self._logical.get(id(form))  # tensors of one dtype and shape share their form
        if found is None:
            with errors_of(self.label):
                found = self._logical[id(form)] = logical(form, name)
        return found

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a tensor in order."""
        source, offset = self.places[name]
        nbytes = self.forms[name].nbytes
        for start in range(0, nbytes, _PIECE):
            yield np.frombuffer(source.read(offset + start, min(_PIECE, nbytes - start)), np.uint8)


def _check_path(name: str, label: str) -> None:
    """Refuse what only a note can give a name that no save spells."""
    try:
        string2keypath(name)
    except KeyPathError as error:
        raise FileFormatError(f"the note of {label} has a leaf that no tree has: {error}") from None


def open_store(path: PathLike | Readable, mmap: bool = False) -> Store:
    """Open a file, a file object (unless it shall be mapped), a folder of shards or its index."""
    if mmap and not isinstance(path, str | os.PathLike):
        raise ValueError("mmap=True maps a file on disk; load a file object without it")
    if isinstance(path, str | os.PathLike):
        path = _hub.locate(os.fsdecode(path))
        if _hub.is_index(path):
            return _open_shards(path)
    source = open_source(path)
    store = Store(source.label, [source])
    return _opened(store, lambda: _read_file(store, source))


def _open_shards(path: str) -> Store:
    """Open the shards that an index names; again where a save replaces them meanwhile."""
    for _ in range(_ATTEMPTS):
        index = _hub.read_index(path)
        with closing(index.source):
            store = Store(index.label, [])
            try:
                _opened(store, partial(_read_shards, store, index))
            except (FileFormatError, OSError):
                if index.is_current():
                    raise
            else:
                if index.is_current():
                    return store
                store.__exit__(None, None, None)
    raise FileFormatError(f"{shorten(path)} is being replaced by another save; load it after that")


def _read_shards(store: Store, index: _hub.Index) -> None:
    for shard in index.shards:
        source = index.open(shard)
        store.sources.append(source)
        start, tensors, _ = read_header(source)
        index.check(shard, tensors.names)
        if len(store.sources) > _KEPT:
            source = store.sources[-1] = index.shut(shard, source)
        store.add(source, start, tensors)
    store.read_metadata(index.metadata)


def _opened(store: Store, read: Callable[[], Any]) -> Store:
    """Read into a store; close it where that fails."""
    try:
        read()
    except BaseException:
        store.__exit__(None, None, None)
        raise
    return store


def _read_file(store: Store, source: Source) -> None:
    start, tensors, metadata = read_header(source)
    store.add(source, start, tensors)
    store.read_metadata(metadata)


def read_header(source: Source) -> tuple[int, Tensors, dict[str, str]]:
    """Where the data of a file begin, its tensors and its metadata."""
    head = source.read(0, min(_HEAD, source.measure(LENGTH_BYTES)))
    length = header_length(bytes(head[:LENGTH_BYTES]), source.label)
    start = LENGTH_BYTES + length
    check_header(length, source.measure(start), source.label)
    header = head[LENGTH_BYTES:start]
    if len(header) < length:
        header += source.read(len(head), start - len(head))
    tensors, metadata = parse(bytes(header), source.label)
    data_size = source.measure(start + tensors.size) - start
    check_data(tensors.size, data_size, source.label)
    return start, tensors, metadata

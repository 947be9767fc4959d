"""File objects: reading from them and writing to them.

Specification: *Errors*.
"""

import errno
import gzip
import io
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from operator import index
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import PIECE, ByteSource
from pytree2safetensors._storage.descriptor import cut_chunks
from pytree2safetensors._storage.locations import Readable, Writable
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._types import Chunk


class ForwardSource(ByteSource):
    """A stream that cannot seek. All that was read from it is kept in memory."""

    def __init__(self, label: str, file: Any) -> None:
        super().__init__(label, 0)
        self.file, self.content = file, bytearray()

    def measure(self, end: int) -> int:
        while self.size <= end:
            piece = _checked_bytes(self.file.read(min(PIECE, end + 1 - self.size)), self.label)
            if not piece:
                break
            self.content += piece
            self.size = len(self.content)
        return self.size

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        piece = memoryview(self.content)[offset : offset + len(buffers[0])]
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        return np.frombuffer(bytes(self.content), np.uint8)


class _Stream(ByteSource):
    """A file object that can seek, from its current position."""

    in_flight = 1  # in order: a compressed file begins again to seek backwards

    def __init__(self, label: str, file: Any) -> None:
        self.file, self.start = file, file.tell()
        file.seek(0, os.SEEK_END)  # may return nothing
        super().__init__(label, max(0, file.tell() - self.start))
        self.lock = threading.Lock()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        with self.lock:
            self.file.seek(self.start + offset)
            piece = _checked_bytes(self.file.read(len(buffers[0])), self.label)
        piece = memoryview(piece)[: len(buffers[0])]  # it may be more
        buffers[0][: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        with suppress(ValueError):  # the caller may have closed it
            self.file.seek(self.start + self.size)


def open_stream(file: Readable) -> ByteSource:
    """Open a file object for reading, from its current position."""
    label = _label_of(file)
    _check_open(file, label, "readable", "reading")
    if _is_text(file):  # some bytes may not be text
        raise _no_bytes(str, label)
    if not _can_seek(file):
        return ForwardSource(label, file)
    try:
        source = _Stream(label, file)
    except ValueError:  # fsspec has streams that say yes
        return ForwardSource(label, file)
    if source.start and not source.size:
        raise FileFormatError(
            f"{label} has 0 bytes after its position; seek to the start of the data"
        )
    return source


def _can_seek(file: Any) -> bool:
    # A GzipFile always says yes, but it can seek only as the file below it can.
    below: Any = file.fileobj if isinstance(file, gzip.GzipFile) else file
    try:
        return bool(below.seekable())
    except AttributeError:  # also that of a file in an archive that tarfile streams
        return False


def _is_text(file: Any) -> bool:
    """Return whether a file object takes and gives text, even if it delegates to one that does."""
    return isinstance(file, io.TextIOBase) or isinstance(getattr(file, "encoding", None), str)


def _check_open(file: Any, label: str, ability: str, purpose: str) -> None:
    """Raise an error for a file object that is closed, or open only for the other direction."""
    if getattr(file, "closed", False) is True:
        raise ValueError(f"{label} is closed; open it for {purpose}")
    kind = type(file)
    # A class outside of `io` may inherit a method that says no, and can read or write all the same.
    inherits = getattr(kind, ability, None) is getattr(io.IOBase, ability)
    if inherits and kind.__module__ != "_io":
        return
    if getattr(file, ability, lambda: True)() is False:
        raise io.UnsupportedOperation(
            f"{label} is not open for {purpose}; open it again for {purpose}"
        )


def _checked_bytes(content: Any, label: str) -> bytes | bytearray | memoryview:
    if not isinstance(content, bytes | bytearray | memoryview):
        raise _no_bytes(type(content), label)
    if isinstance(content, memoryview) and (content.format, content.ndim) != ("B", 1):
        return content.tobytes()
    return content


def _no_bytes(kind: type, label: str) -> TypeError:
    remedy = "let it wait for data" if kind is type(None) else "open it in binary mode"
    return TypeError(f"{label} gives {kind.__name__}, not bytes; {remedy}")


def _label_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return shorten(name) if isinstance(name, str) else f"the {type(file).__name__}"


def write_stream(
    file: Writable, chunks: Iterable[Chunk], size: int, progress: Progress | None
) -> None:
    """Write adjacent chunks to a file object, which may write only a part at a time."""
    if _is_text(file):
        raise TypeError(f"{type(file).__name__} takes text, not bytes; open it in binary mode")
    _check_open(file, _label_of(file), "writable", "writing")
    report = Report(progress, size)
    for _, piece in cut_chunks(chunks, size):
        _write_all(file, piece)
        report.add(len(piece))
        del piece  # the next one may need the memory
    flush = getattr(file, "flush", None)
    if flush is not None:
        flush()
    report.finish()


def _write_all(file: Writable, piece: memoryview) -> None:
    while len(piece):
        count = file.write(piece)  # type: ignore[arg-type] # what takes bytes takes a memoryview
        piece = piece[_taken(file, count, len(piece)) :]


def _taken(file: Writable, count: Any, size: int) -> int:
    """Return how many of `size` bytes a file object has written, from what its `write` returned."""
    if count is None and not isinstance(file, io.RawIOBase):
        return size
    if not count:
        raise OSError(errno.EIO, "the file object wrote nothing")
    if (
        isinstance(count, bool)
        or not isinstance(count, SupportsIndex)
        or not 0 < index(count) <= size
    ):
        said = f"returned {count!r} from write, not how many of {size} bytes it wrote"
        raise OSError(errno.EIO, f"{_label_of(file)} {said}")
    return index(count)

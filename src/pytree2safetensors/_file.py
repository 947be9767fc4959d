"""Bytes in and out of files. Nothing else in the package opens a file."""

import errno
import io
import mmap
import os
import secrets
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, shorten

if sys.platform != "win32":
    import fcntl


@runtime_checkable
class Readable(Protocol):
    """A binary file object, open for reading."""

    def read(self, size: int = -1, /) -> bytes:
        """Read bytes."""
        ...


@runtime_checkable
class Writable(Protocol):
    """A binary file object, open for writing."""

    def write(self, data: Any, /) -> Any:
        """Write bytes."""
        ...


PathLike: TypeAlias = str | os.PathLike[str]
Progress: TypeAlias = Callable[[int, int], object]

TEMPORARY: Final = ".pytree2safetensors-"  # what the names of unfinished files begin with
_PIECE: Final = 8 << 20  # bytes of one read
_VECTORS: Final = 512  # buffers of one system call; the least that systems allow is 1024
_STEP: Final = 64 << 20  # bytes of one write, and between two reports of progress
_LINKS: Final = 40  # symbolic links in a row, as many as Linux follows
_PREALLOCATED: Final = 8 << 20  # bytes: from here on reserving the space first is faster


# --- reading ----------------------------------------------------------------------------------


class Source:
    """A file to read at any position, from any thread."""

    def __init__(self, label: str, size: int) -> None:
        self.label, self.size = label, size

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        """Read into buffers, in order; how many bytes arrived."""
        raise NotImplementedError

    def map(self) -> NDArray[np.uint8]:
        """The whole file as read-only memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file."""

    def fill(self, buffers: list[memoryview], offset: int) -> None:
        """Fill buffers with what stands at `offset`."""
        while buffers:
            count = self.read_into(buffers, offset)
            if count <= 0:
                raise FileFormatError(f"{self.label} became shorter while it was read")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def read(self, offset: int, size: int) -> bytearray:
        """Read a piece, whole."""
        piece = bytearray(size)
        if size:
            self.fill([memoryview(piece)], offset)
        return piece


class _Descriptor(Source):
    """A regular file."""

    def __init__(self, label: str, size: int, descriptor: int) -> None:
        super().__init__(label, size)
        self.descriptor = descriptor
        self.lock = threading.Lock()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, buffers, offset)
        with self.lock:  # a system without positioned reads
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            piece = os.read(self.descriptor, len(buffers[0]))
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        if not self.size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ), np.uint8)

    def close(self) -> None:
        os.close(self.descriptor)


class _Memory(Source):
    """What came from a stream that cannot seek."""

    def __init__(self, label: str, content: bytes) -> None:
        super().__init__(label, len(content))
        self.content = memoryview(content)

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        piece = self.content[offset : offset + len(buffers[0])]
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.content, np.uint8)


class _Stream(Source):
    """A file object that can seek, from its present position on."""

    def __init__(self, label: str, file: Any) -> None:
        self.file, self.start = file, file.tell()
        super().__init__(label, max(0, file.seek(0, os.SEEK_END) - self.start))
        self.lock = threading.Lock()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        with self.lock:
            self.file.seek(self.start + offset)
            piece = _checked_bytes(self.file.read(len(buffers[0])), self.label)
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        raise ValueError("mmap=True maps a file on disk; load a file object without it")

    def close(self) -> None:
        with suppress(ValueError):  # the caller may have closed it
            self.file.seek(self.start + self.size)


def open_source(path: PathLike | Readable) -> Source:
    """Open a file, or a file object, for reading."""
    if isinstance(path, str | os.PathLike):
        return _open_path(os.fspath(path))
    label = _label_of(path)
    seekable = getattr(path, "seekable", None)
    if seekable is not None and seekable():
        return _Stream(label, path)
    return _Memory(label, _checked_bytes(path.read(), label))


def _checked_bytes(content: Any, label: str) -> bytes:
    if not isinstance(content, bytes):
        raise TypeError(
            f"{label} gives {type(content).__name__}, not bytes; open it in binary mode"
        )
    return content


def _label_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return shorten(name) if isinstance(name, str) else f"the {type(file).__name__}"


def _open_path(path: str) -> Source:
    label = shorten(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if stat.S_ISREG(status.st_mode):
            return _Descriptor(label, status.st_size, descriptor)
        with os.fdopen(os.dup(descriptor), "rb") as file:  # a pipe, read to its end
            source = _Memory(label, file.read())
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return source


class Read(NamedTuple):
    """A range of a source, and the memory that it goes to."""

    source: Source
    offset: int
    buffer: memoryview


def fetch(reads: Iterable[Read], progress: Progress | None = None) -> None:
    """Carry out reads, neighbouring ones together, large ones by several threads."""
    batches = list(_batches(reads))
    total = sum(size for _, _, _, size in batches)
    report = Report(progress, total)
    workers = min(4, os.cpu_count() or 1, len(batches))

    def run(batch: tuple[Source, int, list[memoryview], int]) -> None:
        source, offset, buffers, size = batch
        source.fill(buffers, offset)
        report.add(size)

    if workers <= 1 or total < _PIECE:
        for batch in batches:
            run(batch)
    else:
        with ThreadPoolExecutor(workers, "pytree2safetensors-read") as pool:
            for _ in pool.map(run, batches):
                pass
    report.finish()


def _batches(reads: Iterable[Read]) -> Iterator[tuple[Source, int, list[memoryview], int]]:
    """Join reads that follow each other in the file, and cut those that are long."""
    source, start, buffers, size = None, 0, [], 0  # type: tuple[Source | None, int, list[memoryview], int]
    for read in reads:
        buffer, offset = read.buffer, read.offset
        if source is not read.source or start + size != offset:
            if source is not None and size:
                yield source, start, buffers, size
            source, start, buffers, size = read.source, offset, [], 0
        while len(buffer):
            taken = buffer[: _PIECE - size]
            buffers.append(taken)
            size += len(taken)
            buffer = buffer[len(taken) :]
            if size == _PIECE or len(buffers) == _VECTORS:
                yield read.source, start, buffers, size
                start, buffers, size = start + size, [], 0
    if source is not None and size:
        yield source, start, buffers, size


class Report:
    """Tells a caller how far the work is, at least every `_STEP` bytes and at the end."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.told = 0, 0
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.progress is None:
            return
        with self.lock:
            self.done += count
            if self.done - self.told >= _STEP // 2 and self.done < self.total:
                self.told = self.done
                self.progress(self.done, self.total)

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(self.total, self.total)


# --- writing ----------------------------------------------------------------------------------


def write_stream(
    file: Writable, pieces: Iterable[memoryview], size: int, progress: Progress | None = None
) -> None:
    """Write bytes to a file object, as far as it takes them."""
    report = Report(progress, size)
    for piece in _cut(pieces):
        rest = piece
        while len(rest):
            count = file.write(rest)
            if count == 0 or (count is None and isinstance(file, io.RawIOBase)):
                raise OSError(errno.EIO, "the file object wrote nothing")
            rest = rest[len(rest) if count is None else count :]
        report.add(len(piece))
    flush = getattr(file, "flush", None)
    if flush is not None:
        flush()
    report.finish()


def write_file(
    path: PathLike,
    pieces: Iterable[memoryview],
    size: int,
    *,
    durable: bool,
    progress: Progress | None = None,
) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path, durable=durable) as descriptor:
        write_pieces(descriptor, pieces, size, progress)


def write_pieces(
    descriptor: int, pieces: Iterable[memoryview], size: int, progress: Progress | None = None
) -> None:
    """Write bytes to a descriptor in few large calls."""
    report = Report(progress, size)
    preallocate(descriptor, size)
    for piece in _cut(pieces):
        _write_all(descriptor, piece)
        report.add(len(piece))
    report.finish()


def preallocate(descriptor: int, size: int) -> None:
    """Reserve the space of a large file, where the file system can."""
    if size < _PREALLOCATED or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV, errno.ESPIPE}:
            raise


def _cut(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, len(piece), _STEP):
            yield piece[start : start + _STEP]


def _write_all(descriptor: int, piece: memoryview) -> None:
    while len(piece):
        count = os.write(descriptor, piece)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        piece = piece[count:]


@contextmanager
def replacing(path: PathLike, *, durable: bool, name: str | None = None) -> Iterator[int]:
    """A descriptor to write to; its content takes the place of the file when all went well.

    Until then the file has the given name, beside the one it replaces.
    """
    try:
        target = _followed(os.fspath(path))
        try:
            status = os.stat(target)
        except FileNotFoundError:
            status = None
        if status is not None and not stat.S_ISREG(status.st_mode):
            with _special(target) as descriptor:
                yield descriptor
            return
        folder = os.path.dirname(target)
        temporary = os.path.join(folder, name or temporary_name())
        with ExitStack() as undo:
            undo.callback(discard, temporary)
            descriptor = create(temporary, status)
            closing = undo.enter_context(_Closing(descriptor))
            yield descriptor
            if durable:
                os.fsync(descriptor)
            closing.close()
            os.replace(temporary, target)
            undo.pop_all()
        if durable:
            flush_folder(folder)
    except OSError as error:
        raise named(error, path) from error


@contextmanager
def joining(path: PathLike, name: str) -> Iterator[int]:
    """A descriptor of the file that another process has under way, in `replacing` the same path."""
    try:
        target = _followed(os.fspath(path))
        flags = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_BINARY", 0)
        descriptor = os.open(os.path.join(os.path.dirname(target), name), flags)
        with _Closing(descriptor) as closing:
            yield descriptor
            closing.close()
    except OSError as error:
        raise named(error, path) from error


def reserve(descriptor: int, size: int) -> None:
    """Give a new file its size, and its space where the file system can."""
    preallocate(descriptor, size)
    os.ftruncate(descriptor, size)


def flush(descriptor: int) -> None:
    """Bring what was written to the disk."""
    os.fsync(descriptor)


def write_at(descriptor: int, piece: memoryview, offset: int) -> None:
    """Write bytes to a place of their own; what lies before it may be written later."""
    while len(piece):
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, piece[:_STEP], offset)
        else:  # a system without positioned writes
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, piece[:_STEP])
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        piece, offset = piece[count:], offset + count


def is_special(path: PathLike) -> bool:
    """Whether there is something that is not a regular file."""
    return os.path.exists(path) and not os.path.isfile(path)


def _followed(path: str) -> str:
    """Where a path leads, there or not: a symbolic link stays, and its target is replaced."""
    if path and not os.path.isabs(path):  # an empty path stays what no file has
        path = os.path.join(os.getcwd(), path)
    for _ in range(_LINKS):
        try:
            link = os.readlink(path)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOENT}:  # no link, or nothing at all
                return path
            raise
        path = os.path.join(os.path.dirname(path), link)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def write_new(
    path: str,
    pieces: Iterable[memoryview],
    size: int,
    *,
    like: os.stat_result | None,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write a file where there is none."""
    descriptor = create(path, like)
    with _Closing(descriptor) as closing:
        write_pieces(descriptor, pieces, size, progress)
        if durable:
            os.fsync(descriptor)
        closing.close()


def temporary_in(folder: str) -> str:
    """A name in a folder that nothing has."""
    return os.path.join(folder, temporary_name())


def temporary_name() -> str:
    """A name that no file has."""
    return f"{TEMPORARY}{secrets.token_hex(8)}.tmp"


def create(path: str, like: os.stat_result | None = None) -> int:
    """Create a file with the permissions that `open` gives, or those of the file it replaces."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_BINARY", 0)
    # Until it has its permissions nobody else may open it.
    descriptor = os.open(path, flags, 0o666 if like is None else 0o600)
    if like is not None:
        try:
            if hasattr(os, "fchown") and (os.geteuid(), os.getegid()) != (like.st_uid, like.st_gid):
                with suppress(PermissionError):  # giving files away is for the superuser
                    os.fchown(descriptor, like.st_uid, like.st_gid)
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
        except BaseException:
            os.close(descriptor)
            discard(path)
            raise
    return descriptor


class _Closing:
    """Closes a descriptor once."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor

    def __enter__(self) -> "_Closing":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.close()

    def close(self) -> None:
        if self.descriptor is not None:
            descriptor, self.descriptor = self.descriptor, None
            os.close(descriptor)


@contextmanager
def _special(path: str) -> Iterator[int]:
    """What is not a regular file (a device, a pipe) is written to, not replaced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def discard(path: str) -> None:
    """Remove a file, if that can be done."""
    with suppress(OSError):
        os.unlink(path)


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other savers out of a folder, where the system has locks."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with _Closing(descriptor):
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def flush_folder(folder: str) -> None:
    """Make a rename last, where the system can flush a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such flush
            raise
    finally:
        os.close(descriptor)


def named(error: OSError, path: PathLike) -> OSError:
    """The same error, naming the file that the caller asked for."""
    if error.errno is None or type(error).__module__ != "builtins":  # not the system's own
        return error
    return OSError(error.errno, error.strerror, os.fspath(path))

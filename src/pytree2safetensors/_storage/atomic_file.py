"""Bytes into files, which appear whole or not at all. `_source` reads; nothing else opens files.

Specification: *Files*.
"""

import errno
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytree2safetensors._storage.byte_source import HasMethod, PathLike
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._types import Chunk

if sys.platform != "win32":
    import fcntl

TEMPORARY: Final = ".pytree2safetensors-"  # what the names of unfinished files begin with
_STEP: Final = 32 << 20  # bytes of one write, so that progress is told often
_LINKS: Final = 40  # symbolic links in a row, as many as Linux follows
_PREALLOCATED: Final = 8 << 20  # bytes: from here on reserving the space first is faster


if TYPE_CHECKING:

    class Writable(Protocol):
        """A binary file object, open for writing."""

        def write(self, data: Any, /) -> Any:
            """Write bytes."""
            ...
else:

    class Writable(metaclass=HasMethod):
        """A binary file object, open for writing."""

        method = "write"


def write_stream(
    file: Writable, chunks: Iterable[Chunk], size: int, progress: Progress | None = None
) -> None:
    """Write chunks that follow each other to a file object, as far as it takes them."""
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{type(file).__name__} takes text, not bytes; open it in binary mode")
    report = Report(progress, size)
    for _, piece in _cut(chunks):
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
    chunks: Iterable[Chunk],
    size: int,
    *,
    durable: bool,
    progress: Progress | None = None,
) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path, durable=durable) as descriptor:
        write_chunks(descriptor, chunks, size, progress)


def write_chunks(
    descriptor: int, chunks: Iterable[Chunk], size: int, progress: Progress | None = None
) -> None:
    """Write bytes to a descriptor in few large calls."""
    report = Report(progress, size)
    preallocate(descriptor, size)
    position = 0
    for offset, piece in _cut(chunks):
        if offset != position:
            os.lseek(descriptor, offset, os.SEEK_SET)
        _write_all(descriptor, piece)
        position = offset + len(piece)
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


def _cut(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for offset, piece in chunks:
        for start in range(0, len(piece), _STEP):
            yield offset + start, piece[start : start + _STEP]


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
        if is_special(path):
            with _special(os.fsdecode(path)) as descriptor:
                yield descriptor
            return
        target = _followed(os.fsdecode(path))
        try:
            status = os.stat(target)
        except FileNotFoundError:
            status = None
        folder = os.path.dirname(target)
        temporary = os.path.join(folder, name or temporary_name())
        with _lasting(folder) if durable else nullcontext(), ExitStack() as undo:
            undo.callback(discard, temporary)
            descriptor = create(temporary, status)
            closing = undo.enter_context(_Closing(descriptor))
            yield descriptor
            if durable:
                flush(descriptor)
            closing.close()
            os.replace(temporary, target)
            undo.pop_all()
    except OSError as error:
        raise named(error, path) from error


@contextmanager
def joining(path: PathLike, name: str) -> Iterator[int]:
    """A descriptor of the file that another process has under way, in `replacing` the same path."""
    try:
        target = _followed(os.fsdecode(path))
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
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
    """Bring what was written to the disk, and not just to the disk's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system that cannot
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
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
    """Whether there is something that nothing can take the place of."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):  # a device, a pipe, a folder
        return True
    target = _followed(os.fsdecode(path))
    # What Linux says of a file without a name, which a link of the kind of /dev/fd/3 leads to.
    return target.endswith(" (deleted)") and not os.path.lexists(target)


def absolute(path: str) -> str:
    """The path from the root, otherwise as it is: one that ends in "/" still does."""
    # An empty path stays what no file has.
    return os.path.join(os.getcwd(), path) if path and not os.path.isabs(path) else path


def _followed(path: str) -> str:
    """Where a path leads, there or not: a symbolic link stays, and its target is replaced."""
    path = absolute(path)
    for _ in range(_LINKS):
        try:
            link = os.readlink(path)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOENT}:  # no link, or nothing at all
                return path
            raise
        path = os.path.join(os.path.dirname(path), link)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


@contextmanager
def creating_file(path: str, like: os.stat_result | None, *, durable: bool) -> Iterator[int]:
    """A descriptor of a new file, which is flushed and closed when all went well."""
    descriptor = create(path, like)
    with _Closing(descriptor) as closing:
        yield descriptor
        if durable:
            flush(descriptor)
        closing.close()


def temporary_in(folder: str) -> str:
    """A name in a folder that nothing has."""
    return os.path.join(folder, temporary_name())


def temporary_name() -> str:
    """A name that no file has."""
    return f"{TEMPORARY}{secrets.token_hex(8)}.tmp"


def create(path: str, like: os.stat_result | None = None) -> int:
    """Create a file with the permissions that `open` gives, or those of the file it replaces."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # Until it has its permissions nobody else may open it.
    descriptor = os.open(path, flags, 0o666 if like is None else 0o600)
    if like is not None:
        try:
            if sys.platform != "win32":
                if (os.geteuid(), os.getegid()) != (like.st_uid, like.st_gid):
                    with suppress(PermissionError):  # giving files away is for the superuser
                        os.fchown(descriptor, like.st_uid, like.st_gid)
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
    """What nothing can take the place of is written to."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
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
    else:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with _Closing(descriptor):
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:  # not by closing alone: a process that was forked meanwhile has it open, too
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)


def flush_folder(folder: str) -> None:
    """Make renames last that were done in a folder."""
    with _lasting(folder):
        pass


@contextmanager
def _lasting(folder: str) -> Iterator[None]:
    """Make a rename last, where the system can flush a folder; where it may not, none is done."""
    if not hasattr(os, "O_DIRECTORY"):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with _Closing(descriptor) as closing:
        yield
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has no such flush
                raise
        closing.close()


def named(error: OSError, path: PathLike) -> OSError:
    """The same error, naming the file that the caller asked for."""
    if error.errno is None or type(error).__module__ != "builtins":  # not the system's own
        return error
    return OSError(error.errno, error.strerror, os.fsdecode(path))

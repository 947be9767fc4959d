"""Reading and writing a file in a store, through fsspec."""

import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Final

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.descriptor import cut_chunks
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.remote_path import RemotePath, hide_credentials, raise_with_url
from pytree2safetensors._types import Chunk

_HEAD: Final = 100_000  # bytes that are read first: nearly always the whole header
_LOCK: Final = "_lock_of_pytree2safetensors"
_PINNED: Final = {"s3", "s3a"}  # whose files fsspec reads with If-Match
# What distinguishes an object from its successor, under the names that the stores use: tags, versions
# and digests, then times.
_VERSION: Final = (
    "ETag", "etag", "e_tag", "generation", "VersionId", "version_id", "rev", "unique",
    "Content-MD5", "Digest", "md5Hash", "md5", "checksum", "content_hash",
    "blob_id", "xet_hash", "sha", "hex", "raw_url",
    "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "modified", "modify",
    "modified_at", "modifiedTime", "modificationTime", "timeModified", "server_modified", "created",
)  # fmt: skip
# Errors of aiohttp, asyncio and ftplib that say nothing about a file.
_OUTAGES: Final = {
    "ClientConnectionError": errno.ECONNABORTED,
    "TimeoutError": errno.ETIMEDOUT,
    "error_temp": errno.EIO,
}
_READ_ONLY = "cannot be written to: its store is read-only"


def _turn(fs: Any) -> AbstractContextManager[Any]:
    """Return a lock if a file system can only do one thing at a time, as with one connection."""
    if fs.async_impl or "hf" in fs.protocol:
        return nullcontext()
    # Kept in the instance, because other instances may be equal to it. A caching file system returns
    # the `__dict__` of its class.
    attributes = object.__getattribute__(fs, "__dict__")
    lock: AbstractContextManager[Any] = attributes.setdefault(_LOCK, threading.RLock())
    return lock


@contextmanager
def naming_url(path: RemotePath, missing: str = _READ_ONLY) -> Iterator[None]:
    """Put the URL into the errors of a store, without its credentials.

    `missing` is what the error says if the store lacks what is asked for.
    """
    try:
        with _turn(path.fs):
            yield
    except FileFormatError:
        raise
    except FileNotFoundError as error:
        raise _not_given(path, error.__cause__) from None
    except NotImplementedError:
        raise ValueError(f"{path.label} {missing}") from None
    except Exception as error:  # noqa: BLE001 - it is raised
        if _says_changed(error):
            raise _changed(path) from None
        if isinstance(error, ValueError) and "range requests" in str(error):
            raise _without_ranges(path) from None
        raise_with_url(error, path.url)


def _not_given(path: RemotePath, cause: BaseException | None) -> OSError:
    """Return the error for a file that a store does not give: fsspec calls all such files missing."""
    status = getattr(cause, "status", None)
    code = _code(cause, status, path.is_web)
    said = hide_credentials(str(cause)) or type(cause).__name__
    if status:
        said = f"the server answers {status}"
    if code == errno.ENOENT:
        is_plain = cause is None or isinstance(cause, FileNotFoundError) or status == 404
        said = os.strerror(code) + ("" if is_plain else f" ({said})")
    return OSError(code, said, hide_credentials(path.url))  # of the class for the code


def _code(cause: BaseException | None, status: int | None, is_web: bool) -> int:
    """Return the code of the error: a file is missing only if the server says so."""
    if cause is None or isinstance(cause, FileNotFoundError) or status in {404, 410}:
        return errno.ENOENT
    if status in {401, 403}:
        return errno.EACCES
    for kind in type(cause).__mro__:
        if kind.__name__ in _OUTAGES:
            return _OUTAGES[kind.__name__]
    return errno.EIO if is_web or status else errno.ENOENT


def _says_changed(error: Exception) -> bool:
    """Return whether a request failed because the object is no longer the one that was opened."""
    return getattr(error, "status", None) == 412 or type(error).__name__ == "FileExpired"


def _changed(path: RemotePath) -> FileFormatError:
    return FileFormatError(f"{path.label} was replaced while it was read; load it again")


def _without_ranges(path: RemotePath) -> FileFormatError:
    return FileFormatError(
        f"the server of {path.label} does not support ranges; copy the file, and load the copy"
    )


class RemoteSource(ByteSource):
    """A file in a store. Its first bytes are kept; other ranges are requested when they are read."""

    piece = 16 << 20
    gap = 1 << 20
    in_flight = 24

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        with naming_url(path):
            file, info = _opened(path)
        super().__init__(path.label, info["size"])
        self._file = file
        self._version = _version_of(info)
        self._lock = threading.Lock()
        self._head: bytes | None = None
        self._fetched = 0

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        size = sum(map(len, buffers))
        content = memoryview(self._read(offset, min(offset + size, self.size)))
        for buffer in buffers:
            count = min(len(buffer), len(content))
            buffer[:count] = content[:count]
            content = content[count:]
        return min(size, self.size - offset)

    def _read(self, start: int, stop: int) -> bytes:
        if start < _HEAD:
            with self._lock:
                if self._head is None:
                    self._head = self._fetch(0, min(_HEAD, self.size))
            if stop <= len(self._head):
                return self._head[start:stop]
        return self._fetch(start, stop)

    def _fetch(self, start: int, stop: int) -> bytes:
        self._fetched += 1
        with naming_url(self.path):
            cache = getattr(self._file, "cache", None)
            if cache is None:
                found = self.path.fs.cat_file(self.path.path, start=start, end=stop)
            else:
                # With the arguments by which the store pins the object.
                found = cache.fetcher(start, stop)
        content = bytes(found)
        if len(content) != stop - start:
            raise FileFormatError(
                f"{self.label} gave {len(content):,} bytes for a range of {stop - start:,}: it was "
                "replaced while it was read, or its server does not support ranges; load it again, or load a copy"
            )
        return content

    def is_current(self) -> bool:
        """Return whether the store still has the file that was opened."""
        self.forget()
        return self.is_same()

    def forget(self) -> None:
        """Forget what fsspec remembers of the store."""
        with naming_url(self.path):
            self.path.fs.invalidate_cache()

    def is_same(self) -> bool:
        """Return whether the file that was opened is also the one that the store has, or remembers."""
        try:
            with naming_url(self.path):
                info = self.path.fs.info(self.path.path)
        except FileNotFoundError:
            return False
        # Some stores tell more about one file than about the files of a folder.
        version = _version_of(info)
        both = version.keys() & self._version.keys()
        return info.get("size") == self.size and all(version[k] == self._version[k] for k in both)

    def may_be_mixed(self, is_alone: bool) -> bool:
        """Return whether what was read may belong to several files."""
        # The answer to one request is never a mixture. Web servers may ignore If-Match.
        return (self._fetched > 1 or not is_alone) and not self.path.protocols & _PINNED

    def close(self) -> None:
        close = getattr(self._file, "close", None)
        if close is not None:
            with _turn(self.path.fs):
                close()


def _opened(path: RemotePath) -> tuple[Any, dict[str, Any]]:
    """Open a file with one request. Return it with the information of the store about it."""
    if not path.is_web:
        file = path.fs.open(path.path, "rb", cache_type="none")
        details = getattr(file, "details", None)
        return file, details if isinstance(details, dict) else _sized(path)
    info = _sized(path)
    if info.get("partial") is False:
        raise _without_ranges(path)
    etag = info.get("ETag", "W/")
    own = getattr(path.fs, "kwargs", {}).get("headers", {})  # such as credentials
    options = {} if etag.startswith("W/") else {"headers": {**own, "If-Match": etag}}
    if not info["size"]:
        return None, info
    return path.fs.open(path.path, "rb", size=info["size"], cache_type="none", **options), info


def _sized(path: RemotePath) -> dict[str, Any]:
    """Return the information of the store about a file, which must include its size."""
    info: dict[str, Any] = path.fs.info(path.path)
    if info.get("size") is None:
        raise FileFormatError(
            f"the server of {path.label} does not report its size; copy the file, and load the copy"
        )
    return info


def _version_of(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _VERSION if info.get(key) is not None}


def verify(sources: Sequence[ByteSource]) -> None:
    """Check that what was read from the sources of a checkpoint belongs together.

    Raises:
        FileFormatError: A store has replaced a file since it was opened.
        OSError: The store cannot be asked.
    """
    is_alone = len(sources) == 1
    doubtful = [s for s in sources if isinstance(s, RemoteSource) and s.may_be_mixed(is_alone)]
    for source in doubtful[:1]:  # the others are in the same store
        source.forget()
    with ReadPool(RemoteSource.in_flight) as pool:
        for source, same in zip(doubtful, pool.map(RemoteSource.is_same, doubtful), strict=True):
            if not same.result():
                raise _changed(source.path)


# --- writing ----------------------------------------------------------------------------------


class Pending:
    """A file in a store that is being written.

    It gets its name with `commit`. In stores that write in place, it has its name from the start.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        try:
            transaction = path.fs.transaction
        except NotImplementedError:  # of the Hub, where closing a file commits it
            transaction = None
        options = {} if transaction is None else {"autocommit": False}
        with naming_url(path):
            self._file = path.fs.open(path.path, "wb", **options)
        if transaction is not None:
            with suppress(ValueError):  # only this class commits it
                path.fs.transaction.files.remove(self._file)

    def write(self, piece: memoryview) -> None:
        """Write bytes."""
        with naming_url(self.path):
            self._file.write(piece)

    def finish(self) -> None:
        """Send the rest now, unless that would give the file its name too early."""
        if _commits(self._file) or not self.path.appears_whole:
            with naming_url(self.path):
                self._file.close()

    def commit(self) -> None:
        """Rename the file to its final name."""
        with naming_url(self.path):
            self._file.close()
            if _commits(self._file):
                self._file.commit()
            self.path.fs.invalidate_cache()

    def discard(self) -> None:
        """Remove the written bytes, as far as the store can."""
        file = self._file
        # Files of fsspec send their bytes when they are garbage-collected, unless they are closed.
        with suppress(AttributeError):
            file.closed = True
        with suppress(Exception):
            file.discard()
        local = getattr(file, "temp_file", None)  # where the Hub's client collects what it sends
        if local is not None:
            with suppress(OSError):
                local.close()
                os.remove(local.name)


def _commits(file: Any) -> bool:
    """Return whether closing a file does not give it its name yet."""
    from fsspec.spec import AbstractBufferedFile

    inherited = AbstractBufferedFile.commit  # which does nothing
    commit = getattr(file, "commit", None)
    return commit is not None and getattr(commit, "__func__", None) is not inherited


def write_remote(
    path: RemotePath, chunks: Iterable[Chunk], size: int, progress: Progress | None
) -> None:
    """Write a file that appears whole or not at all, if the store can do that."""
    report = Report(progress, size)
    pending = Pending(path)
    try:
        write_pending(pending, chunks, size, report)
        report.finish()
        pending.commit()
    except BaseException:
        pending.discard()
        raise


def write_pending(pending: Pending, chunks: Iterable[Chunk], size: int, report: Report) -> None:
    """Write chunks that follow each other."""
    for _, piece in cut_chunks(chunks, size):
        pending.write(piece)
        report.add(len(piece))
        del piece  # the next one may need the memory

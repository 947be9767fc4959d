"""Reading a file in a store, through fsspec."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from pytree2safetensors._errors import unread
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.remote_errors import changed, naming_url, turn_of, without_ranges
from pytree2safetensors._storage.remote_path import RemotePath

_HEAD: Final = 100_000  # bytes that are read first: nearly always the whole header
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


class RemoteSource(ByteSource):
    """A file in a store. Its first bytes are kept at first; others are requested when they are read."""

    piece = 16 << 20
    gap = 1 << 20
    in_flight = 24

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        with ExitStack() as undo:
            with naming_url(path):
                self._file, info = _opened(path)
                undo.callback(self.close)
                if info is None:
                    info = path.fs.info(path.path)
                if info.get("type") == "directory":
                    raise IsADirectoryError
            if info.get("size") is None:
                raise unread(
                    f"the server of {path.label} does not report its size; copy the file, and load the copy"
                )
            undo.pop_all()
        super().__init__(path.label, info["size"])
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

    def forget_start(self) -> None:
        """Free the first bytes, which are requested again when they are read."""
        with self._lock:
            self._head = b""

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
            raise unread(
                f"{self.label} gave {len(content):,} bytes for a range of {stop - start:,}: it was "
                "replaced while it was read, or its server does not support ranges; load it again, or load a copy"
            )
        return content

    def is_current(self) -> bool:
        """Return whether the store still has the file that was opened."""
        forget_listings(self.path)
        return self.is_same()

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
            with turn_of(self.path.fs):
                close()


def forget_listings(path: RemotePath) -> None:
    """Forget what fsspec remembers of a store, also from calls of the user. This takes no request."""
    with naming_url(path):
        path.fs.invalidate_cache()


def _opened(path: RemotePath) -> tuple[Any, dict[str, Any] | None]:
    """Open a file with one request. Return it with what the store then tells about it."""
    if not path.is_web:
        try:
            file = path.fs.open(path.path, "rb", cache_type="none")
        except TypeError:  # `smb://` has no such option, and `blockcache::` passes its own
            file = path.fs.open(path.path, "rb")
        details = getattr(file, "details", None)
        return file, details if isinstance(details, dict) else None
    info = path.fs.info(path.path)
    if info.get("partial") is False:
        raise without_ranges(path)
    etag = info.get("ETag", "W/")
    own = getattr(path.fs, "kwargs", {}).get("headers", {})  # such as credentials
    headers = {"Accept-Encoding": "identity", **own}  # a compressed range has another size
    if not etag.startswith("W/"):
        headers["If-Match"] = etag
    if not info.get("size"):
        return None, info
    options = {"size": info["size"], "cache_type": "none", "headers": headers}
    return path.fs.open(path.path, "rb", **options), info


def _version_of(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _VERSION if info.get(key) is not None}


def check_together(sources: Sequence[ByteSource]) -> None:
    """Check that what was read from the sources of a checkpoint belongs together.

    Raises:
        FileFormatError: A store has replaced a file since it was opened.
        OSError: The store cannot be asked.
    """
    is_alone = len(sources) == 1
    doubtful = [s for s in sources if isinstance(s, RemoteSource) and s.may_be_mixed(is_alone)]
    if not doubtful:
        return
    forget_listings(doubtful[0].path)  # the others are in the same store
    with ReadPool(RemoteSource.in_flight) as pool:
        for source, same in zip(doubtful, pool.map(RemoteSource.is_same, doubtful), strict=True):
            if not same.result():
                raise changed(source.path)

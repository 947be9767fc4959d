"""Writing a file in a store, through fsspec."""

import io
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pytree2safetensors._storage.descriptor import cut_chunks
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._storage.remote_errors import naming_url
from pytree2safetensors._storage.remote_path import RemotePath
from pytree2safetensors._types import Chunk


def _opened(path: RemotePath, **options: Any) -> Any:
    """Open a file that a transaction of the caller does not commit."""
    try:
        transaction = path.fs.transaction
    except NotImplementedError:  # of the Hub, where closing a file commits it
        transaction = None
    if transaction is not None:
        options["autocommit"] = False
    with naming_url(path):
        file = path.fs.open(path.path, "wb", **options)
    if transaction is not None:
        with suppress(ValueError):  # only this module commits it
            path.fs.transaction.files.remove(file)
    return file


class _InMemory(io.BytesIO):
    """A file for fsspec's memory, which would give it its name as soon as it is opened."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        """Keep the bytes for `commit`."""

    def commit(self) -> None:
        """Give the store the whole file, also within a transaction of the caller."""
        _opened(self._path, data=self.getvalue()).commit()


class Pending:
    """A file in a store that is being written.

    It gets its name with `commit`. In stores that write in place, it has its name from the start.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._file: Any = _InMemory(path) if "memory" in path.protocols else _opened(path)

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

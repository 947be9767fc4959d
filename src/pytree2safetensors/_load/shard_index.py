"""The index of a sharded folder: reading it, and opening the shards that it names.

Specification: *Sharded folders*.
"""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.header import MAX_HEADER
from pytree2safetensors._format.index import read_index_metadata, read_weight_map
from pytree2safetensors._format.strict_json import read_json
from pytree2safetensors._load.locate import check_not_cut_short, shards_beside
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.file_source import identity, open_source
from pytree2safetensors._storage.remote_file import RemoteSource
from pytree2safetensors._storage.remote_path import RemotePath

# The codes for names that no file has, or none can have here.
_MISSING: Final = {errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


class Index(NamedTuple):
    """The content of an index: where the tensors are, and their metadata."""

    path: str | RemotePath
    label: str  # its name in messages
    metadata: dict[str, str]
    shards: dict[str, set[str]]  # the names of the tensors in each file
    source: ByteSource  # stays open, so that no other file gets its identity
    status: tuple[int, ...]

    def is_current(self) -> bool:
        """Return whether no save has replaced it since.

        Raises:
            OSError: The store cannot be asked.
        """
        if isinstance(self.path, RemotePath):
            return isinstance(self.source, RemoteSource) and self.source.is_current()
        try:
            return self.status == _status(self.path)
        except OSError:
            return False

    def open(self, shard: str) -> ByteSource:
        """Open a shard. Follow symbolic links, because a hub's cache has these.

        Raises:
            FileFormatError: It is missing, or is a pipe or a device.
            OSError: It cannot be opened.
        """
        if isinstance(self.path, RemotePath):
            with suppress(FileNotFoundError):
                source = open_source(self.path.beside(shard))
                source.read(0, min(1, source.size))  # and with it the header
                return source
        else:
            path = os.path.join(os.path.dirname(self.path), shard)
            try:
                if not os.path.isdir(path):  # which Windows does not open
                    return open_source(path, regular=True)
            except (OSError, UnicodeEncodeError) as error:
                if getattr(error, "errno", errno.ENOENT) not in _MISSING:
                    raise
        raise FileFormatError(
            f"{self.label} names the shard {shorten(shard)}, which is missing; "
            "copy the complete folder again"
        )

    def check(self, shard: str, names: Iterable[str]) -> None:
        """Raise an error if a shard lacks a tensor that the index places there."""
        missing = sorted(self.shards[shard].difference(names))
        if missing:
            raise FileFormatError(
                f"the shard {shorten(shard)} lacks {shorten(missing[0])}, which {self.label} places "
                "in it; copy the complete folder again"
            )


def read_index(path: str | RemotePath) -> Index:
    """Read and check an index. The caller closes its source.

    Raises:
        FileFormatError: It is not an index, or names files outside its folder.
        OSError: It cannot be read.
    """
    try:
        status = () if isinstance(path, RemotePath) else _status(path)
        source = open_source(path, regular=True)
    except FileNotFoundError:
        if isinstance(path, RemotePath):
            raise
        check_not_cut_short(os.path.dirname(path) or os.curdir, shards_beside(path))
        raise
    label = source.label
    try:
        content = _read_content(source)
        shards = read_weight_map(content.get("weight_map"), label)
        return Index(path, label, read_index_metadata(content, label), shards, source, status)
    except BaseException:
        source.close()
        raise


def _status(path: str) -> tuple[int, ...]:
    """Return what distinguishes a file from one that replaces it, and from its earlier content."""
    status = os.stat(path)
    return *identity(status), status.st_ctime_ns


def _read_content(source: ByteSource) -> dict[str, Any]:
    if source.measure(MAX_HEADER) > MAX_HEADER:
        raise FileFormatError(
            f"{source.label} has {source.size:,} bytes, and an index has at most {MAX_HEADER:,}"
        )
    try:
        text = source.read(0, source.size).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileFormatError(f"the index {source.label} is not valid UTF-8") from None
    content = read_json(text, f"the index {source.label}", fractions=True)
    if not isinstance(content, dict):
        raise FileFormatError(f"the index {source.label} is not a JSON object")
    return content

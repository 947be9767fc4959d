"""Writing to file objects."""

import errno
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from pytree2safetensors._storage.byte_source import HasMethod
from pytree2safetensors._storage.descriptor import cut
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._types import Chunk

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
    """Write adjacent chunks to a file object, which may write only a part at a time."""
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{type(file).__name__} takes text, not bytes; open it in binary mode")
    report = Report(progress, size)
    for _, piece in cut(chunks):
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

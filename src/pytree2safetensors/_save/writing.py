"""Writing contents to a file, a file object or a folder."""

import os
from functools import partial

from pytree2safetensors._format.header import plan
from pytree2safetensors._save import files
from pytree2safetensors._save.chunks import pieces
from pytree2safetensors._save.contents import Contents, with_digests
from pytree2safetensors._storage.atomic_file import Writable, write_file, write_stream
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.progress import Progress


def write(
    contents: Contents,
    path: PathLike | Writable,
    durable: bool,
    checksum: bool,
    max_shard_size: int | str | None,
    report: Progress | None,
) -> None:
    """Write contents to a file, a file object or a folder."""
    if checksum:
        contents = with_digests(contents)
    if max_shard_size is not None:
        files.save(
            contents.infos,
            contents.metadata,
            partial(pieces, contents=contents),
            path,
            max_shard_size=max_shard_size,
            durable=durable,
            report=report,
        )
        return
    planned = plan(contents.infos, contents.metadata)
    size = len(planned.head) + planned.size
    if isinstance(path, str | os.PathLike):  # asked first: some paths can write
        write_file(path, pieces(planned, contents), size, durable=durable, progress=report)
    else:
        write_stream(path, pieces(planned, contents), size, report)

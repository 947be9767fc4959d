"""Several files of one folder in a store. The last one is the index of the others.

Specification: *Sharded folders*.
"""

from pytree2safetensors._storage.atomic_folder import NewFile, Older
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._storage.remote_errors import naming_url
from pytree2safetensors._storage.remote_path import RemotePath
from pytree2safetensors._storage.remote_writing import Pending, write_pending

# Stores without folders. There, a folder is only a part of a name.
_FLAT = frozenset(
    ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hf", "http", "https", "memory"]
)

_UNLISTED = (
    "is in a store that lists no folders; save one file, and load a URL that ends in .safetensors or "
    ".json"
)


def names_in(folder: RemotePath) -> list[str]:
    """Return the names in a folder; none if it is not there."""
    try:
        with naming_url(folder, _UNLISTED):
            folder.fs.invalidate_cache()
            found = folder.fs.ls(folder.path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(path.rstrip("/").rpartition("/")[2] for path in found)


def replace_remotely(
    folder: RemotePath,
    files: list[NewFile],
    older: Older,
    progress: Progress | None,
) -> None:
    """Write files that become valid with the last of them, then remove stale files.

    A store has no renames and no locks. So the old index is removed before any shard is replaced,
    which in stores that write in place is when the shard is opened. Until the new index is written, a
    reader gets the error that a save was interrupted.
    """
    report = Report(progress, sum(file.size for file in files))
    *others, last = files
    names = names_in(folder)
    if not names and not folder.protocols & _FLAT:
        with naming_url(folder):
            folder.fs.makedirs(folder.path, exist_ok=True)
    replaces_shards = any(file.name in names for file in others)
    if replaces_shards and not folder.appears_whole:
        _remove(folder, last.name, names)
    written: list[Pending] = []
    try:
        for file in files:
            pending = Pending(folder.joined(file.name))
            written.append(pending)
            write_pending(pending, file.chunks, file.size, report)
            pending.finish()
        report.finish()
        if replaces_shards and folder.appears_whole:
            _remove(folder, last.name, names)
        for pending in written[:-1]:
            pending.commit()
        _remove(folder, older.rival, names)
        written[-1].commit()
    except BaseException:
        for pending in written:
            pending.discard()
        raise
    for name in older.stale(names):
        _remove(folder, name, names)


def _remove(folder: RemotePath, name: str, names: list[str]) -> None:
    if name in names:
        path = folder.joined(name)
        with naming_url(path):
            path.fs.rm_file(path.path)

"""Finding the file, the index or the shards that a path means.

Specification: *Sharded folders*.
"""

import os
import re
from contextlib import closing, suppress
from typing import Final

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.header import LENGTH_BYTES, MAX_HEADER
from pytree2safetensors._format.index import (
    INDEX_NAME,
    SHARD_NAME,
    STEM,
    SUFFIX,
    index_name,
    split_path,
    stem_of,
)
from pytree2safetensors._messages import joined, shorten
from pytree2safetensors._storage.file_source import open_source
from pytree2safetensors._storage.naming import TEMPORARY, temporary_prefix
from pytree2safetensors._storage.remote_file import forget_listings
from pytree2safetensors._storage.remote_folder import names_in
from pytree2safetensors._storage.remote_path import RemotePath, shown_url

# How other programs number shards, or used to.
_OTHER_SHARD: Final = re.compile(r".*\.safetensors-[0-9]+-of-[0-9]+", re.DOTALL)

_OF_ORBAX: Final = {"_METADATA", "manifest.ocdbt"}  # each of its checkpoints has one of these


def is_index(path: str | RemotePath) -> bool:
    """Return whether a path names an index, and not a safetensors file that is called like one."""
    if isinstance(path, RemotePath):
        return path.name.endswith(".json")
    if not path.endswith(".json") or not os.path.isfile(path):
        return path.endswith(".json")
    try:
        source = open_source(path, regular=True)
    except (FileFormatError, OSError):  # a save may be replacing it
        return True
    with closing(source):
        head = bytes(source.read(0, min(LENGTH_BYTES + 1, source.size)))
    # Eight characters of JSON would be too large a header length.
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES:] != b"{" or length > MAX_HEADER


def locate(path: str) -> str:
    """Return the file that a path means: itself, its index, or in a folder the index or the one file.

    Raises:
        FileFormatError: The folder has no such file, or several.
        OSError: The folder cannot be read.
    """
    if not os.path.isdir(path):
        index = path + ".index.json"  # the index of shards that were saved as this path
        is_missing = path.endswith(SUFFIX) and not os.path.lexists(path)
        return index if is_missing and (os.path.isfile(index) or shards_beside(index)) else path
    seen: list[str] | None = None
    while True:
        names = sorted(os.listdir(path))
        try:
            return os.path.join(path, _chosen(path, names))
        except FileFormatError:
            if names == seen:  # otherwise a save may be in progress, and the list may be a mixture
                raise
            seen = names


def _chosen(folder: str, names: list[str]) -> str:
    """Return the name of the index or the single file in a folder."""
    indexes = list(filter(INDEX_NAME.fullmatch, names))
    if index_name(STEM) in indexes:
        indexes = [index_name(STEM)]
    single = STEM + SUFFIX
    if indexes:
        rivals = {single, indexes[0].rpartition(SUFFIX + ".index")[0] + SUFFIX}
        found = [*indexes, *sorted(rivals.intersection(names))]
    elif single in names:
        found = [single]
    else:
        found = [name for name in _without_replaced(names) if name.endswith(SUFFIX)]
        check_not_cut_short(folder, list(filter(SHARD_NAME.fullmatch, found)))
    if len(found) > 1:
        raise FileFormatError(
            f"the folder {shorten(folder)} has {joined([*map(shorten, found)], 5)}; "
            "pass the path of the one to load"
        )
    if not found:
        check_not_cut_short(folder, [name for name in names if name.startswith(TEMPORARY)])
        other = next(filter(_OTHER_SHARD.fullmatch, names), None)
        present = f"; it has {joined([*map(shorten, sorted(names))], 5)}" if names else ""
        hint = other and (
            f"; {shorten(other)} is not the name of a shard, which has the form "
            "'model-00001-of-00002.safetensors': rename it, or copy the complete folder again"
        )
        if not _OF_ORBAX.isdisjoint(names):
            hint = "; Orbax wrote it: restore it with Orbax, and save the result"
        raise FileFormatError(
            f"the folder {shorten(folder)} has no safetensors file and no index{hint or present}"
        )
    return found[0]


def _without_replaced(names: list[str]) -> list[str]:
    """Leave out shards beside a file with their stem, which a save of this file did not remove yet."""
    there = set(names)
    return [name for name in names if (stem := stem_of(name)) is None or stem + SUFFIX not in there]


def locate_remotely(path: RemotePath) -> list[RemotePath]:
    """Return the files and indexes that a path in a store may mean, in the order to try them.

    Raises:
        FileFormatError: It is a folder that has no checkpoint, or several.
        OSError: The store cannot be reached.
    """
    forget_listings(path)
    if path.name.endswith(".json"):
        return [path]
    if path.name.endswith(SUFFIX):  # or the index of shards that were saved as this path
        return [path, path.beside(path.name + ".index.json")]
    if path.is_web:
        return unlisted(path)
    names = names_in(path)
    if not names or names == [path.name]:
        return [path]
    return [path.joined(_chosen(shown_url(path.url), names))]


def unlisted(path: RemotePath) -> list[RemotePath]:
    """Return what to try for a path that may be a folder, if nothing says what is in it."""
    whole = [path] if path.name else []
    return [*whole, path.joined(index_name(STEM)), path.joined(STEM + SUFFIX)]


def shards_beside(index: str) -> list[str]:
    """Return the shards that belong to an index by their names, whether it is there or not."""
    folder, stem = split_path(index, is_folder=os.path.isdir(index))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if stem_of(name) == stem)


def has_parts(path: str) -> bool:
    """Return whether there are shards that belong to a path, or files that a save to it has not finished."""
    is_folder = os.path.isdir(path)
    folder, stem = split_path(path, is_folder=is_folder)
    stem = stem_of(os.path.basename(path)) or stem  # it may be a shard
    names: list[str] = []
    with suppress(OSError):
        names += os.listdir(folder)
    if is_folder:
        return any(name.startswith(TEMPORARY) or SHARD_NAME.fullmatch(name) for name in names)
    unfinished = temporary_prefix(stem + SUFFIX), temporary_prefix(index_name(stem))
    return any(name.startswith(unfinished) or stem_of(name) == stem for name in names)


def check_not_cut_short(folder: str, shards: list[str]) -> None:
    """Raise an error if there are shards, finished or not, and no index."""
    if shards:
        raise FileFormatError(
            f"the folder {shorten(folder)} has {shorten(shards[0])} but no index: a save was interrupted "
            "or is in progress, or the index was not copied; save or copy the folder again"
        )

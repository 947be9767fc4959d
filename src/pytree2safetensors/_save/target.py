"""Where a save goes, the plan for that place, and what an older save left there.

Specification: *Saving*, *Sharded folders*.
"""

import errno
import os
from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex, TypeAlias

from pytree2safetensors._format.index import SUFFIX, index_name, parse_size, split_path, stem_of
from pytree2safetensors._messages import shorten
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.plan import SavePlan, plan_file, plan_folder
from pytree2safetensors._storage.atomic_folder import Older
from pytree2safetensors._storage.folder import absolute
from pytree2safetensors._storage.locations import (
    PathLike,
    Writable,
    check_created,
    check_home,
    resolve,
)
from pytree2safetensors._storage.remote_path import RemotePath


class LocalTarget(NamedTuple):
    """A path that a save goes to.

    Attributes:
        path: The path.
        folder: The folder to write shards in; None for one file.
        stem: The prefix of the names in the folder.
        limit: The most bytes of tensors in a shard.
    """

    path: str
    folder: str | None = None
    stem: str = ""
    limit: int = 0


class OtherTarget(NamedTuple):
    """A path in a store, or a file object, that a save goes to. The attributes have the same meaning."""

    path: RemotePath | Writable
    folder: RemotePath | None = None
    stem: str = ""
    limit: int = 0


SaveTarget: TypeAlias = LocalTarget | OtherTarget


def label_of(target: SaveTarget) -> str:
    """Return what messages call a target."""
    path = target.path
    if isinstance(path, RemotePath):
        return path.label
    return shorten(path) if isinstance(path, str) else f"a {type(path).__name__}"


def target_of(
    path: PathLike | RemotePath | Writable, max_shard_size: SupportsIndex | str | None
) -> SaveTarget:
    """Find where a save goes.

    Raises:
        ValueError: The size is not a size, or it is given for a file object; or the path is a URL
            that cannot be opened.
    """
    where = resolve(path)
    if isinstance(where, str):
        return local_target(where, max_shard_size)
    if max_shard_size is None:
        return OtherTarget(where)
    limit = parse_size(max_shard_size)
    if not isinstance(where, RemotePath):
        raise ValueError(
            f"max_shard_size= writes a folder, so it needs a path, not {type(path).__name__}"
        )
    folder, stem = split_path(where.path, is_folder=False)
    return OtherTarget(where, where if folder == where.path else where.parent(), stem, limit)


def local_target(path: str, max_shard_size: SupportsIndex | str | None) -> LocalTarget:
    """Find where a save to a path goes, as `target_of` does."""
    if max_shard_size is None:
        check_home(path)
        return LocalTarget(path)
    limit = parse_size(max_shard_size)
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    folder, stem = split_path(path, is_folder=os.path.isdir(path))
    check_created(folder)
    return LocalTarget(path, folder, stem, limit)


def settled(target: LocalTarget) -> LocalTarget:
    """Return a target that stays where it is if the working directory changes."""
    folder = None if target.folder is None else absolute(target.folder or os.curdir)
    return target._replace(path=absolute(target.path), folder=folder)


def replacing_shards(plan: SavePlan, target: LocalTarget) -> tuple[SavePlan, LocalTarget]:
    """If one file goes where a load finds the index of shards, plan to replace them in their folder.

    Earlier saves must have finished. In a store, this would take another request for each save.
    """
    path = target.path
    if target.folder is not None or not path.endswith(SUFFIX):
        return plan, target
    folder, stem = split_path(path, is_folder=False)
    if os.path.lexists(path) or not os.path.isfile(os.path.join(folder, index_name(stem))):
        return plan, target
    files = [file._replace(name=stem + SUFFIX) for file in plan.files]
    return plan._replace(files=files), target._replace(folder=folder, stem=stem)


def plan_save(contents: Contents, target: SaveTarget, *, checksum: bool) -> SavePlan:
    """Plan what a save writes."""
    if target.folder is None:
        return plan_file(contents, checksum=checksum)
    return plan_folder(contents, target.stem, target.limit, checksum=checksum)


def older_files(plan: SavePlan, target: SaveTarget) -> Older:
    """Return what an older save may have left in the folder.

    The rival is the file or index of the same stem, since both together make a folder ambiguous.
    """
    kept = {file.name for file in plan.files} | {plan.index_name}
    rival = target.stem + SUFFIX if plan.index_name else index_name(target.stem)

    def stale(found: Iterable[str]) -> list[str]:
        return sorted(n for n in found if stem_of(n) == target.stem and n not in kept)

    return Older(rival, stale)

"""Saving a tree.

Specification: *Saving*.
"""

from collections.abc import Mapping
from typing import Literal

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._save import processes
from pytree2safetensors._save.calls import announced, is_needed
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.saver import wait_for_earlier
from pytree2safetensors._save.writing import plan_save, target_of, write
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.progress import ProgressOption, closing_bar, reporter
from pytree2safetensors._storage.stream import Writable
from pytree2safetensors._tree.flatten import PyTree


@announced
@checked
def save_pytree(
    tree: PyTree,
    path: PathLike | Writable,
    *,
    metadata: Mapping[str, str] | None = None,
    unsupported: Literal["raise", "skip"] = "raise",
    durable: bool = True,
    checksum: bool = False,
    max_shard_size: int | str | None = None,
    progress: ProgressOption = False,
    rename: Rename | None = None,
) -> None:
    """Save a pytree as one safetensors file, from which `load_pytree` gives the same tree back.

    What `save_pytree_async` was asked for before ends first.

    Args:
        tree: Any pytree of arrays, Python scalars, strs and PRNG keys.
        path: The file to write, replaced whole or not at all; or a binary file object; with
            `max_shard_size` a folder, or a file in it whose stem the names begin with.
        metadata: Strings to keep beside the tensors.
        unsupported: "skip" leaves out the leaves that a file cannot hold, but for traced and
            abstract arrays and references to arrays, which are always an error.
        durable: Whether the file has reached the disk when this returns.
        checksum: Keep a digest of each tensor, which loading checks. Costs a second pass.
        max_shard_size: Split what is larger, in bytes or such as "5GB", as model hubs do.
        progress: True for a bar, or a function of (done_bytes, total_bytes).
        rename: Rules, or what else `load_into_pytree` takes: the file has the names and axes that
            it would be loaded from, and no note.

    Raises:
        UnsupportedLeafError: Leaves that a file cannot hold, or an array that was deleted or
            donated, or with `rename` one that a tensor alone does not tell; nothing was written.
        WeightsMismatchError: `rename` does not fit the tree.
        KeyPathError: A key has no spelling, or two leaves have one.
        TreeStructureError: JAX cannot flatten the tree.
        FileFormatError: The metadata or the header are beyond what the format allows, or leaves
            that differ have one name.
        ValueError: `max_shard_size` is no size, or `path` then is no path.
        OSError: The file cannot be written; what was there before still is.

    Specification: *Saving*.

    >>> save_pytree({"w": 1.5, "steps": (1, 2)}, "model.safetensors")
    """
    report = reporter(progress, "saving", jax.process_index)
    with collector_paused():
        contents = collect(tree, metadata or {}, unsupported, rename)
    if is_needed(contents.leaves.values()):
        options = processes.Options(durable, checksum, max_shard_size)
        with closing_bar(report):
            processes.save(contents, path, options, report)
        return
    wait_for_earlier()
    target = target_of(path, max_shard_size)
    with collector_paused():
        plan = plan_save(contents, target, checksum=checksum)
    write(plan, contents.leaves, target, durable=durable, progress=report)

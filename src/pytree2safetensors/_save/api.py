"""Saving a tree, at once or in the background from a snapshot.

Specification: *Saving*.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Literal, SupportsIndex

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.assembled import whole_leaves, with_leaves
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._save.calls import counted, is_joint
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.parts import copied
from pytree2safetensors._save.processes import save_jointly
from pytree2safetensors._save.saver import submit, wait_for_earlier
from pytree2safetensors._save.target import LocalTarget, label_of, plan_save, settled, target_of
from pytree2safetensors._save.terms import SaveOptions
from pytree2safetensors._save.writing import write
from pytree2safetensors._storage.locations import PathLike, Writable, resolve
from pytree2safetensors._storage.progress import ProgressOption, reporter
from pytree2safetensors._tree.pytree import PyTree


@counted
@checked
def save_pytree(
    tree: PyTree,
    path: PathLike | Writable,
    *,
    metadata: Mapping[str, str] | None = None,
    unsupported: Literal["raise", "skip"] = "raise",
    durable: bool = True,
    checksum: bool = False,
    max_shard_size: SupportsIndex | str | None = None,
    progress: ProgressOption = False,
    rename: Rename | None = None,
) -> None:
    """Save a pytree as a safetensors file, which `load_pytree` loads as the same tree.

    Background saves that were requested earlier finish first. A callback during one of them, such as
    `progress`, saves at once.

    Args:
        tree: Any pytree of arrays, Python scalars, strs and PRNG keys.
        path: The path or URL of the file to write, or a binary file object. An existing file is
            replaced atomically. With `max_shard_size`, a folder, or a file in it whose stem the
            shards get.
        metadata: Strings to store beside the tensors, for `load_metadata`.
        unsupported: "raise", or "skip" to leave out leaves that a file cannot hold. Traced,
            abstract, deleted, donated and unreduced arrays, references to arrays, and other objects
            that hold arrays always raise.
        durable: Flush the file to disk before returning.
        checksum: Store a digest of each tensor. A load verifies the tensors that its process reads
            whole.
        max_shard_size: Split the tree into files with tensors of at most this size together, as model
            hubs do: a number of bytes, or a str such as "5GB". A larger tensor gets its own file.
        progress: True for a progress bar, or a function of (done_bytes, total_bytes).
        rename: Rules, or another value that `load_into_pytree` takes. The file gets the names and
            axes that `load_into_pytree` would load with it, and no note.

    Raises:
        UnsupportedLeafError: A file cannot hold some leaves, an array was deleted or donated, or is
            only on devices of another process, or `rename` is given and some leaves need a note.
            Nothing was written.
        WeightsMismatchError: `rename` does not fit the tree.
        KeyPathError: A key cannot be spelled, or two leaves have the same spelling.
        TreeStructureError: JAX cannot flatten the tree.
        FileFormatError: The format does not allow this metadata or a header of this size,
            `rename` gives the same name to leaves that differ or a name that no file can hold, the
            name of the shards has a backslash, an array changes its size during the save, or several
            processes do not save the same tree.
        ValueError: `max_shard_size` is not a size, or is given with a file object; or the path of a
            rule is ambiguous in the tree.
        RuntimeError: This is a signal handler, and it cannot wait for a background save.
        OSError: The file cannot be written. The old file is unchanged, with the exceptions of law 8.

    Specification: *Saving*.

    >>> save_pytree({"w": 1.5, "steps": (1, 2)}, "model.safetensors")
    """
    report = reporter(progress, "saving", jax.process_index)
    with collector_paused():
        contents = collect(tree, metadata or {}, unsupported, rename)
    if is_joint(contents.leaves):
        options = SaveOptions(durable, checksum, max_shard_size)
        save_jointly(contents, path, options, report, background=False)
        return
    wait_for_earlier()
    target = target_of(path, max_shard_size)
    with collector_paused():
        plan = plan_save(contents, target, checksum=checksum)
    write(plan, contents.leaves, target, durable=durable, progress=report)


@counted
@checked
def save_pytree_async(
    tree: PyTree,
    path: PathLike | Writable,
    *,
    metadata: Mapping[str, str] | None = None,
    unsupported: Literal["raise", "skip"] = "raise",
    durable: bool = True,
    checksum: bool = False,
    max_shard_size: SupportsIndex | str | None = None,
    progress: ProgressOption = False,
    rename: Rename | None = None,
) -> Future[None]:
    """Save a pytree in the background, as `save_pytree` does.

    When this function returns, all values are copied, or their copies are started, so arrays may be
    donated or changed. Saves finish in the order of the calls, except that a `save_pytree` in a
    callback during a background save, such as `progress`, saves at once. The interpreter does not
    exit before all saves are finished.

    Args:
        tree: Any pytree of arrays, Python scalars, strs and PRNG keys.
        path: As for `save_pytree`.
        metadata: Strings to store beside the tensors, for `load_metadata`.
        unsupported: "raise", or "skip" to leave out leaves that a file cannot hold.
        durable: Flush the file to disk before the future is done.
        checksum: Store a digest of each tensor. A load verifies the tensors that its process reads
            whole.
        max_shard_size: As for `save_pytree`.
        progress: As for `save_pytree`. A function is called in another thread.
        rename: As for `save_pytree`.

    Returns:
        A future. Its `result()` waits for the save, and raises the error if writing failed. If
        writing failed and you call neither `result()` nor `exception()`, there is a warning.

    Raises:
        UnsupportedLeafError: A file cannot hold some leaves.
        WeightsMismatchError: `rename` does not fit the tree.
        KeyPathError: A key cannot be spelled, or two leaves have the same spelling.
        TreeStructureError: JAX cannot flatten the tree.
        FileFormatError: As for `save_pytree`.
        ValueError: `max_shard_size` is not a size, or is given with a file object; or the path of a
            rule is ambiguous in the tree.
        RuntimeError: As for `save_pytree`.

    Specification: *Saving*.

    >>> future = save_pytree_async({"w": 1.5}, "model.safetensors")
    >>> future.result()
    """
    report = reporter(progress, "saving", jax.process_index)
    where = resolve(path)
    with collector_paused():
        contents = collect(tree, metadata or {}, unsupported, rename)
        if is_joint(contents.leaves):
            options = SaveOptions(durable, checksum, max_shard_size)
            return save_jointly(contents, where, options, report, background=True)
        target = target_of(where, max_shard_size)
        if isinstance(target, LocalTarget):
            # The process may change its working directory during the save.
            target = settled(target)
        plan = plan_save(contents, target, checksum=checksum)
        # Each leaf once, because rules may make several tensors from it.
        unique = {id(leaf): leaf for leaf in whole_leaves(contents.leaves.values())}
        copies = dict(zip(unique, copied([*unique.values()]), strict=True))
        leaves = with_leaves(contents.leaves, copies)
    save = partial(write, plan, leaves, target, durable=durable, progress=report)
    return submit(save, label_of(target))

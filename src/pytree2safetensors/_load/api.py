"""Loading without a template: the tree in a file, or its metadata.

Specification: *Loading*.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, overload

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._format.note import FORMAT
from pytree2safetensors._leaves.spec import ARRAYS, LeafSpec, abstract
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.opening import again_if_replaced, open_checkpoint
from pytree2safetensors._load.prefixes import names_below, nodes_below
from pytree2safetensors._load.shardings import refusal
from pytree2safetensors._load.stored import load_stored, warn
from pytree2safetensors._messages import joined, shorten, type_name
from pytree2safetensors._storage.locations import PathLike, Readable
from pytree2safetensors._storage.progress import ProgressOption, reporter
from pytree2safetensors._tree.pytree import PyTree
from pytree2safetensors._tree.separated import build_separated
from pytree2safetensors._tree.unflatten import build

Shardings: TypeAlias = (
    jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]
)


@again_if_replaced
@checked
def load_pytree(
    path: PathLike | Readable,
    *,
    prefix: str = "",
    separator: str = "",
    mmap: bool = False,
    progress: ProgressOption = False,
) -> PyTree:
    """Load the tree in a safetensors file, without a template.

    Args:
        path: The path or URL of a file, a folder of shards or its index; or a binary file object.
        prefix: A spelled key path. Load only the subtree there. With `separator`, the beginning of
            names, up to a separator.
        separator: The text that joins keys in names from another program, such as "." in PyTorch.
            The tree has lists where all keys are indices, and dicts elsewhere.
        mmap: Map the file instead of reading it. The file must not change afterwards.
        progress: True for a progress bar, or a function of (done_bytes, total_bytes), which may be
            called in other threads, one call at a time.

    Returns:
        The tree that was saved. The keys of its children decide whether a node of another type
        becomes a `PyTreeContainer`, a dict, a list or an `UnkeyedContainer`. Arrays are uncommitted
        JAX arrays. If JAX cannot hold a dtype in this process, they are NumPy arrays, and there is
        one warning.

    Raises:
        FileFormatError: The file is damaged, is not a safetensors file, or changes during the load;
            the folder has no checkpoint, or none of several takes precedence; or the installed
            libraries do not know a leaf.
        KeyPathError: A name in the file or `prefix` is not a key path, and `separator` is empty. Load
            a file with such names into a template.
        TreeStructureError: The names do not form a tree.
        WeightsMismatchError: The file has nothing at `prefix`.
        ValueError: `mmap` is True, and `path` is a file object or a URL.
        RuntimeError: A function that `jax.shard_map` runs without `jax.jit` cannot load.
        OSError: The file cannot be read.

    Specification: *Loading*.

    >>> save_pytree({"w": 1.5, "steps": (1, 2)}, "model.safetensors")
    >>> load_pytree("model.safetensors")
    {'steps': (1, 2), 'w': 1.5}
    """
    with open_checkpoint(path, mmap) as checkpoint:
        names = names_below(checkpoint, prefix, separator=separator)
        if separator or not FORMAT.items() <= checkpoint.metadata.items():
            # Another program wrote it: its names may not form a tree. Fail before reading the data.
            _built(checkpoint, dict.fromkeys(names, 0), prefix, separator)
        report = reporter(progress, "loading", jax.process_index)
        leaves = load_stored(checkpoint, names.values(), mmap=mmap, progress=report)
        with collector_paused():
            found = dict(zip(names, leaves, strict=True))
            return _built(checkpoint, found, prefix, separator)


@overload
def load_abstract(
    path: PathLike | Readable,
    *,
    flat: Literal[True],
    prefix: str = "",
    separator: str = "",
    sharding: Shardings | None = None,
) -> dict[str, Any]: ...


@overload
def load_abstract(
    path: PathLike | Readable,
    *,
    flat: bool = False,
    prefix: str = "",
    separator: str = "",
    sharding: Shardings | None = None,
) -> PyTree: ...


@again_if_replaced
@checked
def load_abstract(
    path: PathLike | Readable,
    *,
    flat: bool = False,
    prefix: str = "",
    separator: str = "",
    sharding: Shardings | None = None,
) -> PyTree:
    """Load a tree with a `jax.ShapeDtypeStruct` in place of each array. The arrays are not read.

    Args:
        path: The path or URL of a file, a folder of shards or its index; or a binary file object.
        flat: Return a flat dict from the names in the file, below `prefix`, to their leaves. The names
            need not form a tree; with a separator, they must differ below `prefix`. A warning names
            leaves that cannot be loaded, such as tensors of the packed dtype F4; the dict does not have
            them.
        prefix: As for `load_pytree`.
        separator: As for `load_pytree`.
        sharding: A sharding for all arrays, or a function that takes the spelled key path and the
            `jax.ShapeDtypeStruct` of an array and returns its sharding or None; with `flat` or a
            separator, it takes the name instead. With shardings, the result is a template that loads sharded
            arrays.

    Returns:
        The tree that `load_pytree` would return, with shapes and dtypes in place of arrays. Python
        scalars and strs have their values.

    Raises:
        FileFormatError: The file is damaged, is not a safetensors file, or changes during the load;
            or `flat` is False, and the installed libraries do not know a leaf.
        KeyPathError: A name in the file is not a key path, `flat` is False, and `separator` is empty;
            or `prefix` is not a key path, and `separator` is empty.
        TreeStructureError: The names do not form a tree, and `flat` is False; or with a separator, two
            of them, such as `w` and `w.`, are the same below `prefix`.
        WeightsMismatchError: The file has nothing at `prefix`.
        ValueError: An array cannot have its sharding.
        OSError: The file cannot be read.

    Specification: *Loading*.

    >>> save_pytree({"w": np.zeros((2, 3), np.float32)}, "model.safetensors")
    >>> load_abstract("model.safetensors")
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    with collector_paused(), open_checkpoint(path) as checkpoint:
        names = names_below(checkpoint, prefix, separator=separator)
        found = _specs(checkpoint, names, skip=flat)
        scalars = [name for name in found if found[name].kind not in ARRAYS]
        stored = [names[name] for name in scalars]
        loaded = load_stored(checkpoint, stored, mmap=False, progress=None)
        values = dict(zip(scalars, loaded, strict=True))
        leaves = {
            name: values[name] if name in values else _sharded(name, leaf, sharding)
            for name, leaf in found.items()
        }
        return leaves if flat else _built(checkpoint, leaves, prefix, separator)


def _built(
    checkpoint: OpenCheckpoint, leaves: Mapping[str, Any], prefix: str, separator: str
) -> Any:
    where = f"{checkpoint.label} below {shorten(prefix)}" if prefix else checkpoint.label
    if separator:
        return build_separated(leaves, separator, where)
    return build(leaves, nodes_below(checkpoint, prefix), where)


def _specs(
    checkpoint: OpenCheckpoint, names: Mapping[str, str], *, skip: bool
) -> dict[str, LeafSpec]:
    """Describe stored leaves. Skip, with a warning, those that cannot be loaded."""
    found: dict[str, LeafSpec] = {}
    unknown: list[str] = []
    for name, stored in names.items():
        spec = checkpoint.spec_or_reason(stored) if skip else checkpoint.spec_of(stored)
        if isinstance(spec, str):
            unknown.append(f"{shorten(stored)} {spec}")
        else:
            found[name] = spec
    if unknown:
        warn(
            f"The list of {checkpoint.label} lacks leaves that cannot be loaded: {joined(unknown)}"
        )
    return found


def _sharded(name: str, leaf: LeafSpec, sharding: Shardings | None) -> jax.ShapeDtypeStruct:
    hint = "; pass a function that returns a sharding for each array"
    if callable(sharding):
        sharding, hint = sharding(name, abstract(leaf)), ""
        if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
            kind = type_name(type(sharding))
            raise TypeError(
                f"load_abstract: sharding= gives {shorten(name)} a value of type {kind}, but it must "
                "give a jax.sharding.Sharding or None"
            )
    reason = None if sharding is None else refusal(sharding, leaf.shape)
    if reason is not None:
        raise ValueError(f"load_abstract: sharding= does not fit {shorten(name)}: {reason}{hint}")
    return abstract(leaf, sharding)


@checked
def load_metadata(path: PathLike | Readable) -> dict[str, str]:
    """Load the metadata that was passed to `save_pytree`.

    Args:
        path: The path or URL of a file, a folder of shards or its index; or a binary file object.

    Returns:
        The metadata, without the entries that this package writes itself, such as a `format` of
        "flax".

    Raises:
        FileFormatError: The file is damaged, is not a safetensors file, or changes during the load.
        OSError: The file cannot be read.

    Specification: *Loading*.

    >>> save_pytree({"w": 1.5}, "model.safetensors", metadata={"run": "17"})
    >>> load_metadata("model.safetensors")
    {'run': '17'}
    """
    with collector_paused(), open_checkpoint(path) as checkpoint:
        own = checkpoint.own_metadata()
        return {key: own[key] for key in own if FORMAT.get(key) != own[key]}

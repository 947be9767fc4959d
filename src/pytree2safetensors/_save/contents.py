"""The contents of a save: tensors, leaves and metadata, checked before anything is written.

Specification: *Saving*.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

import jax
import numpy as np

from pytree2safetensors._errors import UnsupportedLeafError
from pytree2safetensors._format.header import MAX_DIMENSIONS
from pytree2safetensors._format.layout import check_metadata
from pytree2safetensors._format.note import FORMAT, NOTE, Note, write_note
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.describe import (
    PYTHON_SCALARS,
    DeletedLeaf,
    attribute_of,
    describe,
    holds_array,
    is_deleted,
    is_sum,
    is_valueless,
)
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._messages import listed, plural, shorten
from pytree2safetensors._save.renamed import place, tensors_of
from pytree2safetensors._tree.flatten import Flat, flatten
from pytree2safetensors._tree.keypath import split
from pytree2safetensors._tree.paths import cut
from pytree2safetensors._tree.spelling import INDEX, ITEM


class Contents(NamedTuple):
    """What to write: the info of each tensor, its leaf, and the metadata."""

    infos: dict[str, TensorInfo]
    leaves: dict[str, Any]
    metadata: dict[str, str]


def collect(
    tree: Any,
    metadata: Mapping[str, str],
    unsupported: Literal["raise", "skip"],
    rename: Rename | None = None,
) -> Contents:
    """Check a whole tree before anything is written."""
    check_metadata(metadata)
    flat = flatten(tree)
    if rename is not None:
        return _collect_renamed(flat, metadata, unsupported, rename)
    found = describe(flat.leaves)
    unfit = [(flat.names[n], flat.leaves[n]) for n, info in enumerate(found) if info is None]
    if unfit:
        _check_unfit(unfit, skip=unsupported == "skip")
        leave_out([name for name, _ in unfit], flat)
    infos = dict(zip(flat.names, filter(None, found), strict=True))
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    kinds = {name: info.kind for name, info in infos.items() if info.kind is not None}
    for name in kinds:
        if not infos[name].dtype:  # the note contains the whole leaf
            del infos[name], leaves[name]
    if flat.kinds.get("") == "dict":
        del flat.kinds[""]  # a file without names and note is an empty dict
    note = write_note(Note(flat.kinds, kinds))
    whole = {**FORMAT, **metadata}
    if note is not None:
        whole[NOTE] = note
    return Contents(infos, leaves, whole)


def _collect_renamed(
    flat: Flat, metadata: Mapping[str, str], unsupported: Literal["raise", "skip"], rename: Rename
) -> Contents:
    """Check a tree for a file with other names, which has no note."""
    infos = describe(flat.leaves)
    found = [*zip(flat.names, flat.leaves, infos, strict=True)]
    if unsupported == "skip":
        found = [item for item in found if item[2] is not None or _loses_data(item[1])]
    placed, unfit = place(rename, found)
    if unfit:
        _check_unfit(unfit, skip=False)
    tensors, leaves = tensors_of(placed)
    return Contents(tensors, leaves, {**FORMAT, **metadata})


def _loses_data(leaf: Any) -> bool:
    """Return whether skipping a leaf that a file cannot hold would lose data."""
    return is_deleted(leaf) or is_sum(leaf) or is_valueless(leaf) or holds_array(leaf)


def _check_unfit(unfit: list[tuple[str, Any]], *, skip: bool) -> None:
    """Raise an error for leaves that a file cannot hold, unless they are skipped."""
    deleted = next((name for name, leaf in unfit if is_deleted(leaf)), None)
    if deleted is not None:
        raise DeletedLeaf(
            f"the array at {shorten(deleted)} was deleted or donated; save it before that, "
            "or save the array that replaced it"
        )
    unreduced = next((name for name, leaf in unfit if is_sum(leaf)), None)
    if unreduced is not None:
        raise UnsupportedLeafError(
            f"the array at {shorten(unreduced)} is unreduced: its values are sums over its shards; "
            "reduce it first, for example with jax.reshard"
        )
    valueless = any(_loses_data(leaf) for _, leaf in unfit)
    if valueless or not skip:
        raise UnsupportedLeafError(_unfit_message(unfit, valueless))


def _unfit_message(unfit: list[tuple[str, Any]], valueless: bool) -> str:
    lines = (f"{shorten(name)}: {_type_name(leaf)}{_hint(leaf)}" for name, leaf in unfit)
    own = any(not (_hint(leaf) or isinstance(leaf, np.ndarray | np.generic)) for _, leaf in unfit)
    register = _REGISTER if own else ""
    name, leaf = unfit[0]
    if name == "" and not valueless:  # without it, nothing would be saved
        found = f"{_type_name(leaf)}{_hint(leaf)}"
        return f"the tree is a single leaf, which cannot be stored: {found}.{register}"
    remedy = (
        "Only concrete arrays can be saved: call this outside of jit, grad and vmap, and save the "
        "array that a Ref or another object holds."
        if valueless
        else 'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of '
        f"its template.{register}"
    )
    first = f"{plural(len(unfit), 'leaf', 'leaves')} of the tree cannot be stored:"
    return "\n".join([first, *listed(lines, len(unfit), "  "), remedy])


_REGISTER: Final = " (To save an object of your own class, register the class as a pytree node.)"
_BASES: Final = (str, int, float, complex)


def _hint(leaf: Any) -> str:
    """Say how to convert a leaf to one that can be saved."""
    if isinstance(leaf, np.random.Generator):
        return ", whose .bit_generator.state can be saved"
    if isinstance(leaf, np.ma.MaskedArray):
        return ", whose .data and .mask can be saved"
    if isinstance(leaf, enum.Enum):
        return ", whose .value can be saved" if type(leaf.value) in PYTHON_SCALARS else ""
    if isinstance(leaf, bytes | bytearray):
        return ", which np.frombuffer(leaf, np.uint8) makes an array"
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "mM":
        return ", which .view(np.int64) makes integers"
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "U":
        return ", whose .tolist() can be saved"
    if isinstance(leaf, np.ndarray) and leaf.ndim == MAX_DIMENSIONS and leaf.dtype == np.complex128:
        return f", which needs a .reshape, because its tensor would have more than {MAX_DIMENSIONS} axes"
    base = next((base for base in _BASES if isinstance(leaf, base)), None)
    return "" if base in {None, type(leaf)} else f", which {base.__name__}(leaf) converts"


def _type_name(leaf: Any) -> str:
    kind = type(leaf)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(leaf, jax.core.Tracer):
        return f"{name}, a traced value"
    if kind is str:
        return f"{name} with the two halves of a surrogate pair, which JSON would join to one character"
    dtype = attribute_of(leaf, "dtype")
    return f"{name} of dtype {dtype}" if dtype is not None else name


def leave_out(names: Iterable[str], flat: Flat) -> None:
    """Remove leaves from a flattened tree, so that the rest is still a tree.

    Numbered children are replaced with `None`. Other children are removed with their names.
    """
    left_out = set(names)
    kept = [name for name in flat.names if name not in left_out]
    parents = _ancestors([*kept, *flat.kinds])
    keyless: dict[str, set[str]] = {}  # the segments that are removed from OrderedDicts
    for name in sorted(left_out, key=lambda name: len(split(name)), reverse=True):
        if not name:
            flat.kinds[name] = "None"
            continue
        parent, segment = cut(name)
        if segment[0] == INDEX:
            flat.kinds[name] = "None"
            parents |= _ancestors([name])
            continue
        kind = flat.kinds.get(parent)
        if isinstance(kind, list):
            keyless.setdefault(parent, set()).add(segment)
        elif parent not in parents:
            flat.kinds[parent] = "dict" if segment[0] == ITEM else "PyTreeContainer"
            parents |= _ancestors([parent])
    for parent, gone in keyless.items():
        kind = flat.kinds[parent]
        flat.kinds[parent] = [kind[0], [segment for segment in kind[1] if segment not in gone]]
    remaining = [
        (n, leaf) for n, leaf in zip(flat.names, flat.leaves, strict=True) if n not in left_out
    ]
    flat.names[:] = [name for name, _ in remaining]
    flat.leaves[:] = [leaf for _, leaf in remaining]


def _ancestors(names: Iterable[str]) -> set[str]:
    """Return the paths of all nodes above these names."""
    found: set[str] = set()
    for name in names:
        above = name
        while above and (above := cut(above)[0]) not in found:
            found.add(above)
    return found

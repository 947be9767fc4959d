"""Leaves that a file cannot hold: which may be left out, and what an error says about the others.

Specification: *Saving*.
"""

import enum
from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._errors import DeletedLeaf, UnsupportedLeafError
from pytree2safetensors._format.header import MAX_DIMENSIONS
from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.holders import holders_in, node_instead_of
from pytree2safetensors._leaves.unstorable import (
    attribute_of,
    is_deleted,
    is_of_other_library,
    is_unreduced_array,
    is_valueless,
)
from pytree2safetensors._messages import listed, plural, shorten, type_name


def lose_data(leaves: Sequence[Any]) -> list[bool]:
    """Return whether skipping each leaf, which a file cannot hold, would lose data."""
    holding = holders_in(leaves)
    return [
        holds or is_deleted(leaf) or is_unreduced_array(leaf) or _stands_for_arrays(leaf)
        for leaf, holds in zip(leaves, holding, strict=True)
    ]


def _stands_for_arrays(leaf: Any) -> bool:
    """Return whether a leaf stands for arrays, but has no values itself."""
    return is_valueless(leaf) or is_of_other_library(type(leaf))


def check_unsupported(unstorable: list[tuple[str, Any]], *, skip: bool) -> None:
    """Raise an error for leaves that a file cannot hold, unless they are skipped."""
    deleted = next((name for name, leaf in unstorable if is_deleted(leaf)), None)
    if deleted is not None:
        raise DeletedLeaf(
            f"the array at {shorten(deleted)} was deleted or donated; save it before that, "
            "or save the array that replaced it"
        )
    unreduced = next((name for name, leaf in unstorable if is_unreduced_array(leaf)), None)
    if unreduced is not None:
        raise UnsupportedLeafError(
            f"the array at {shorten(unreduced)} is unreduced: its values are sums over its shards; "
            "reduce it first, for example with jax.reshard"
        )
    valueless = [_stands_for_arrays(leaf) for _, leaf in unstorable]
    others = [
        None if known else leaf for (_, leaf), known in zip(unstorable, valueless, strict=True)
    ]
    holding = holders_in(others)
    if any(valueless) or any(holding) or not skip:
        raise UnsupportedLeafError(_unsupported_message(unstorable, holding, any(valueless)))


def _unsupported_message(
    unstorable: list[tuple[str, Any]], holding: list[bool], valueless: bool
) -> str:
    found = [
        f"{_type_name(leaf)}{_holder_hint(leaf) if holds else _hint(leaf)}"
        for (_, leaf), holds in zip(unstorable, holding, strict=True)
    ]
    remedy = _remedy(unstorable, holding, valueless)
    name, _ = unstorable[0]
    if name == "" and not valueless:  # skipping it would leave nothing to save
        remedy = remedy if holding[0] else _register(unstorable)
        return f"the tree is a single leaf, which cannot be stored: {found[0]}. {remedy}".strip()
    lines = (f"{shorten(name)}: {text}" for (name, _), text in zip(unstorable, found, strict=True))
    first = f"{plural(len(unstorable), 'leaf', 'leaves')} of the tree cannot be stored:"
    return "\n".join([first, *listed(lines, len(unstorable), "  "), remedy])


def _remedy(unstorable: list[tuple[str, Any]], holding: list[bool], valueless: bool) -> str:
    if not (valueless or any(holding)):
        remedy = (
            'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of '
            "its template."
        )
        return f"{remedy} {_register(unstorable)}".strip()
    remedies = [_CONCRETE] if valueless else []
    remedies += [_HOLDING] if any(holding) else []
    if not (valueless or all(holding)):
        remedies.append('Then unsupported="skip" leaves out the others.')
    return " ".join(remedies)


def _register(unstorable: list[tuple[str, Any]]) -> str:
    others = (np.ndarray, np.generic, type)
    own = any(not (_hint(leaf) or isinstance(leaf, others)) for _, leaf in unstorable)
    return _REGISTER if own else ""


_CONCRETE: Final = (
    "Only concrete arrays can be saved: call this outside jit, grad and vmap, and save the array "
    "that a Ref or another object holds."
)
_HOLDING: Final = (
    "Register the class of an object that holds arrays as a pytree node, for example with "
    "jax.tree_util.register_dataclass, or save its arrays instead."
)
_REGISTER: Final = "(To save an object of your own class, register the class as a pytree node.)"
_BASES: Final = (str, int, float, complex)


def _holder_hint(leaf: Any) -> str:
    """Say how to make an object that holds arrays a pytree node."""
    made = node_instead_of(leaf)
    return f", which holds arrays{f'; {made} is a pytree node' if made else ''}"


def _hint(leaf: Any) -> str:
    """Say how to convert a leaf to one that can be saved."""
    if isinstance(leaf, np.random.Generator):
        return ", whose .bit_generator.state can be saved"
    if isinstance(leaf, np.ma.MaskedArray):
        return ", whose .data and .mask can be saved"
    if isinstance(leaf, enum.Enum):
        return ", whose .value can be saved" if type(leaf.value) in PYTHON_SCALARS else ""
    if isinstance(leaf, bytes | bytearray):
        return ", which np.frombuffer(leaf, np.uint8) turns into an array"
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "mM":
        return ", which .view(np.int64) turns into integers"
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "U":
        return ", whose .tolist() can be saved"
    if isinstance(leaf, np.ndarray) and leaf.ndim == MAX_DIMENSIONS and leaf.dtype == np.complex128:
        return f", which needs a .reshape, because its tensor would have more than {MAX_DIMENSIONS} axes"
    base = next((base for base in _BASES if isinstance(leaf, base)), None)
    return "" if base is None or base is type(leaf) else f", which {base.__name__}(leaf) converts"


def _type_name(leaf: Any) -> str:
    kind = type(leaf)
    name = type_name(kind)
    if isinstance(leaf, jax.core.Tracer):
        return f"{name}, a traced value"
    if kind is str:
        return f"{name} with the two halves of a surrogate pair, which JSON would join to one character"
    dtype = None if isinstance(leaf, type) else attribute_of(leaf, "dtype")
    return f"{name} of dtype {dtype}" if dtype is not None else name

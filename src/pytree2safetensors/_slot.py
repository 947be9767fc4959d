"""Slots: what a leaf of a template asks for, and whether a stored leaf fits."""

from typing import Any, Final, Literal, NamedTuple

import jax
import numpy as np

from pytree2safetensors._leaf import (
    PYTHON_SCALARS,
    Logical,
    form_of,
    holds_value,
    implementation_of,
    is_key_dtype,
    key_shape,
    rank_of,
)
from pytree2safetensors._literal import show as show_value

_RANKS: Final = {"bool": 0, "int": 2, "float": 3, "complex": 4}


class Slot(NamedTuple):
    """What a template leaf asks for: a leaf without its values, and where these shall live."""

    leaf: Logical
    target: Literal["jax", "numpy", "scalar", "python"]
    sharding: jax.sharding.Sharding | None = None
    abstract: bool = False


def slot_of(leaf: Any) -> Slot | None:
    """What a leaf of a template asks for; None where it is no data."""
    kind = type(leaf)
    if kind in PYTHON_SCALARS:
        return Slot(Logical(kind.__name__, None, ()), "python")  # type: ignore[arg-type] # one of the literals
    if isinstance(leaf, np.ma.MaskedArray):
        return None
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return None
    if isinstance(leaf, np.ndarray | np.generic):
        if form_of(leaf.dtype, leaf.shape) is None:
            return None
        target: Literal["numpy", "scalar"] = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
        return Slot(Logical("array", leaf.dtype.newbyteorder("="), leaf.shape), target)
    abstract = not isinstance(leaf, jax.Array)
    lost = abstract or (not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted())
    sharding = getattr(leaf, "sharding", None) if abstract else _committed_sharding(leaf)
    try:
        is_key = is_key_dtype(dtype)
        dtype = dtype if is_key else np.dtype(dtype)
    except TypeError:  # an array of another library
        return None
    if is_key:
        impl = implementation_of(dtype)
        if impl is None:
            return None
        return Slot(Logical("key", None, shape, impl=impl), "jax", sharding, lost)
    weak = bool(getattr(leaf if abstract else leaf.aval, "weak_type", False))
    return Slot(Logical("array", dtype, shape, weak), "jax", sharding, lost)


def _committed_sharding(leaf: jax.Array) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.core.Tracer):
        return None
    committed = getattr(leaf, "committed", None)  # before JAX 0.5 under its private name alone
    if committed is None:
        committed = getattr(leaf, "_committed", True)
    return leaf.sharding if committed else None


def misfit(slot: Slot, stored: Logical, value: Any, *, cast: bool) -> str | None:
    """Why a stored leaf does not fit a slot; None where it does.

    `value` is that of a stored Python scalar.
    """
    wanted = slot.leaf
    fits = False
    if wanted.kind == "key" and stored.kind == "array":
        data = (*wanted.shape, *key_shape(wanted.impl, ""))
        fits = stored.dtype == np.uint32 and stored.shape == data
    elif wanted.kind in {"key", "str"} or stored.kind in {"key", "str"}:
        fits = (wanted.kind, wanted.impl, wanted.shape) == (stored.kind, stored.impl, stored.shape)
    elif wanted.shape == stored.shape:
        fits = _dtype_fits(wanted, stored, value, cast)
    if fits:
        return None
    of = f" ({show_value(value)})" if value is not None else ""
    return f"the template has {show(wanted)}, and stored is {show(stored)}{of}"


def _dtype_fits(wanted: Logical, stored: Logical, value: Any, cast: bool) -> bool:
    ranks = _rank_of(wanted), _rank_of(stored)
    if wanted.dtype is not None and stored.dtype is not None:
        return wanted.dtype == stored.dtype or (cast and ranks[1] <= ranks[0])
    same = ranks[0] == ranks[1] or (ranks[0] == 1 and ranks[1] == 2) or ranks == (2, 1)
    if not same and not (cast and ranks[1] <= ranks[0]):
        return False
    dtype = wanted.dtype
    if dtype is None and wanted.kind in {"float", "complex"}:
        dtype = np.dtype(wanted.kind)
    return dtype is None or value is None or holds_value(dtype, value)


def _rank_of(leaf: Logical) -> int:
    return _RANKS[leaf.kind] if leaf.dtype is None else rank_of(leaf.dtype)


def show(leaf: Logical) -> str:
    """A leaf without its values, for messages."""
    if leaf.kind not in {"array", "key"}:
        return f"a Python {leaf.kind}"
    shape = ",".join(map(str, leaf.shape))
    return f"key<{leaf.impl}>[{shape}]" if leaf.kind == "key" else f"{leaf.dtype}[{shape}]"


def to_python(values: Any, wanted: Logical) -> Any:
    """The Python scalar of a 0-d array or of another scalar."""
    types = {"int": int, "float": float, "bool": bool, "complex": complex}
    return types[wanted.kind](values.item() if hasattr(values, "item") else values)

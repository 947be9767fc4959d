"""Leaves of a dictionary, converted for a template.

Specification: *Loading into a template*.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors._leaves.cast import to_host
from pytree2safetensors._leaves.holders import holders_in
from pytree2safetensors._leaves.host import host_array
from pytree2safetensors._leaves.jax_versions import WITHOUT_PROGRAMS
from pytree2safetensors._leaves.meshes import computed
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.to_jax import is_traced, own_programs, to_jax, weaken, wrap_key
from pytree2safetensors._leaves.unstorable import (
    is_deleted,
    is_of_other_library,
    is_unreduced_array,
    is_valueless,
)
from pytree2safetensors._leaves.views import View, leaf_of
from pytree2safetensors._load.shardings import is_elsewhere, place
from pytree2safetensors._load.template import TemplateLeaf, to_python
from pytree2safetensors._messages import type_name

_BATCH: Final = 1 << 26  # bytes: copies for one call of JAX


def given_spec(leaf: TemplateLeaf | None, value: Any) -> LeafSpec | None:
    """Describe a leaf of a dictionary; None if it has no values."""
    if leaf is None or leaf.abstract:
        return None
    return TracedSpec(*leaf.spec) if isinstance(value, jax.core.Tracer) else leaf.spec


def ignored_data(pairs: Sequence[tuple[Any, Any]]) -> list[str | None]:
    """Return why leaves of a dictionary cannot replace leaves of a template, if neither is stored.

    None for functions and settings: the template keeps its own.
    """
    changed = [not _is_same(leaf, value) for leaf, value in pairs]
    holding = iter(holders_in([one for pair in compress(pairs, changed) for one in pair]))
    reasons: list[str | None] = []
    for pair, is_changed in zip(pairs, changed, strict=True):
        texts = [_unstorable(one, next(holding)) for one in pair] if is_changed else []
        reasons.append(_ignored(*texts) if any(is_data for _, is_data in texts) else None)
    return reasons


def _is_same(leaf: Any, value: Any) -> bool:
    """Return whether a value is the template's own leaf, or an array of NumPy that equals it."""
    if leaf is value:
        return True
    if type(leaf) is not type(value) or not isinstance(value, np.ndarray | np.generic):
        return False
    if isinstance(value, np.ma.MaskedArray) or leaf.dtype != value.dtype or leaf.dtype.hasobject:
        return False
    return np.array_equal(leaf, value)


def _ignored(leaf: tuple[str, bool], value: tuple[str, bool]) -> str:
    return (
        f"the template has {leaf[0]}, and the given value is {value[0]}; neither can be loaded, so convert "
        "both to what a file can hold"
    )


def _unstorable(leaf: Any, holds: bool) -> tuple[str, bool]:
    """Say what a leaf is that no file can hold, and whether it is data."""
    if is_deleted(leaf):
        return "a deleted array", True
    if is_valueless(leaf):
        return "an array without values", True
    name = f"a {type_name(type(leaf))}"
    if isinstance(leaf, np.ndarray | np.generic):
        return f"{name} of dtype {leaf.dtype}", True
    is_data = holds or is_unreduced_array(leaf) or is_of_other_library(type(leaf))
    return f"{name}, which is or holds arrays" if is_data else name, is_data


def fitted(pairs: Iterable[tuple[TemplateLeaf, Any]]) -> list[Any]:
    """Convert leaves of a dictionary for leaves of the template, which have concrete shardings."""
    found: list[Any] = []
    batch: list[tuple[TemplateLeaf, Any]] = []
    nbytes = 0
    for leaf, value in pairs:
        copied = _copied(leaf, value)
        batch.append((leaf, copied))
        nbytes += copied.nbytes if isinstance(copied, np.ndarray) else 0
        if nbytes >= _BATCH:
            found += _finished(batch)
            batch, nbytes = [], 0
    return found + _finished(batch)


def seen_through(view: View, dictionary: Mapping[str, Any], leaf: TemplateLeaf) -> Any:
    """Return the leaf that a rule makes of entries of a dictionary."""
    values = [dictionary[name] for name in view.names]
    if len({value.dtype for value in values}) > 1:  # each is converted, not to a common dtype first
        unplaced = leaf._replace(sharding=None, format=None)
        if leaf.target == "jax" and not _has_jax(values):  # they are joined on the host
            unplaced = unplaced._replace(target="numpy")
        values = fitted((unplaced, value) for value in values)
    if _has_jax(values):
        return computed(lambda found: _made_of(view, found, jnp.stack), values)
    return _made_of(view, map(host_array, values), np.stack)


def _has_jax(values: Iterable[Any]) -> bool:
    return any(isinstance(value, jax.Array) for value in values)


def _made_of(view: View, arrays: Iterable[Any], stack: Any) -> Any:
    if not view.names:
        return np.zeros(view.shape, np.bool_)  # a stack of no tensors, of any dtype
    return leaf_of(view, dict(zip(view.names, arrays, strict=True)), stack)


def _copied(leaf: TemplateLeaf, value: Any) -> Any:
    """Convert a leaf on the host. A JAX array is converted here only if JAX cannot do it."""
    if leaf.target == "python":
        return value if type(value) is str else to_python(value, leaf.spec)
    dtype = leaf.spec.dtype
    copied = leaf.target != "jax" or not isinstance(value, jax.Array)
    if copied or (value.dtype != dtype and not _is_cast_by_jax(leaf, value)):
        # A copy, because JAX would use the memory of the caller's array.
        host = np.array(to_host(value, dtype), order="C")
        return host[()] if leaf.target == "scalar" else host
    return value


def _is_cast_by_jax(leaf: TemplateLeaf, value: jax.Array) -> bool:
    """Return whether JAX converts an array for a leaf of another dtype."""
    if leaf.spec.dtype is None or isinstance(value, jax.core.Tracer):
        return True
    names = {value.dtype.name, leaf.spec.dtype.name}
    return names.isdisjoint(WITHOUT_PROGRAMS) or not value.is_fully_addressable


def _finished(batch: Sequence[tuple[TemplateLeaf, Any]]) -> list[Any]:
    """Make JAX arrays of arrays on the host, and convert and place all JAX arrays."""
    with own_programs():
        traced = any(leaf.sharding is not None for leaf, _ in batch) and is_traced()
        hosts = {
            position: value
            for position, (leaf, value) in enumerate(batch)
            if isinstance(value, np.ndarray) and _is_unplaced(leaf, traced)
        }
        found = [value for _, value in batch]
        for position, made in zip(hosts, to_jax([*hosts.values()]), strict=True):
            found[position] = weaken(made) if _is_weak(batch[position][0]) else made
        return [_placed(leaf, value) for (leaf, _), value in zip(batch, found, strict=True)]


def _is_unplaced(leaf: TemplateLeaf, traced: bool) -> bool:
    """Return whether values become an array on the default device, where programs may follow.

    It may be too small for other arrays. JAX decides where traced ones are.
    """
    unplaced = traced or leaf.sharding is None or leaf.spec.kind == "key" or _is_weak(leaf)
    return leaf.target == "jax" and unplaced


def _is_weak(leaf: TemplateLeaf) -> bool:
    return leaf.spec.weak and not leaf.spec.shape


def _placed(leaf: TemplateLeaf, value: Any) -> Any:
    if leaf.target != "jax":
        return value
    if leaf.spec.dtype is not None and value.dtype != leaf.spec.dtype:
        value = value.astype(leaf.spec.dtype)
    if leaf.spec.kind == "key" and value.dtype == np.uint32:
        value = wrap_key(value, leaf.spec.impl)
    if leaf.sharding is None or isinstance(value, jax.core.Tracer):
        return value  # JAX decides where a traced value is
    placed = place(value, leaf.sharding)
    # JAX makes wrong shards of an array without values.
    if leaf.format is None or not placed.size or is_elsewhere(leaf.sharding):
        return placed
    return jax.device_put(placed, leaf.format)

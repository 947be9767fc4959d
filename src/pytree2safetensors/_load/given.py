"""Leaves of a dictionary, converted for a template."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors._leaves.decode import to_host
from pytree2safetensors._leaves.encode import host_array
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.to_jax import own_programs, to_jax, weaken, wrap_key
from pytree2safetensors._leaves.views import View, leaf_of
from pytree2safetensors._load.sharded import concrete, place
from pytree2safetensors._load.template import TemplateLeaf, to_python


def given_spec(slot: TemplateLeaf | None, value: Any) -> LeafSpec | None:
    """Describe a leaf of a dictionary; None if it has no values."""
    if slot is None or slot.abstract:
        return None
    return TracedSpec(*slot.leaf) if isinstance(value, jax.core.Tracer) else slot.leaf


def seen_through(view: View, dictionary: Mapping[str, Any]) -> Any:
    """Return the leaf that a rule makes of entries of a dictionary."""
    given = {name: dictionary[name] for name in view.names}
    if any(isinstance(value, jax.Array) for value in given.values()):
        return leaf_of(view, {name: jnp.asarray(given[name]) for name in given}, jnp.stack)
    return leaf_of(view, {name: host_array(given[name]) for name in given}, np.stack)


def fitted(slot: TemplateLeaf, value: Any) -> Any:
    """Convert a leaf of a dictionary for a leaf of the template."""
    if slot.target == "python":
        return value if type(value) is str else to_python(value, slot.leaf)
    dtype = slot.leaf.dtype
    copied = slot.target in {"numpy", "scalar"} or not isinstance(value, jax.Array)
    if copied or (slot.target == "foreign" and value.dtype != dtype):  # JAX would narrow it
        # A copy, because JAX would use the memory of the caller's array.
        host = np.array(to_host(value, dtype), order="C")
        if slot.target != "jax":
            return host[()] if slot.target == "scalar" else host
        with own_programs():
            value = to_jax([host])[0]
        if slot.leaf.weak:
            value = weaken(value)
    elif dtype is not None and value.dtype != dtype:
        value = value.astype(dtype)
    if slot.leaf.kind == "key" and value.dtype == np.uint32:
        value = wrap_key(value, slot.leaf.impl)
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return value  # JAX decides where a traced value is
    sharding = None if slot.sharding is None else concrete(slot.sharding)
    return value if sharding is None else place(value, sharding)

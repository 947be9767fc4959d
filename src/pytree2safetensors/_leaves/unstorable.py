"""Arrays that a file cannot hold: deleted, unreduced, without values, or of other libraries.

Specification: *Saving*, *Loading into a template*.
"""

from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._leaves.jax_versions import REFERENCE
from pytree2safetensors._leaves.placement import is_concrete, is_unreduced


def is_deleted(leaf: Any) -> bool:
    """Return whether a leaf is an array that was deleted or donated."""
    return is_concrete(leaf) and leaf.is_deleted()


def attribute_of(leaf: Any, name: str) -> Any:
    """Return an attribute of a leaf of any type; None if it cannot be read."""
    try:
        return getattr(leaf, name, None)
    except Exception:  # noqa: BLE001 - a property of any type may raise anything
        return None


CONVERSIONS: Final = ("__array__", "__dlpack__", "__jax_array__")  # of arrays of other libraries


def is_of_other_library(kind: type) -> bool:
    """Return whether objects of a type convert themselves to arrays, as arrays of other libraries do."""
    own = issubclass(kind, np.ndarray | np.generic | jax.Array | jax.core.Tracer)
    return not own and any(hasattr(kind, name) for name in CONVERSIONS)


def is_unreduced_array(leaf: Any) -> bool:
    """Return whether a leaf is an unreduced array, whose values are sums over its shards."""
    return is_concrete(leaf) and is_unreduced(leaf.sharding)


def is_valueless(leaf: Any) -> bool:
    """Return whether a leaf is an array without its own values: traced, abstract, or a reference."""
    return isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct, REFERENCE))

"""Template leaves: what each needs, and whether a stored leaf fits.

Specification: *Loading into a template*.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from pytree2safetensors._leaves.describe import PYTHON_SCALARS, info_of
from pytree2safetensors._leaves.jax_versions import REFERENCE, explicit_format
from pytree2safetensors._leaves.prng_keys import implementation_of, is_key_dtype
from pytree2safetensors._leaves.spec import LeafSpec, jax_holds
from pytree2safetensors._leaves.unstorable import attribute_of, is_of_other_library

PYTHON_NUMBERS: Final = {"int": int, "float": float, "bool": bool, "complex": complex}

# What a stored leaf becomes: a JAX array; a NumPy array because JAX does not support its dtype
# here ("foreign") or because the template has one; a NumPy scalar; a Python scalar.
Target: TypeAlias = Literal["jax", "foreign", "numpy", "scalar", "python"]


class TemplateLeaf(NamedTuple):
    """What a template leaf needs: a leaf without its values, and where to place them."""

    spec: LeafSpec
    target: Target
    sharding: jax.sharding.Sharding | None = None
    abstract: bool = False
    format: Any = None  # the layout on its device, with the sharding, if it asks for one


class _Look(NamedTuple):
    """What matters of a template leaf. Leaves that look the same share one object."""

    target: Target
    shape: tuple[int, ...]
    dtype: Any
    weak: bool = False
    sharding: jax.sharding.Sharding | None = None
    abstract: bool = False
    format: Any = None


def template_leaves(leaves: Iterable[Any]) -> list[TemplateLeaf | None]:
    """Return what the leaves of a template need; None for those that are not data."""
    # By the ids of types, because not every class can be hashed.
    lookers: dict[int, Callable[[Any], _Look | None]] = {}
    known: dict[_Look | None, TemplateLeaf | None] = {None: None}
    found: list[TemplateLeaf | None] = []
    for leaf in leaves:
        kind = type(leaf)
        looker = lookers.get(id(kind))
        if looker is None:
            looker = lookers[id(kind)] = _looker(kind)
        look = looker(leaf)
        if look is not None and look not in known:
            known[look] = _leaf_of(look)
        found.append(known[look])
    return found


def _looker(kind: type) -> Callable[[Any], _Look | None]:
    """Return the function that looks at leaves of a type."""
    if any(kind is scalar for scalar in PYTHON_SCALARS):
        return lambda _: _Look("python", (), kind.__name__)
    if issubclass(kind, (np.ma.MaskedArray, REFERENCE)):
        return lambda _: None
    if issubclass(kind, np.ndarray):
        return lambda leaf: _Look("numpy", leaf.shape, leaf.dtype)
    if issubclass(kind, np.generic):
        return lambda leaf: _Look("scalar", leaf.shape, leaf.dtype)
    if issubclass(kind, jax.core.Tracer):
        return _look_at_tracer
    if issubclass(kind, jax.Array):
        return _look_at_array
    # An array of another library has values, so it is not abstract although it has a shape.
    return (lambda _: None) if is_of_other_library(kind) else _look_at_any


def _look_at_array(leaf: jax.Array) -> _Look:
    aval = leaf.aval
    committed = getattr(leaf, "committed", None)
    if committed is None:  # pragma: no cover - before JAX 0.5, it has a private name
        committed = getattr(leaf, "_committed", True)
    sharding = leaf.sharding if committed else None
    return _Look("jax", aval.shape, aval.dtype, aval.weak_type, sharding, leaf.is_deleted())


def _look_at_tracer(leaf: Any) -> _Look | None:
    seen = _shape_and_dtype(leaf)
    if seen is None or not isinstance(leaf.aval, jax.core.ShapedArray):  # a reference to an array
        return None
    weak = bool(leaf.aval.weak_type)
    # A traced array has a value, but no place.
    return _Look("jax", *seen, weak, abstract=not isinstance(leaf, jax.Array))


def _look_at_any(leaf: Any) -> _Look | None:
    seen = _shape_and_dtype(leaf)
    if seen is None:
        return None
    sharding = attribute_of(leaf, "sharding")
    mesh = getattr(sharding, "mesh", None)  # the type of an array without a mesh has an empty one
    if not isinstance(sharding, jax.sharding.Sharding) or getattr(mesh, "empty", False):
        sharding = None
    weak = bool(attribute_of(leaf, "weak_type"))
    return _Look("jax", *seen, weak, sharding, True, explicit_format(leaf))


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    shape, dtype = attribute_of(leaf, "shape"), attribute_of(leaf, "dtype")
    if not isinstance(shape, tuple) or dtype is None:
        return None
    try:
        hash(shape)
        return shape, dtype if is_key_dtype(dtype) else np.dtype(dtype)
    except TypeError:  # an array of another library
        return None


def _leaf_of(look: _Look) -> TemplateLeaf | None:
    target, shape, dtype, weak, sharding, abstract, layout = look
    if target == "python":
        return TemplateLeaf(LeafSpec(dtype, None, ()), target)
    if target != "jax":
        if info_of(dtype, shape) is None:
            return None
        return TemplateLeaf(LeafSpec("array", dtype.newbyteorder("="), shape), target)
    if is_key_dtype(dtype):
        impl = implementation_of(dtype)
        if impl is None:
            return None
        return TemplateLeaf(LeafSpec("key", None, shape, impl=impl), target, sharding, abstract)
    target = "jax" if jax_holds(dtype) else "foreign"
    spec = LeafSpec("array", dtype.newbyteorder("="), shape, weak)
    return TemplateLeaf(spec, target, sharding, abstract, layout)


def to_python(values: Any, wanted: LeafSpec) -> Any:
    """Convert a 0-d array or another scalar to a Python scalar."""
    return PYTHON_NUMBERS[wanted.kind](values.item() if hasattr(values, "item") else values)

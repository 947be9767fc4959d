"""Shims for versions of JAX, which rename and add names."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any, Final

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

# JAX has no types for these.
block_until_ready: Any = jax.block_until_ready
ShapeDtypeStruct: Any = jax.ShapeDtypeStruct
_VERSION: Final[Any] = jax.__version_info__
# The type of references to arrays, which is public since JAX 0.8.
REFERENCE: Final[Any] = getattr(jax, "Ref", ())
# JAX has arrays of these dtypes, but some of its programs for them fail, or end the process.
WITHOUT_PROGRAMS: Final = frozenset(
    {"int1", "int2", "uint1", "uint2", "float6_e2m3fn", "float6_e3m2fn"}
    | ({"int4", "uint4"} if _VERSION < (0, 5) else set())
)


@lru_cache(maxsize=1)
def structs_are_weak() -> bool:
    """Return whether a `jax.ShapeDtypeStruct` can have a weak type."""
    try:
        ShapeDtypeStruct((), np.float32, weak_type=True)
    except TypeError:  # pragma: no cover - in JAX 0.4.31 and older, a struct has no weak type
        return False
    return True


def has_empty_arrays() -> bool:
    """Return whether JAX makes arrays whose devices all belong to other processes."""
    return bool(_VERSION >= (0, 7, 1))


def has_mesh() -> bool:
    """Return whether a mesh is set here."""
    sharding: Any = jax.sharding
    current = getattr(sharding, "get_abstract_mesh", None)  # JAX 0.5.0 and older lack it
    return current is not None and not current().empty


@contextmanager
def no_mesh() -> Iterator[None]:
    """Unset the mesh that is set here."""
    sharding: Any = jax.sharding
    with ExitStack() as stack:
        if has_mesh():
            enter = getattr(jax, "set_mesh", None) or sharding.use_mesh  # its name before JAX 0.8
            with suppress(ValueError):  # a trace keeps the mesh that it began with
                stack.enter_context(enter(sharding.Mesh(np.empty((), object), ())))
        yield


def enable_x64(enabled: bool) -> Any:
    """Return a context manager that turns 64-bit types on or off."""
    experimental: Any = jax.experimental  # its place before JAX 0.8
    return (jax if hasattr(jax, "enable_x64") else experimental).enable_x64(enabled)


def explicit_format(leaf: Any) -> Any:
    """Return the device layout that an abstract array asks for, with its sharding; None if none."""
    found = getattr(leaf, "format", None) or getattr(leaf, "layout", None)  # its name before 0.7
    layout = getattr(found, "layout", None) or getattr(found, "device_local_layout", None)
    return None if layout is None else found


def with_sharding(format_: Any, sharding: Any) -> Any:
    """Return the device layout of a format with another sharding; None stays None."""
    if format_ is None:
        return None
    layout = getattr(format_, "layout", None) or format_.device_local_layout  # as above
    return type(format_)(layout, sharding)


def pinned_sharding(sharding: Any) -> Any:
    """Return the sharding in pinned host memory, or None."""
    try:
        return sharding.with_memory_kind("pinned_host")
    except (AttributeError, NotImplementedError, ValueError):
        return None


def concatenated(arrays: Sequence[Any], axis: int) -> Any:
    """Join JAX arrays on an axis, as `jnp.concatenate` does.

    Before JAX 0.5, `jnp.concatenate` gives wrong values for arrays that are spread over some axes of
    a mesh and copied over others.
    """
    if _VERSION >= (0, 5) or not any(map(_is_spread, arrays)):
        return jnp.concatenate(arrays, axis)
    # Coverage is measured with a newer JAX.
    return _written_together(arrays, axis)  # pragma: no cover


def _written_together(arrays: Sequence[Any], axis: int) -> Any:  # pragma: no cover - as above
    if len(arrays) == 1:
        return arrays[0]
    middle = len(arrays) // 2
    first, second = (_written_together(half, axis) for half in (arrays[:middle], arrays[middle:]))
    shape = list(first.shape)
    shape[axis] += second.shape[axis]
    whole = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(shape, first.dtype), first, 0, axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, second, first.shape[axis], axis)


def _is_spread(array: Any) -> bool:  # pragma: no cover - as above
    return not isinstance(array, jax.core.Tracer) and len(array.sharding.device_set) > 1

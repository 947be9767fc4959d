"""Where arrays are: on the host, which reads them in place, or on other devices.

Specification: *Leaves*.
"""

from functools import lru_cache
from typing import Any, Final, TypeGuard

import jax

_HOST_MEMORY: Final = frozenset({"pinned_host", "unpinned_host"})


@lru_cache(256)  # asked for each leaf of a tree, which are of few types
def is_array_type(kind: type) -> bool:
    """Return whether instances of a type are JAX arrays."""
    return issubclass(kind, jax.Array)


def is_on_host(device: jax.Device) -> bool:
    """Return whether a device keeps arrays in host memory, so that it can use memory of NumPy."""
    return str(device.platform) == "cpu"


def has_other_devices() -> bool:
    """Return whether this process may have devices whose arrays are not host memory."""
    # JAX lists the devices of the first platform in JAX_PLATFORMS only.
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined] # JAX gives it no type
    return "," in (platforms or "") or not all(map(is_on_host, jax.local_devices()))


def is_concrete(leaf: Any) -> TypeGuard[jax.Array]:
    """Return whether a leaf is a JAX array that is not traced, so it is somewhere."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def is_packed(dtype: Any) -> bool:
    """Return whether devices may keep several items of a dtype in a byte."""
    return bool(dtype.kind == "V" and dtype.itemsize == 1)


def is_in_place(array: jax.Array) -> bool:
    """Return whether an array is in host memory. Other devices may lay it out in their own way there."""
    if is_packed(array.dtype):
        return False
    sharding: Any = array.sharding
    return sharding.memory_kind in _HOST_MEMORY or is_on_host(next(iter(sharding.device_set)))


def is_in_numpys_layout(array: jax.Array) -> bool:
    """Return whether NumPy reads an array in place, unless the user asked JAX for another layout."""
    if is_packed(array.dtype):
        return False
    return is_on_host(next(iter(array.sharding.device_set)))


def is_unreduced(sharding: Any) -> bool:
    """Return whether the shards of an array have to be summed to get its values."""
    spec = getattr(sharding, "spec", None)
    return bool(getattr(spec, "unreduced", None))  # older JAX has no such axes


def computes(array: jax.Array) -> bool:
    """Return whether JAX computes with an array in place, and does not only keep it there."""
    sharding: Any = array.sharding
    is_kept = sharding.memory_kind in _HOST_MEMORY
    return not is_kept or is_on_host(next(iter(sharding.device_set)))

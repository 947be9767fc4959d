"""Shardings: where an array can be, and placing it there.

Specification: *Loading into a template*.
"""

from contextlib import suppress
from typing import Any, Final

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.host import host_array
from pytree2safetensors._leaves.jax_versions import WITHOUT_PROGRAMS, has_empty_arrays
from pytree2safetensors._leaves.placement import is_unreduced
from pytree2safetensors._leaves.prng_keys import is_key_dtype
from pytree2safetensors._leaves.to_jax import weaken, x64_for

_ANY_MESH: Final = getattr(jax.sharding, "AbstractMesh", ())  # JAX 0.4.30 has none


def concrete(sharding: Sharding) -> Sharding | None:
    """Return a sharding with devices: those of the current mesh if it has none; None if they do not fit."""
    mesh = getattr(sharding, "mesh", None)
    if not isinstance(mesh, _ANY_MESH):
        return sharding
    current: Any = None
    with suppress(ValueError):  # JAX gives none within `jax.jit`
        current = getattr(jax.sharding, "get_mesh", lambda: None)()
    if current is None or current.empty or current.shape_tuple != mesh.shape_tuple:
        return None
    found: Any = sharding  # a sharding with a mesh also has a spec
    return NamedSharding(current, found.spec, memory_kind=found.memory_kind)


def misplaced(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    """Return why an array of this shape cannot have a sharding; None if it can."""
    found = concrete(sharding)
    if found is None:
        return (
            "the sharding that the template has for it names no devices, because its mesh is abstract; "
            "load under jax.set_mesh and outside of jax.jit, or give the template concrete shardings"
        )
    if is_unreduced(found):
        return "its template has an unreduced sharding; give it one that holds whole values"
    if is_elsewhere(found) and not has_empty_arrays():
        return (
            "all devices of its template's sharding belong to other processes, and this JAX makes no such "
            "arrays; use JAX 0.7.1 or newer"
        )
    reason = refusal(found, shape)
    return reason and f"it does not fit the sharding of its template: {reason}"


def refusal(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    """Return why JAX refuses to split this shape by a sharding; None if it does not."""
    # `shard_shape` accepts some shapes with fewer axes, and its error for others says nothing.
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return f"the sharding has more axes: {sharding}"
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return str(error)
    return None


def place(value: Any, sharding: Sharding) -> jax.Array:
    """Place the values of an array, of JAX or NumPy, in a sharding that may span several processes.

    For use within `own_programs`.
    """
    with x64_for([value]):
        placed = _placed(value, sharding)
        is_weak = isinstance(value, jax.Array) and value.aval.weak_type
        is_lost = is_weak and not (value.shape or placed.aval.weak_type)
        return weakened(placed, sharding) if is_lost else placed


def _placed(value: Any, sharding: Sharding) -> jax.Array:
    is_global = not getattr(value, "is_fully_addressable", True)
    has_programs = value.dtype.name not in WITHOUT_PROGRAMS
    # JAX 0.8 does not move an empty array to the same devices in another order.
    if is_global or (value.size and has_programs and is_ordinary(sharding, value.shape)):
        is_moved = isinstance(value, jax.Array)
        return _moved(value, sharding) if is_moved else jax.device_put(value, sharding)
    if is_elsewhere(sharding):
        return without_shards(value, sharding)
    if is_key_dtype(value.dtype):
        shards = [
            jax.device_put(value[index], on_device(device, sharding))
            for device, index in sharding.addressable_devices_indices_map(value.shape).items()
        ]
        return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)
    host = host_array(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def weakened(array: jax.Array, sharding: Sharding | None) -> jax.Array:
    """Make a 0-d array in a sharding weakly typed."""
    weak = weaken(array)
    return weak if sharding is None else jax.device_put(weak, sharding)


def _moved(value: jax.Array, sharding: Sharding) -> jax.Array:
    devices: Any = value.sharding.device_set | sharding.device_set
    if len(devices) > 1 and value.sharding != sharding:
        # JAX cannot change the devices and the kind of memory at once.
        value = jax.device_put(value, _in_default_memory(value.sharding))
        ordinary = _in_default_memory(sharding)

        def move(arrays: list[Any]) -> Any:
            return jax.device_put(arrays[0], ordinary)

        # JAX spreads the bits of an empty array over other devices.
        value = moved_as_bits(move, [value]) if value.size else move([value])
    # This gives the array the sharding in its own form, or in another kind of memory.
    moved: jax.Array = jax.device_put(value, sharding)
    return moved


def _in_default_memory(sharding: Sharding) -> Sharding:
    """Return a sharding whose arrays are in the default memory of its devices."""
    # An old JAX refuses any kind on CPUs, and changes the shape of a PositionalSharding.
    if other_memory(sharding) is None:
        return sharding
    return sharding.with_memory_kind(_default_kind(sharding))


def other_memory(sharding: Sharding | None) -> str | None:
    """Return the kind of memory of a sharding's arrays; None for the default one of its devices."""
    kind: str | None = getattr(sharding, "memory_kind", None)
    return None if sharding is None or kind is None or kind == _default_kind(sharding) else kind


def _default_kind(sharding: Sharding) -> str:
    device: Any = next(iter(sharding.device_set))
    return str(device.default_memory().kind)


def is_elsewhere(sharding: Sharding) -> bool:
    """Return whether all devices of a sharding belong to other processes."""
    return not sharding.addressable_devices


def without_shards(like: Any, sharding: Sharding) -> jax.Array:
    """Make an array with a shape and a dtype, whose devices all belong to other processes."""
    make: Any = jax.make_array_from_single_device_arrays  # older JAX takes no dtype
    array: jax.Array = make(like.shape, sharding, [], dtype=like.dtype)
    return array


def is_ordinary(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    """Return whether JAX can place this process's part in a sharding.

    The shards that pmap makes lack an axis, and JAX puts nothing into its shardings.
    """
    return sharding.is_fully_addressable and len(sharding.shard_shape(shape)) == len(shape)


def on_device(device: jax.Device, sharding: Sharding) -> Sharding:
    """Return the sharding of the part of an array on one of its devices."""
    return SingleDeviceSharding(device, memory_kind=getattr(sharding, "memory_kind", None))

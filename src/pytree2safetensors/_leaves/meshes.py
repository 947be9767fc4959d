"""Arrays over meshes with explicit axes.

Specification: *Rules*.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.host import host_array
from pytree2safetensors._leaves.jax_versions import WITHOUT_PROGRAMS
from pytree2safetensors._leaves.placement import is_concrete
from pytree2safetensors._leaves.to_jax import own_programs, to_jax

_EXPLICIT: Final = getattr(getattr(jax.sharding, "AxisType", None), "Explicit", None)  # newer JAX


def computed(make: Callable[[list[Any]], Any], leaves: Sequence[Any]) -> Any:
    """Compute an array from leaves, as arrays of JAX, and let JAX choose its sharding.

    On a mesh with explicit axes, each operation would have to name the sharding of its result.
    """
    explicit: dict[Mesh, Mesh] = {}  # by the mesh with the same axes, which are not explicit
    found = []
    with own_programs(leaves):
        for leaf in leaves:
            mesh = _explicit_mesh(leaf)
            if mesh is None:
                found.append(_of_jax(leaf))
            else:
                free = Mesh(mesh.devices, mesh.axis_names)
                explicit[free] = mesh
                found.append(_moved(leaf, free))
        made = _made(make, found)
        used: Any = getattr(made.sharding, "mesh", None) if explicit else None
        return _moved(made, explicit[used]) if used in explicit else made


def _made(make: Callable[[list[Any]], Any], leaves: list[Any]) -> Any:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return make(leaves)
    dtype = leaves[0].dtype
    if dtype.name in WITHOUT_PROGRAMS:
        made = make([jnp.asarray(host_array(array).view(np.uint8)) for array in leaves])
        return to_jax([host_array(made).view(dtype)])[0]
    try:
        return moved_as_bits(make, leaves)
    except ValueError:  # JAX finds no sharding for the result, or no common order of the devices
        if not all(array.is_fully_addressable for array in leaves):
            raise  # pragma: no cover - arrays of several processes, which JAX cannot join
        return moved_as_bits(make, [jnp.asarray(host_array(array)) for array in leaves])


def _of_jax(leaf: Any) -> Any:
    """Return a leaf as an array of JAX, which takes neither another byte order nor masked arrays."""
    if isinstance(leaf, np.ndarray | np.generic) and not isinstance(leaf, np.ma.MaskedArray):
        leaf = host_array(leaf)
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))  # a copy: JAX may read it after it returns
    return jnp.asarray(leaf)


def _explicit_mesh(leaf: Any) -> Mesh | None:
    """Return the mesh of an array if it has explicit axes. A traced array has no devices."""
    if _EXPLICIT is None or not is_concrete(leaf):
        return None
    mesh: Any = getattr(leaf.sharding, "mesh", None)
    return mesh if mesh is not None and _EXPLICIT in mesh.axis_types else None


def _moved(array: Any, mesh: Mesh) -> jax.Array:
    """Return an array in the same sharding on a mesh of the same devices. This copies nothing."""
    old = array.sharding
    moved: jax.Array = jax.device_put(
        array, NamedSharding(mesh, old.spec, memory_kind=old.memory_kind)
    )
    return moved

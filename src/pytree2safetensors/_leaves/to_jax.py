"""Making JAX arrays from values.

Specification: *Loading*.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Final

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from pytree2safetensors._leaves.jax_versions import WITHOUT_PROGRAMS, enable_x64, no_mesh
from pytree2safetensors._leaves.prng_keys import is_key_dtype

TAKEN_OVER: Final = 1 << 12  # bytes: JAX gets the memory of larger arrays, without a copy
_CHUNK = 128  # arrays in one call of the identity
_MANY = 1024  # equal arrays that are worth compiling for


@jax.jit
def _identity(arrays: list[Any]) -> list[Any]:
    return arrays


@jax.jit
def _unstacked(array: Any) -> list[Any]:
    return list(array)


def to_jax(
    arrays: Sequence[NDArray[Any]],
    shardings: Sequence[Sharding | None] | None = None,
    *,
    keeps_memory: bool = True,
) -> list[jax.Array]:
    """Make JAX arrays, which are uncommitted if no sharding is given; for use within `own_programs`.

    JAX needs some 20 us to create an array, but only 4 us if a compiled call returns it.

    Args:
        arrays: The values.
        shardings: The sharding of each array; None for JAX's default device.
        keeps_memory: Whether JAX may take over the memory of large arrays. If not, the arrays must
            be ready before the memory is used again.
    """
    found: list[Any] = list(arrays)
    placements = shardings or [None] * len(arrays)
    groups: dict[tuple[Any, ...], list[int]] = {}
    alone: list[int] = []
    for position, (array, sharding) in enumerate(zip(arrays, placements, strict=True)):
        if array.nbytes < TAKEN_OVER and (sharding is None or _may_stack(sharding, keeps_memory)):
            groups.setdefault((array.dtype, array.shape, sharding), []).append(position)
        else:
            alone.append(position)
    for (dtype, _, sharding), positions in groups.items():
        equal = (arrays[position] for position in positions)
        made = many_to_jax(equal, len(positions), dtype, sharding, keeps_memory=keeps_memory)
        for position, made_array in zip(positions, made, strict=False):  # the first positions
            found[position] = made_array
        alone += positions[len(made) :]
    for placed in (False, True):  # a call for each, because JAX takes no list with None
        chosen = [i for i in alone if (placements[i] is not None) is placed]
        # Small arrays must be copied, because JAX may take over the memory that they are in.
        # jnp.array would copy, too, but compiles a program for each shape.
        values = [
            arrays[i].copy() if keeps_memory and arrays[i].nbytes < TAKEN_OVER else arrays[i]
            for i in chosen
        ]
        places = [placements[i] for i in chosen] if placed else None
        made = jax.device_put(values, places) if values else []
        for position, made_array in zip(chosen, made, strict=True):
            found[position] = made_array
    return found


def many_to_jax(
    arrays: Iterator[NDArray[Any]],
    count: int,
    dtype: np.dtype[Any],
    sharding: Sharding | None = None,
    *,
    keeps_memory: bool,
) -> list[jax.Array]:
    """Make JAX arrays of equal small arrays, if there are many; return them.

    Args:
        arrays: The values. Only those that become JAX arrays are taken from the iterator.
        count: The number of arrays.
        dtype: Their dtype.
        sharding: Their sharding; None for JAX's default device.
        keeps_memory: As for `to_jax`.
    """
    made: list[jax.Array] = []
    if count < _MANY or dtype.name in WITHOUT_PROGRAMS:
        return made
    for _ in range(count // _CHUNK):
        chunk = list(islice(arrays, _CHUNK))
        if keeps_memory:
            made += _identity(chunk)
        else:  # one transfer is faster than many
            made += _unstacked(jax.device_put(np.stack(chunk), sharding))
    return made


def _may_stack(sharding: Sharding, keeps_memory: bool) -> bool:
    """Return whether arrays with this sharding may be parts of one array."""
    if keeps_memory or not isinstance(sharding, SingleDeviceSharding):
        return False
    return bool(sharding == SingleDeviceSharding(*sharding.device_set))  # not in another memory


@contextmanager
def own_programs(leaves: Iterable[Any] = ()) -> Iterator[None]:
    """Let JAX run the programs of a load, whatever its settings are.

    A user who checks for NaNs or transfers does not mean those of a load. Without jit, a program may
    return its arguments, which are not JAX arrays. Under a mesh, it spreads its results over the
    devices. Without x64, it narrows arrays of 64 bits.

    Args:
        leaves: The leaves that the programs use, if some may be JAX arrays of 64 bits.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
        no_mesh(),
        x64_for(leaves),
    ):
        yield


def x64_for(leaves: Iterable[Any]) -> AbstractContextManager[None]:
    """Turn x64 on if some leaves are JAX arrays of 64 bits, which JAX narrows without it."""
    return enable_x64(True) if any(map(_is_too_wide, leaves)) else nullcontext()


def _is_too_wide(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or leaf.dtype.itemsize < 8 or is_key_dtype(leaf.dtype):
        return False
    return bool(jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype)


def is_traced() -> bool:
    """Return whether JAX makes tracers of values here; for use within `own_programs`."""
    return isinstance(jax.device_put(np.zeros((), np.uint8)), jax.core.Tracer)


def is_mapped() -> bool:
    """Return whether JAX makes tracers even of constants here, as in a shard_map without jit."""
    with jax.ensure_compile_time_eval(), own_programs():
        return is_traced()


def weaken(array: jax.Array) -> jax.Array:
    """Make a 0-d array weakly typed, if JAX has a weak type of its dtype."""
    dtype = np.dtype(array.dtype)
    for wide in (False, True):
        with enable_x64(wide), own_programs():  # it decides which dtypes are weak
            if dtype == np.bool_:  # only comparisons return weak bools
                return jax.lax.ne(jax.lax.full_like(0, array), jax.lax.full_like(0, 0))
            for prototype in (0, 0.0, 0j):
                if jnp.result_type(prototype) == dtype:
                    return jax.lax.full_like(prototype, array)
    return array


def wrap_key(data: Any, impl: str) -> jax.Array:
    """Make the typed key array with this data."""
    with own_programs():
        key: jax.Array = jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    return key

"""The values of leaves on the host, of whole arrays or of regions.

Specification: *Leaves*.
"""

from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._format.tensor import NUMPY, SCALARS
from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.placement import is_in_numpys_layout, is_in_place
from pytree2safetensors._leaves.prng_keys import is_key_dtype
from pytree2safetensors._leaves.to_jax import TAKEN_OVER, own_programs


class Stack:
    """Several arrays that are copied to the host as one. The copy may still be under way."""

    def __init__(self, copy: Any) -> None:
        self._copy = copy

    @cached_property
    def values(self) -> NDArray[Any]:
        with jax.transfer_guard("allow"):
            return np.asarray(self.__dict__.pop("_copy"))  # only the values stay


class Row(NamedTuple):
    """One of the arrays in a stack, as a leaf."""

    stack: Stack
    number: int


def host_array(leaf: Any) -> NDArray[Any]:
    """Return the values of a leaf with a tensor, without a copy if they are on the host."""
    kind = type(leaf)
    if kind is Row:
        return canonical_bools(leaf.stack.values[leaf.number, ...])
    if kind is complex:
        return np.array([leaf.real, leaf.imag])
    if kind in PYTHON_SCALARS:
        return np.array(leaf, NUMPY[SCALARS[kind.__name__]])
    if isinstance(leaf, np.ndarray | np.generic):
        return canonical_bools(np.asarray(leaf))
    if is_key_dtype(leaf.dtype):
        leaf = _key_data(leaf)
    if len(leaf.sharding.device_set) == 1:
        return host_shard(leaf)
    if leaf.is_fully_replicated:
        return host_shard(leaf.addressable_data(0))
    if not leaf.is_fully_addressable:
        return np.asarray(leaf)  # JAX does not take these
    whole = np.empty(leaf.shape, leaf.dtype)  # np.asarray would keep a copy inside the leaf
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = host_shard(shard.data)
    return whole


def host_shard(data: jax.Array) -> NDArray[Any]:
    """Return the values of an array on one device. No large copy stays inside the array."""
    return canonical_bools(_fetched(data))


def _fetched(data: jax.Array, *, again: bool = False) -> NDArray[Any]:
    """Return values. A copy may stay inside the array if they are asked for again."""
    if is_key_dtype(data.dtype):
        data = _key_data(data)
    if is_in_numpys_layout(data):
        try:
            return np.asarray(data)
        except RuntimeError:  # in another layout, it is copied, which a guard may forbid
            if data.is_deleted():
                raise
    with jax.transfer_guard("allow"):  # users guard the transfers of programs, not those of saves
        if data.nbytes >= TAKEN_OVER and not again:
            # Another array with the same memory, which keeps the copy instead.
            data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        return np.asarray(data)


def host_part(data: Any, index: tuple[slice, ...]) -> NDArray[Any]:
    """Return the values of a region of an array on one device. Only the region is copied from there."""
    if isinstance(data, jax.Array) and not is_in_place(data):
        with own_programs([data]):
            return host_shard(part_of(data, index))
    if isinstance(data, jax.Array):
        data = _fetched(data, again=True)  # for other regions
    whole: Any = (*index, ...)  # always returns an array, never a scalar
    return canonical_bools(data[whole])


def part_of(data: jax.Array, index: tuple[slice, ...]) -> jax.Array:
    """Return a region of an array on its device, by one program for all regions of a size."""
    sizes = [bounds.stop - bounds.start for bounds in index]
    if sizes == [*data.shape]:
        return data
    starts = [bounds.start for bounds in index]
    if isinstance(data, jax.core.Tracer):  # bits have no derivatives
        return jax.lax.dynamic_slice(data, starts, sizes)
    part: jax.Array = _cut(data, starts, tuple(sizes))
    return part


@partial(jax.jit, static_argnums=2)
def _cut(data: jax.Array, starts: list[Any], sizes: tuple[int, ...]) -> Any:
    return moved_as_bits(lambda found: jax.lax.dynamic_slice(found[0], starts, sizes), [data])


def without_key(leaf: Any) -> Any:
    """Return the array with the data of typed keys; other leaves as they are. No program runs."""
    return _key_data(leaf) if isinstance(leaf, jax.Array) and is_key_dtype(leaf.dtype) else leaf


def _key_data(keys: jax.Array) -> jax.Array:
    # The arrays have values, even if the caller is being traced or guards transfers.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        return jax.random.key_data(keys)


def canonical_bools(values: NDArray[Any]) -> NDArray[Any]:
    """Make the bytes of booleans 0 or 1, since JAX treats other bytes as neither true nor false."""
    if values.dtype.kind != "b" or not values.size or values.view(np.uint8).max() <= 1:
        return values
    return np.asarray(values.view(np.uint8) != 0)

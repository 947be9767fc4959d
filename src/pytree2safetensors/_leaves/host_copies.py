"""Copies of arrays on the host: a few ahead of their use, or all at once as a snapshot.

Specification: *Saving*.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.host import Row, Stack, host_array, without_key
from pytree2safetensors._leaves.jax_versions import pinned_sharding
from pytree2safetensors._leaves.placement import (
    has_other_devices,
    is_array_type,
    is_in_place,
    is_packed,
)
from pytree2safetensors._leaves.to_jax import own_programs

# Measured on an H100: copies of 128 MiB at a time reach the speed of the link, which is ten times the
# speed of the writes. So large arrays need not be copied ahead.
_BATCH: Final = 64 << 20  # bytes that are copied by one call
_MOST: Final = 192 << 20  # bytes of copies that exist at a time, unless one copy is larger
# A copy takes some 70 us, whatever its size. A program that joins arrays takes half a second to compile.
_SMALL: Final = 1 << 16  # bytes: smaller arrays are joined
_STACK: Final = 64  # arrays that are copied as one
_MANY: Final = 4096  # equal arrays that are worth compiling for


def copied_ahead(leaves: Sequence[Any]) -> Iterator[Any]:
    """Yield leaves in order. Copies of device arrays to the host start while others are used."""
    if not has_device_arrays(leaves):
        return iter(leaves)
    return _copied_ahead([*map(without_key, leaves)])


def _copied_ahead(leaves: Sequence[Any]) -> Iterator[Any]:
    window: deque[list[Any]] = deque()
    held = 0  # bytes of the last batch, which the caller may still hold
    for batch in _batches(leaves):
        while window and (len(window) > 1 or held + _nbytes(window[0]) + _nbytes(batch) > _MOST):
            held = _nbytes(window[0])
            yield from window.popleft()
        window.append(start_host_copies(batch))
    while window:
        yield from window.popleft()


def _nbytes(batch: Sequence[Any]) -> int:
    return sum(map(_size, batch))


def _size(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, jax.Array) else 0


def has_device_arrays(leaves: Sequence[Any]) -> bool:
    """Return whether some arrays may be on other devices; fast if the host is the only one."""
    # Asking for devices starts them, which a tree of NumPy arrays does not need.
    return any(map(is_array_type, map(type, leaves))) and has_other_devices()


def _batches(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for leaf in leaves:
        nbytes = _size(leaf)
        if batch and size + nbytes > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(leaf)
        size += nbytes
    yield batch


def start_host_copies(leaves: Sequence[Any]) -> list[Any]:
    """Start to copy all device arrays to the host in one call. Other leaves stay as they are.

    The arrays may be donated as soon as this returns. It does not wait for the programs that make
    them. The copies are JAX arrays in host memory, with the data of keys, and rows of stacks for many
    equal small arrays. If JAX refuses the memory, all leaves stay as they are.
    """
    found = list(leaves)
    if not has_device_arrays(leaves):
        return found
    # The pool of pinned memory is limited, and backends and versions differ in what they raise.
    with suppress(RuntimeError, ValueError), own_programs(leaves):
        moves = _moves(leaves)
        if not moves:
            return found
        copies = jax.device_put([m.array for m in moves], [m.pinned for m in moves])
        for (positions, *_), copy in zip(moves, copies, strict=True):
            if len(positions) == 1:
                found[positions[0]] = copy
                continue
            stack = Stack(copy)
            for number, position in enumerate(positions):
                found[position] = Row(stack, number)
    return found


class _Move(NamedTuple):
    """An array to copy to the host, and the sharding of the copy."""

    positions: list[int]  # of the leaves that it consists of
    array: jax.Array
    pinned: Any


def _moves(leaves: Sequence[Any]) -> list[_Move]:
    """Return what to copy: arrays and, of many small arrays, stacks."""
    leaves = [*map(without_key, leaves)]
    moves: list[_Move] = []
    kinds: dict[tuple[Any, ...], list[int]] = {}  # the positions of equal arrays
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            kinds.setdefault((leaf.sharding, leaf.dtype, leaf.shape), []).append(position)
    for (sharding, dtype, _), positions in kinds.items():
        first = leaves[positions[0]]
        if is_in_place(first):
            continue
        whole = first.is_fully_replicated
        pinned = pinned_sharding(first.addressable_data(0).sharding if whole else sharding)
        # Moving an array to the memory where it is makes no copy.
        if pinned is None or pinned.memory_kind == sharding.memory_kind:
            continue
        arrays = [leaves[i].addressable_data(0) if whole else leaves[i] for i in positions]
        many = whole and len(positions) >= _MANY and first.nbytes < _SMALL and not is_packed(dtype)
        stop = len(positions) - len(positions) % _STACK if many else 0
        for start in range(0, stop, _STACK):
            chunk = slice(start, start + _STACK)
            moves.append(_Move(positions[chunk], _stack(arrays[chunk]), pinned))
        rest = zip(positions[stop:], arrays[stop:], strict=True)
        moves += [_Move([position], array, pinned) for position, array in rest]
    return moves


@jax.jit
def _stack(arrays: list[Any]) -> Any:
    return moved_as_bits(jnp.stack, arrays)


def snapshot(leaves: Sequence[Any]) -> list[Any]:
    """Copy leaves, all at once from devices. Donation and changes do not affect the copies."""
    copies = zip(leaves, start_host_copies(leaves), strict=True)
    return [_copied(leaf) if copy is leaf else copy for leaf, copy in copies]


def _copied(leaf: Any) -> Any:
    values = host_array(leaf)
    # A copy from a device is new memory already.
    return values if isinstance(leaf, jax.Array) and values.flags.owndata else np.array(values)

"""The parts of tensors: what is copied to the host, written and freed before the next one.

Specification: *Saving*.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import jax

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.host import without_key
from pytree2safetensors._leaves.host_copies import has_device_arrays, snapshot
from pytree2safetensors._leaves.placement import is_in_place
from pytree2safetensors._leaves.spread import Owned, owned, owned_chunks, tensor_chunks
from pytree2safetensors._types import Chunk

_SMALL: Final = 1 << 16  # bytes: smaller tensors are joined
_WHOLE: Final = 1 << 20  # bytes: smaller tensors are copied whole, which takes fewer calls


def parts_of(leaf: Any, info: TensorInfo) -> list[Any]:
    """Split a leaf, or the shards that a process owns, into parts in the order of their bytes.

    Shards are parts if they follow each other in the file.
    """
    if info.nbytes >= _WHOLE and isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        leaf = owned(leaf, info.shape)
    if not isinstance(leaf, Owned):
        return [leaf]
    ordered = leaf.in_order(info)
    return [leaf] if ordered is None else [Owned([shard]) for _, shard in ordered]


def arrays_of(parts: Iterable[Any]) -> list[Any]:
    """List the arrays that parts consist of."""
    return [
        array
        for part in parts
        for array in ([data for _, data in part.shards] if isinstance(part, Owned) else [part])
    ]


def with_arrays(part: Any, arrays: Iterator[Any]) -> Any:
    """Return a part with the next arrays in place of its own."""
    if isinstance(part, Owned):
        return Owned([(region, next(arrays)) for region, _ in part.shards])
    return next(arrays)


def chunks_of(part: Any, info: TensorInfo) -> Iterator[Chunk]:
    """Yield the bytes of a part in order. A piece is valid until the next one."""
    return owned_chunks(part, info) if isinstance(part, Owned) else tensor_chunks(part, info)


def copied(leaves: Sequence[Any]) -> list[Any]:
    """Copy leaves as `snapshot` does, but only once what several devices hold."""
    if not has_device_arrays(leaves):
        return snapshot(leaves)
    parts = [*map(_without_replicas, leaves)]
    copies = iter(snapshot(arrays_of(parts)))
    return [with_arrays(part, copies) for part in parts]


def _without_replicas(leaf: Any) -> Any:
    """Return the shards of a large array that are saved, if other devices hold the same regions."""
    leaf = without_key(leaf)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        return leaf
    [info] = describe([leaf])
    if info is None or info.nbytes < _SMALL or is_in_place(leaf):
        return leaf
    part = owned(leaf, info.shape)
    return part if len(part.shards) < len(leaf.sharding.device_set) else leaf

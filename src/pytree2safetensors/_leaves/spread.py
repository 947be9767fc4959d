"""The bytes of tensors, those of arrays that are spread over devices among them, and where they go."""

from collections.abc import Iterator
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._leaves.encode import blocks, host_array, host_shard, to_bytes
from pytree2safetensors._leaves.extents import (
    Part,
    Region,
    gather,
    region_of,
    runs_in,
    shape_of,
    span_of,
)
from pytree2safetensors._leaves.ownership import ownership
from pytree2safetensors._types import Chunk

_LARGE: Final = 1 << 16  # bytes: smaller arrays are made whole sooner than cut


def tensor_chunks(leaf: Any, info: TensorInfo) -> Iterator[Chunk]:
    """The bytes of a tensor in order. What a piece shows may change with the next.

    Of a large array that is spread over devices, only what the host cannot read in place is copied:
    a shard at a time where these follow each other in the file.
    """
    if info.nbytes >= _LARGE and isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        yield from owned_chunks(leaf, info)
    else:
        yield from _in_a_row(host_array(leaf), info, 0)


def owned_chunks(leaf: jax.Array, info: TensorInfo) -> Iterator[Chunk]:
    """The bytes of the shards that this process owns, in order."""
    itemsize = BITS[info.dtype] // 8
    shards = [shard for shard in owned(leaf, info) if 0 not in shape_of(shard[0])]
    if all(runs_in(region, info.shape, itemsize).number == 1 for region, _ in shards):
        places = [span_of(region, info.shape, itemsize)[0] for region, _ in shards]
        for start, (_, data) in sorted(zip(places, shards, strict=True), key=lambda pair: pair[0]):
            yield from _in_a_row(host_shard(data), info, start)
        return
    parts = []
    for region, data in shards:
        raw = to_bytes(host_shard(data), info)
        parts.append(Part(region, np.ndarray(shape_of(region), f"u{itemsize}", raw)))
    yield from gather(parts, info.shape, itemsize)


def owned(leaf: jax.Array, info: TensorInfo) -> list[tuple[Region, jax.Array]]:
    """The shards that this process writes: those on devices that own their region."""
    devices = ownership(leaf.sharding, leaf.shape).devices
    return [
        (region_of(shard.index, info.shape), shard.data)
        for shard in leaf.addressable_shards
        if shard.device in devices
    ]


def _in_a_row(values: NDArray[Any], info: TensorInfo, position: int) -> Iterator[Chunk]:
    for block in blocks(values, info):
        yield position, memoryview(block)  # type: ignore[arg-type] # before 3.12 no type says buffer
        position += len(block)

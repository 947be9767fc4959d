"""The bytes of tensors, those of arrays that are spread over devices among them, and where they go."""

from collections.abc import Iterator
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._leaf import BITS, Form
from pytree2safetensors._region import Part, Region, gather, region_of, runs_in, shape_of, span_of
from pytree2safetensors._values import blocks, host_array, host_shard, to_bytes

_LARGE: Final = 1 << 16  # bytes: smaller arrays are made whole sooner than cut

Piece = tuple[int, memoryview]  # bytes, and where they go, counted from the start of the tensor


def tensor_pieces(leaf: Any, form: Form) -> Iterator[Piece]:
    """The bytes of a tensor in order. What a piece shows may change with the next.

    Of a large array that is spread over devices, only what the host cannot read in place is copied:
    a shard at a time where these follow each other in the file.
    """
    if form.nbytes >= _LARGE and isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        yield from owned_pieces(leaf, form)
    else:
        yield from _in_a_row(host_array(leaf), form, 0)


def owned_pieces(leaf: jax.Array, form: Form) -> Iterator[Piece]:
    """The bytes of the shards that this process owns, in order."""
    itemsize = BITS[form.dtype] // 8
    shards = [shard for shard in owned(leaf, form) if 0 not in shape_of(shard[0])]
    if all(runs_in(region, form.shape, itemsize).number == 1 for region, _ in shards):
        places = [span_of(region, form.shape, itemsize)[0] for region, _ in shards]
        for start, (_, data) in sorted(zip(places, shards, strict=True), key=lambda pair: pair[0]):
            yield from _in_a_row(host_shard(data), form, start)
        return
    parts = []
    for region, data in shards:
        raw = to_bytes(host_shard(data), form)
        parts.append(Part(region, np.ndarray(shape_of(region), f"u{itemsize}", raw)))
    yield from gather(parts, form.shape, itemsize)


def owned(leaf: jax.Array, form: Form) -> list[tuple[Region, jax.Array]]:
    """The shards that this process writes: of those that are equal, one process has the first."""
    return [
        (region_of(shard.index, form.shape), shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _in_a_row(values: NDArray[Any], form: Form, position: int) -> Iterator[Piece]:
    for block in blocks(values, form):
        yield position, memoryview(block)  # type: ignore[arg-type] # before 3.12 no type says buffer
        position += len(block)

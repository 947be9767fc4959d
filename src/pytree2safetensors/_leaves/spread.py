"""The bytes of a tensor with their offsets, wherever its leaf is: here, on devices, or in parts.

Specification: *Saving*.
"""

import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.as_bits import narrow_as_bits
from pytree2safetensors._leaves.assembled import Assembled, Member
from pytree2safetensors._leaves.encode import pieces, to_bytes
from pytree2safetensors._leaves.host import Row, host_array, host_part, host_shard, part_of
from pytree2safetensors._leaves.ownership import ownership
from pytree2safetensors._leaves.placement import computes
from pytree2safetensors._leaves.regions import (
    Part,
    Region,
    Shape,
    common,
    gather,
    region_of,
    runs_in,
    shape_of,
    span_of,
    whole_region,
    within,
)
from pytree2safetensors._leaves.to_jax import own_programs
from pytree2safetensors._leaves.views import file_parts, region_of_tensor
from pytree2safetensors._types import Chunk

_LARGE: Final = 1 << 16  # bytes: copying smaller arrays whole is faster


def tensor_chunks(leaf: Any, info: TensorInfo) -> Iterator[Chunk]:
    """Yield the bytes of a tensor in order. A piece is valid until the next one.

    If a large array is spread over devices, only parts that the host cannot read in place are copied:
    one shard at a time if the shards follow each other in the file.
    """
    if isinstance(leaf, Assembled):
        yield from assembled_chunks(leaf)
    elif info.nbytes >= _LARGE and isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        yield from owned_chunks(owned(leaf, info.shape), info)
    else:
        yield from _in_a_row(host_array(leaf), info, 0)


Shard: TypeAlias = tuple[Region, jax.Array | NDArray[Any]]


class Owned(NamedTuple):
    """The shards of an array that one process saves: their regions and their values."""

    shards: list[Shard]

    def nbytes(self, info: TensorInfo) -> int:
        """Return how many bytes the shards have in a file."""
        return sum(math.prod(shape_of(region)) for region, _ in self.shards) * info.itemsize

    def in_order(self, info: TensorInfo) -> list[tuple[int, Shard]] | None:
        """Return the shards that are not empty, in the order of the file, and where they start.

        Return None if one of them is not a single run there.
        """
        shape, itemsize = info.shape, info.itemsize
        shards = [shard for shard in self.shards if 0 not in shape_of(shard[0])]
        if any(runs_in(region, shape, itemsize).number != 1 for region, _ in shards):
            return None
        starts = [span_of(region, shape, itemsize)[0] for region, _ in shards]
        return sorted(zip(starts, shards, strict=True), key=itemgetter(0))


def owned(leaf: jax.Array, stored: Shape) -> Owned:
    """Return the shards that this process saves: those on devices that own their region.

    `stored` is the shape of its tensor, which has further axes for the data of keys.
    """
    devices = ownership(leaf.sharding, leaf.shape).devices
    return Owned(
        [
            (region_of(shard.index, stored), shard.data)
            for shard in leaf.addressable_shards
            if shard.device in devices
        ]
    )


def owned_chunks(part: Owned, info: TensorInfo) -> Iterator[Chunk]:
    """Yield the bytes of shards, in order."""
    ordered = part.in_order(info)
    if ordered is not None:
        for start, (_, data) in ordered:
            yield from _in_a_row(host_array(data), info, start)
        return
    unit = f"u{info.itemsize}"
    parts = []
    for region, data in part.shards:
        raw = to_bytes(host_array(data), info)
        parts.append(Part(region, np.ndarray(shape_of(region), unit, raw)))
    yield from gather(parts, info.shape, info.itemsize)


def assembled_chunks(tensor: Assembled) -> Iterator[Chunk]:
    """Yield the bytes of an assembled tensor that this process owns, in order."""
    _, info, members = tensor
    parts: list[Part] = []
    for member in members:
        needed = region_of_tensor(member.view, member.number)
        for region, data in _held(member.leaf):
            shared = common(region, needed)
            if shared is not None:
                parts += _parts_of(data, region, shared, member, info)
    yield from gather(parts, members[0].view.fine, info.itemsize)


def _parts_of(
    data: Any, region: Region, shared: Region, member: Member, info: TensorInfo
) -> Iterator[Part]:
    """Yield the parts of a tensor that a region of a leaf makes, in units of one item."""
    view, number, _ = member
    unit = f"u{info.itemsize}"
    is_moved = view.order != tuple(range(len(view.order)))
    if is_moved and isinstance(data, jax.Array) and computes(data):
        with own_programs([data]):  # JAX moves axes faster than NumPy
            held = narrow_as_bits(part_of(data, within(shared, region)))
            for source, moved in file_parts(view, shared, held, number):
                values = host_shard(moved)
                raw = np.ndarray(values.shape, unit, to_bytes(values, info))
                yield Part(source.region, raw)
    else:
        part = host_part(data, within(shared, region))
        raw = np.ndarray(shape_of(shared), unit, to_bytes(part, info))
        for source, values in file_parts(view, shared, raw, number):
            yield Part(source.region, values)


def _held(leaf: Any) -> list[tuple[Region, Any]]:
    """Return the regions of a leaf that this process writes."""
    if isinstance(leaf, Owned):
        shards = ((region, host_array(d) if type(d) is Row else d) for region, d in leaf.shards)
        return [(region, _with_axes(data, region)) for region, data in shards]
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_replicated and leaf.is_fully_addressable):
        return _held(owned(leaf, leaf.shape))
    leaf = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else host_array(leaf)
    return [(whole_region(leaf.shape), leaf)]


def _with_axes(data: Any, region: Region) -> Any:
    """Return the values of a shard with all axes of its array. The shards of pmap lack one."""
    if data.ndim == len(region):
        return data
    with own_programs([data]):  # pragma: no cover - before JAX 0.8
        return data.reshape(shape_of(region))


def _in_a_row(values: NDArray[Any], info: TensorInfo, position: int) -> Iterator[Chunk]:
    for piece in pieces(values, info):
        yield position, memoryview(piece)  # type: ignore[arg-type] # before 3.12 no type says buffer
        position += len(piece)

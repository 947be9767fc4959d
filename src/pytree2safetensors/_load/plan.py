"""The plan of a load: which regions of which tensors are read, in which batches, and for whom.

A plan is plain data, computed without I/O. A leaf that lives whole in one place is the plain case:
its one region is its tensor.

Specification: *Loading*, *Loading into a template*.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import jax
from jax.sharding import Sharding

from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._leaves.extents import Region, region_of, runs_in, shape_of
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.sharded import is_ordinary
from pytree2safetensors._load.template import TemplateLeaf

_CUT_BY_JAX: Final = 1 << 20  # bytes: JAX cuts smaller arrays sooner than they are read in regions
_LONG: Final = 1 << 16  # bytes: a run worth a read of its own


class Wanted(NamedTuple):
    """A leaf to load: its name in the file, and what it shall be; its sharding is concrete."""

    name: str
    leaf: TemplateLeaf


class Use(NamedTuple):
    """Who gets a region: a leaf, by its position, on one device or however JAX places it.

    Attributes:
        position: That of the leaf among those wanted.
        sharding: Where JAX puts the values; None for its default device, or for the host.
        device: The device, if the values are only a part of the leaf.
    """

    position: int
    sharding: Sharding | None
    device: jax.Device | None


class Slot(NamedTuple):
    """A region of a tensor, and the place in a batch's memory that it is read to."""

    name: str
    info: TensorInfo
    region: Region | None  # None for the whole tensor
    offset: int  # in the memory of the batch, or -1 for memory of its own
    nbytes: int
    uses: list[Use]


class Batch(NamedTuple):
    """Regions that are read together, in the order of the file."""

    slots: list[Slot]
    size: int  # bytes of the memory that they share


def plan_batches(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    limit: int,
    keeps_memory: Callable[[TemplateLeaf], bool],
) -> Iterator[Batch]:
    """Divide what is wanted into batches of some bytes; a larger region is a batch of its own.

    `keeps_memory` tells of a leaf whether it keeps the memory of its region for good.
    """
    ranks = {name: rank for rank, name in enumerate(checkpoint.places)}
    order = [ranks[want.name] for want in wanted]
    digested = checkpoint.digests is not None  # of whole tensors
    slots: list[Slot] = []
    size = 0
    shared: dict[Region | None, Slot] = {}  # of the tensor that is planned: what JAX arrays share
    name = ""
    for position in sorted(range(len(wanted)), key=order.__getitem__):
        want = wanted[position]
        if want.name != name:
            name, shared = want.name, {}
        info = checkpoint.infos[name]
        uses = _uses(want.leaf, info, position)
        room = limit
        if len(uses) > 1 and (digested or not all(is_direct(region, info) for region, _ in uses)):
            room = limit - sum(nbytes_of(region, info) for region in {region for region, _ in uses})
        for region, use in uses:
            if region in shared:
                shared[region].uses.append(use)
                continue
            nbytes = nbytes_of(region, info)
            if keeps_memory(want.leaf):
                offset = -1
            else:
                # What is copied anyway needs no alignment.
                offset = size if nbytes < TAKEN_OVER else -(-size // ALIGNMENT) * ALIGNMENT
            if slots and max(offset, size) + nbytes > room:
                yield Batch(slots, size)
                slots, size, offset = [], 0, min(offset, 0)
            if room < limit:  # its regions are read in bands, or hashed, together
                room = sys.maxsize
            slot = Slot(name, info, region, offset, nbytes, [use])
            slots.append(slot)
            if offset >= 0:
                size = offset + nbytes
                shared[region] = slot
    if slots:
        yield Batch(slots, size)


def is_direct(region: Region | None, info: TensorInfo) -> bool:
    """Return whether the runs of a region are few, or long enough for a read each."""
    if region is None:
        return True
    number, length = runs_in(region, info.shape, BITS[info.dtype] // 8)
    return number <= 1 or length >= _LONG


def nbytes_of(region: Region | None, info: TensorInfo) -> int:
    """Return the bytes of a region of a tensor."""
    if region is None:
        return info.nbytes
    return math.prod(shape_of(region)) * BITS[info.dtype] // 8


def _uses(leaf: TemplateLeaf, info: TensorInfo, position: int) -> list[tuple[Region | None, Use]]:
    """List the regions that a leaf needs here, each with its use."""
    sharding = leaf.sharding
    if sharding is None or leaf.target != "jax":
        return [(None, Use(position, None, None))]
    shape = leaf.leaf.shape
    if info.nbytes < _CUT_BY_JAX and is_ordinary(sharding, shape):
        return [(None, Use(position, sharding, None))]
    memory_kind = getattr(sharding, "memory_kind", None)
    whole = tuple((0, size) for size in info.shape)
    found: list[tuple[Region | None, Use]] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = region_of(index or (), info.shape)
        single = jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)
        found.append((None if region == whole else region, Use(position, single, device)))
    return sorted(found, key=lambda pair: pair[0] or ())

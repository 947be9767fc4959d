"""Ownership: which device's copy of each region of an array is saved.

Specification: *Saving*.
"""

import hashlib
import math
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pytree2safetensors._errors import UnsupportedLeafError
from pytree2safetensors._leaves.placement import is_concrete
from pytree2safetensors._leaves.regions import Region, Shape, region_of, shape_of

_KNOWN: Final = 4096  # remembered shardings and shapes; a train state has few


class Ownership(NamedTuple):
    """The owner of each region of an array."""

    devices: frozenset[Any]  # those that own a region
    digest: str  # of every device and its region


@lru_cache(_KNOWN)
def ownership(sharding: Any, shape: Shape) -> Ownership:
    """Return the owners: of the devices that hold a region, the one with the lowest process and id.

    This does not follow the order of the mesh, as `replica_id` does: processes may order the
    devices of a replicated array differently.

    Raises:
        UnsupportedLeafError: The regions do not tile the array.
    """
    held = sorted(
        ((device.process_index, device.id), region_of(index, shape), device)
        for device, index in sharding.devices_indices_map(shape).items()
    )
    owners: dict[Region, Any] = {}
    for _, region, device in held:
        owners.setdefault(region, device)
    if not _tile(set(owners), shape):
        raise UnsupportedLeafError(
            f"the shards of an array of shape {shape} do not tile it: {sharding}"
        )
    lines = repr([(key, region) for key, region, _ in held])
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return Ownership(frozenset(owners.values()), digest)


def _tile(regions: set[Region], shape: Shape) -> bool:
    """Return whether regions of one shape cover an array exactly once."""
    if 0 in shape:
        return True
    shard = shape_of(next(iter(regions)))  # the shard shape of pmap lacks an axis
    if 0 in shard:
        return False
    fit = all(
        start % size == 0 and stop - start == size
        for region in regions
        for (start, stop), size in zip(region, shard, strict=True)
    )
    number = math.prod(size // part for size, part in zip(shape, shard, strict=True))
    whole = all(size % part == 0 for size, part in zip(shape, shard, strict=True))
    return fit and whole and len(regions) == number


def is_global(leaf: Any) -> bool:
    """Return whether a leaf is an array that this process holds only a part of, or nothing."""
    return is_concrete(leaf) and not leaf.is_fully_addressable


@lru_cache(_KNOWN)
def processes_of(sharding: Any) -> tuple[int, ...]:
    """Return the processes whose devices hold arrays with a sharding."""
    return tuple(sorted({device.process_index for device in sharding.device_set}))

"""The plan of a load: the regions of tensors to read, their batches, and the leaves that need them.

A plan is plain data, computed without I/O. In the simple case, a leaf is whole in one place, and its
only region is the whole tensor.

Specification: *Loading*, *Loading into a template*.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Final, TypeAlias

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.extents import Region, Shape, region_of, whole_region
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._leaves.views import View, boxes_of, sources_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.runs import plan_runs
from pytree2safetensors._load.sharded import is_ordinary, on_device
from pytree2safetensors._load.slots import (
    Assembly,
    Batch,
    Piece,
    Slot,
    Use,
    Wanted,
    is_direct,
    nbytes_of,
)
from pytree2safetensors._load.template import TemplateLeaf

# Bytes: JAX splits smaller arrays faster than they are read in regions.
_CUT_BY_JAX: Final = 1 << 20


def plan_batches(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    limit: int,
    keeps_memory: Callable[[TemplateLeaf], bool],
    is_far: Callable[[Use], bool],
) -> Iterator[Batch]:
    """Divide leaves into batches of limited size; a larger region gets its own batch.

    Args:
        checkpoint: Where the leaves are.
        wanted: The leaves.
        limit: The bytes of a batch.
        keeps_memory: Returns whether a leaf keeps the memory of its region.
        is_far: Returns whether the values of a use are transferred as they are to another device
            than the host.
    """
    batches, others = plan_runs(checkpoint, wanted, keeps_memory, limit)
    yield from batches
    if not others:
        return
    ranks = {name: rank for rank, name in enumerate(checkpoint.places)}
    requests = list(_requests(checkpoint, others, keeps_memory, is_far))
    first = _first_ranks(ranks, [source for _, (source, _) in others])
    requests.sort(key=lambda request: (first.get(request[0], ranks[request[0]]), ranks[request[0]]))
    yield from _batches_of(requests, limit, checkpoint.digests is not None)


# A region of a tensor that is needed: the name and the info of the tensor, the region, its uses,
# what it is a part of, and whether it needs memory of its own.
_Request: TypeAlias = tuple[str, TensorInfo, Region | None, list[Use], Piece | None, bool]


def _batches_of(requests: Sequence[_Request], limit: int, digested: bool) -> Iterator[Batch]:
    """Divide regions, in the order of the file. `digested` is whether whole tensors are hashed."""
    slots: list[Slot] = []
    size = own = 0  # bytes of the memory that slots share, and of the memory of assemblies
    shared: dict[Region | None, Slot] = {}  # regions of the current tensor that JAX arrays share
    last = -1  # the number of the last request for the current tensor
    room = limit  # how large a batch may become with the first region of the current tensor
    for number, (name, info, region, uses, piece, keeps) in enumerate(requests):
        if number > last:
            last = number
            while last + 1 < len(requests) and requests[last + 1][0] == name:
                last += 1
            shared, room = {}, limit
            if last > number:
                together = _bytes_together(requests[number : last + 1], digested)
                room = limit - together if together else limit
        if region in shared and piece is None and not keeps:
            shared[region].uses.extend(uses)
            continue
        nbytes = info.nbytes if region is None else nbytes_of(region, info)
        # Small regions are copied later and need no alignment.
        aligned = size if nbytes < TAKEN_OVER else -(-size // ALIGNMENT) * ALIGNMENT
        offset = -1 if keeps else aligned
        if slots and aligned + own + nbytes > room:
            yield Batch(slots, size)
            slots, size, own, offset = [], 0, 0, min(offset, 0)
        if room < limit:  # the other regions of the tensor must be in the same batch
            room = sys.maxsize
        slot = Slot(name, info, region, offset, nbytes, uses, piece)
        slots.append(slot)
        if offset >= 0:
            size = offset + nbytes
            if piece is None and last > number:
                shared[region] = slot
        elif piece is not None:
            own += nbytes
    if slots:
        yield Batch(slots, size)


def _first_ranks(ranks: Mapping[str, int], sources: Sequence[str | View]) -> dict[str, int]:
    """Rank the tensors of a leaf as the first of them.

    Such leaves then become complete one after the other, and only one of them is in memory twice.
    """
    first: dict[str, int] = {}
    for source in sources:
        if not isinstance(source, str) and len(source.names) > 1:
            rank = min(map(ranks.__getitem__, source.names))
            for name in source.names:
                first[name] = min(rank, first.get(name, rank))
    return first


def _bytes_together(requests: Sequence[_Request], digested: bool) -> int:
    """Return the bytes of a tensor's regions that one batch must hold; 0 if several may."""
    direct = all(is_direct(region, info) for _, info, region, *_ in requests)
    if direct and not digested:
        return 0
    sizes = {
        (region, piece is None): nbytes_of(region, info)
        for _, info, region, _, piece, _ in requests
    }
    return sum(sizes.values())


def _requests(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[tuple[int, Wanted]],
    keeps_memory: Callable[[TemplateLeaf], bool],
    is_far: Callable[[Use], bool],
) -> Iterator[_Request]:
    """Yield the regions that leaves need, which are given with their positions."""
    assemblies = count()
    for position, (source, leaf) in wanted:
        if isinstance(source, str):
            info = checkpoint.infos[source]
            keeps = keeps_memory(leaf)
            for region, use in _uses(leaf, info.shape, info.nbytes, position):
                yield source, info, region, [use], None, keeps
            continue
        if 0 in source.shape:
            continue  # it may be a stack of no tensors
        infos = {name: checkpoint.infos[name] for name in source.names}
        nbytes = math.prod(source.shape) * infos[source.names[0]].itemsize
        # Of all tensors, even if a region needs only some: its memory is like that of the first one.
        is_mixed = len({(info.dtype, info.kind) for info in infos.values()}) > 1
        dtype = leaf.spec.dtype if is_mixed else None
        regions: dict[Region, list[Use]] = {}
        whole = whole_region(source.shape)
        for region, use in _uses(leaf, source.shape, nbytes, position):
            regions.setdefault(whole if region is None else region, []).append(use)
        for region, uses in regions.items():
            boxes = boxes_of(source, region)
            found = [(n, part) for n, box in enumerate(boxes) for part in sources_of(source, box)]
            keeps = keeps_memory(leaf)
            far = not keeps and all(map(is_far, uses))
            assembly = Assembly(
                next(assemblies), source, region, boxes, uses, len(found), far, dtype
            )
            # One region may be in the memory of the batch, and so may those that are converted;
            # several have theirs until all are there.
            keeps = not is_mixed and (keeps or (len(found) > 1 and not far))
            fine = whole_region(source.fine)
            for number, part in found:
                yield (
                    part.name,
                    infos[part.name]._replace(shape=source.fine),
                    None if part.region == fine else part.region,
                    [],
                    Piece(assembly, number, part.place),
                    keeps,
                )


def _uses(
    leaf: TemplateLeaf, stored: Shape, nbytes: int, position: int
) -> list[tuple[Region | None, Use]]:
    """List the regions of an array that a leaf needs here, each with its use."""
    sharding = leaf.sharding
    if sharding is None or leaf.target != "jax":
        return [(None, Use(position, None, None))]
    shape = leaf.spec.shape
    # JAX cuts no data of keys, whose sharding is another one.
    if nbytes < _CUT_BY_JAX and leaf.spec.kind != "key" and is_ordinary(sharding, shape):
        return [(None, Use(position, sharding, None))]
    whole = whole_region(stored)
    found: list[tuple[Region | None, Use]] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = region_of(index or (), stored)
        use = Use(position, on_device(device, sharding), device)
        found.append((None if region == whole else region, use))
    return sorted(found, key=lambda pair: pair[0] or ())

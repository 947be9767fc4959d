"""The plan of a load: the regions of tensors to read, their batches, and the leaves that need them.

A plan is plain data, computed without I/O. In the simple case, a leaf is whole in one place, and its
only region is the whole tensor.

Specification: *Loading*, *Loading into a template*.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, groupby
from operator import attrgetter
from typing import Final, NamedTuple

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.placement import is_packed
from pytree2safetensors._leaves.regions import Region, Shape, region_of, runs_in, whole_region
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._leaves.views import View, boxes_of, sources_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.groups import plan_groups
from pytree2safetensors._load.shardings import is_ordinary, on_device
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
    batches, others = plan_groups(checkpoint, wanted, keeps_memory, limit)
    yield from batches
    if not others:
        return
    ranks = {name: rank for rank, name in enumerate(checkpoint.places)}
    requests = list(_requests(checkpoint, others, keeps_memory, is_far))
    first = _first_ranks(ranks, [source for _, (source, _) in others])
    requests.sort(key=lambda r: (first.get(r.name, ranks[r.name]), ranks[r.name]))
    yield from _batches_of(requests, limit, checkpoint.digests is not None)


class _Request(NamedTuple):
    """A region of a tensor that is needed.

    Attributes:
        name: The name of the tensor.
        info: How it is stored.
        region: The region; None for the whole tensor.
        uses: The uses of the region.
        piece: What it is a part of, by a rule.
        keeps: Whether it needs memory of its own.
        is_copied: Whether its leaf is a copy, so that its memory is freed.
    """

    name: str
    info: TensorInfo
    region: Region | None
    uses: list[Use]
    piece: Piece | None
    keeps: bool
    is_copied: bool


def _batches_of(requests: Sequence[_Request], limit: int, digested: bool) -> Iterator[Batch]:
    """Divide regions, in the order of the file. `digested` is whether whole tensors are hashed.

    A batch may get further uses until the last one is known.
    """
    slots: list[Slot] = []
    size = own = 0  # bytes of the memory that slots share, and of their own that leaves do not keep
    for _, group in groupby(requests, key=attrgetter("name")):
        of_tensor = list(group)
        # The slots of regions that JAX arrays share: the list of its batch, and the place there.
        shared: dict[Region | None, tuple[list[Slot], int]] = {}
        # How large a batch may become with the first region.
        room = limit - (_bytes_together(of_tensor, digested) if len(of_tensor) > 1 else 0)
        for name, info, region, uses, piece, keeps, is_copied in of_tensor:
            if region in shared and piece is None and not keeps:
                of_batch, number = shared[region]  # maybe an earlier batch
                slot = of_batch[number]
                slot.uses.extend(uses)
                of_batch[number] = slot._replace(is_kept=slot.is_kept or not is_copied)
                continue
            nbytes = nbytes_of(region, info)
            # Small regions are copied later and need no alignment.
            offset = size if nbytes < TAKEN_OVER else -(-size // ALIGNMENT) * ALIGNMENT
            if slots and offset + own + nbytes > room:
                yield Batch(slots, size)
                slots, size, own, offset = [], 0, 0, 0
            if room < limit:  # the other regions of the tensor must be in the same batch
                room = sys.maxsize
            place = -1 if keeps else offset
            is_kept = not (keeps or is_copied)
            if not keeps:
                size = offset + nbytes
                if piece is None:
                    shared[region] = slots, len(slots)
            elif piece is not None or is_copied:
                own += nbytes
            slots.append(Slot(name, info, region, place, nbytes, uses, piece, is_kept=is_kept))
    if slots:
        yield Batch(slots, size)


def separated(batch: Batch) -> Batch:
    """Give some regions memory of their own, if only some leaves of a batch keep its memory.

    Otherwise, these would keep alive what the others were made of. The smaller part is taken out.
    Small arrays are copied, and are too few bytes to count.
    """
    shared = [slot for slot in batch.slots if slot.offset >= 0 and slot.nbytes >= TAKEN_OVER]
    kept, copied = ([slot for slot in shared if slot.is_kept == wanted] for wanted in (True, False))
    if not kept or not copied:
        return batch
    smaller = min(kept, copied, key=lambda slots: sum(slot.nbytes for slot in slots))
    taken = {id(slot) for slot in smaller}
    slots = [slot._replace(offset=-1) if id(slot) in taken else slot for slot in batch.slots]
    return batch._replace(slots=slots)


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
    if not digested and all(is_direct(r.region, r.info) for r in requests):
        return 0
    sizes = {(r.region, r.piece is None): nbytes_of(r.region, r.info) for r in requests}
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
            stored = checkpoint.spec_of(source).dtype
            is_cast = leaf.spec.dtype not in {None, stored}
            is_packed_in_jax = leaf.target == "jax" and stored is not None and is_packed(stored)
            for region, use in _uses(leaf, info.shape, info.nbytes, position):
                is_copied = is_cast or is_packed_in_jax or _is_cut_by_jax(use, leaf.spec.shape)
                yield _Request(source, info, region, [use], None, keeps, is_copied)
            continue
        if 0 in source.shape:
            continue  # it may be a stack of no tensors
        infos = {name: checkpoint.infos[name] for name in source.names}
        nbytes = math.prod(source.shape) * infos[source.names[0]].itemsize
        # Of all tensors, even if a region needs only some: its memory is like that of the first one.
        is_mixed = len({(info.dtype, info.kind) for info in infos.values()}) > 1
        dtype = leaf.spec.dtype if is_mixed else None
        order = [axis for axis in source.order if source.sizes[axis] > 1]
        is_moved = order != sorted(order)
        stored = checkpoint.spec_of(source.names[0]).dtype
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
            # Regions that are converted may be in the memory of the batch. Others have theirs if they
            # become the leaf, or until all are there.
            is_converted = is_mixed and len(found) > 1
            keeps = not is_converted and (keeps or (len(found) > 1 and not far))
            fine = whole_region(source.fine)
            for number, part in found:
                name = source.names[part.number]
                yield _Request(
                    name,
                    infos[name]._replace(shape=source.fine),
                    None if part.region == fine else part.region,
                    [],
                    Piece(assembly, number, part.place),
                    keeps,
                    is_copied=len(found) > 1 or is_moved or leaf.spec.dtype != stored,
                )


def _is_cut_by_jax(use: Use, shape: Shape) -> bool:
    """Return whether JAX cuts an array into shards that are several runs of its memory."""
    if use.device is not None or use.sharding is None:
        return False
    shard = tuple((0, size) for size in use.sharding.shard_shape(shape))
    return runs_in(shard, shape, 1).number > 1


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

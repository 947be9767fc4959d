"""The plan of a load: which regions of which tensors to read, in which batches, and for what.

A plan is plain data, computed without I/O. A leaf that lives whole in one place is the plain case:
its one region is its tensor.

Specification: *Loading*, *Loading into a template*.
"""

import math
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import count
from typing import Any, Final, NamedTuple, TypeAlias

import jax
from jax.sharding import Sharding

from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._leaves.extents import Region, Shape, region_of, runs_in, shape_of
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._leaves.views import Box, View, boxes_of, sources_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.sharded import is_ordinary
from pytree2safetensors._load.template import TemplateLeaf

_CUT_BY_JAX: Final = (
    1 << 20
)  # bytes: JAX splits smaller arrays faster than they are read in regions
_LONG: Final = 1 << 16  # bytes: longer runs get a read of their own


class Wanted(NamedTuple):
    """A leaf to load: what it is in the file, and what it shall be; its sharding is concrete."""

    source: str | View  # the tensor that it is, or what it is made of
    leaf: TemplateLeaf

    @property
    def name(self) -> str:
        """Return the name of its tensor, or of the first of its tensors."""
        return self.source if isinstance(self.source, str) else self.source.names[0]


class Use(NamedTuple):
    """The use of a region: a leaf, by its position, on one device or as JAX places it.

    Attributes:
        position: That of the leaf among those wanted.
        sharding: Where JAX puts the values; None for its default device, or for the host.
        device: The device, if the values are only a part of the leaf.
    """

    position: int
    sharding: Sharding | None
    device: jax.Device | None


class Assembly(NamedTuple):
    """A region of a leaf that is made of regions of tensors.

    Attributes:
        number: What tells it from others.
        view: What the leaf is made of.
        region: Of the leaf.
        boxes: What the region consists of, each with memory in the order of the file.
        uses: Who gets the region.
        pieces: How many regions of tensors make it.
        is_far: Whether the regions become arrays on their devices first, and are put together there.
    """

    number: int
    view: View
    region: Region
    boxes: list[Box]
    uses: list[Use]
    pieces: int
    is_far: bool


class Piece(NamedTuple):
    """Where a region of a tensor belongs in an assembly."""

    assembly: Assembly
    box: int
    place: tuple[Any, ...]  # the index that selects its memory from that of the box


class Slot(NamedTuple):
    """A region of a tensor, and where in a batch's memory to read it."""

    name: str
    info: TensorInfo  # of the tensor; by a rule, its shape is that of the view's fine axes
    region: Region | None  # None for the whole tensor
    offset: int  # in the batch's memory, or -1 for its own memory
    nbytes: int
    uses: list[Use]
    piece: Piece | None = None  # what it is a part of, by a rule
    run: Sequence[int] = ()  # the positions of the leaves, if the slot is a run of equal tensors


class Batch(NamedTuple):
    """Regions to read together, in the order of the file."""

    slots: list[Slot]
    size: int  # bytes of their shared memory


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
        keeps_memory: Tells of a leaf whether it keeps the memory of its region for good.
        is_far: Tells of a use whether its values go to another device than the host as they are.
    """
    ranks = {name: rank for rank, name in enumerate(checkpoint.places)}
    is_small = _is_small(checkpoint, keeps_memory)
    small = [
        (ranks[source], position, source)
        for position, (source, leaf) in enumerate(wanted)
        if isinstance(source, str) and is_small(source, leaf)
    ]
    yield from _plan_runs(checkpoint, wanted, sorted(small), limit)
    planned = {position for _, position, _ in small}
    requests = list(_requests(checkpoint, wanted, planned, keeps_memory, is_far))
    requests.sort(key=lambda request: ranks[request[0]])
    digested = checkpoint.digests is not None  # of whole tensors
    slots: list[Slot] = []
    size = own = 0  # bytes of the memory that slots share, and of the memory of assemblies
    shared: dict[Region | None, Slot] = {}  # of the tensor that is planned: what JAX arrays share
    room, last = limit, -1  # for its regions, and the last of these
    for number, (name, info, region, uses, piece, keeps) in enumerate(requests):
        if number > last:
            last = number
            while last + 1 < len(requests) and requests[last + 1][0] == name:
                last += 1
            shared, room = {}, limit
            if last > number:
                together = _bytes_together(requests[number : last + 1], digested)
                room = limit - together if together else limit
        if region in shared and piece is None:
            shared[region].uses.extend(uses)
            continue
        nbytes = info.nbytes if region is None else nbytes_of(region, info)
        # Small regions are copied later and need no alignment.
        aligned = size if nbytes < TAKEN_OVER else -(-size // ALIGNMENT) * ALIGNMENT
        offset = -1 if keeps else aligned
        if slots and aligned + own + nbytes > room:
            yield Batch(slots, size)
            slots, size, own, offset = [], 0, 0, min(offset, 0)
        if room < limit:  # its regions are read in bands, or hashed, together
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


# A region of a tensor that somebody needs: the tensor's name and what is stored of it, the region,
# its uses, what it is a part of, and whether it needs memory of its own.
_Request: TypeAlias = tuple[str, TensorInfo, Region | None, list[Use], Piece | None, bool]


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


def _is_small(
    checkpoint: OpenCheckpoint, keeps_memory: Callable[[TemplateLeaf], bool]
) -> Callable[[str, TemplateLeaf], bool]:
    """Tell which leaves are small plain arrays for the default device, which may be read in runs."""
    known: dict[tuple[int, int], bool] = {}
    if checkpoint.digests is not None:  # of single tensors
        return lambda _, __: False

    def is_small(source: str, leaf: TemplateLeaf) -> bool:
        info = checkpoint.infos[source]
        key = id(info), id(leaf)
        found = known.get(key)
        if found is None:
            plain = info.kind is None and leaf.leaf.kind == "array" and leaf.sharding is None
            apart = leaf.target != "jax" or leaf.format is not None or keeps_memory(leaf)
            found = known[key] = plain and not apart and 0 < info.nbytes < TAKEN_OVER
        return found

    return is_small


def _plan_runs(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    small: Sequence[tuple[int, int, str]],
    limit: int,
) -> Iterator[Batch]:
    """Plan small tensors: equal ones that follow each other in the file are one slot."""
    slots: list[Slot] = []
    size = 0
    run: list[int] = []
    first: Any = None  # of the run: its tensor, leaf and file
    stop = -1  # where the run ends in the file

    def close() -> None:
        nonlocal size
        if run:
            info = first[0]
            nbytes = info.nbytes * len(run)
            whole = info._replace(shape=(len(run), *info.shape), nbytes=nbytes)
            slots.append(Slot(wanted[run[0]].name, whole, None, size, nbytes, [], None, run))
            size += nbytes

    for _, position, source in small:
        leaf = wanted[position].leaf
        info = checkpoint.infos[source]
        file, offset = checkpoint.places[source]
        same = first is not None and first[0] is info and first[1] is leaf and first[2] is file
        if not same or offset != stop or size + info.nbytes * (len(run) + 1) > limit:
            close()
            size = -(-size // ALIGNMENT) * ALIGNMENT
            if size + info.nbytes > limit:
                yield Batch(slots, size)
                slots, size = [], 0
            run, first = [], (info, leaf, file)
        run.append(position)
        stop = offset + info.nbytes
    close()
    if slots:
        yield Batch(slots, size)


def _requests(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    planned: Container[int],
    keeps_memory: Callable[[TemplateLeaf], bool],
    is_far: Callable[[Use], bool],
) -> Iterator[_Request]:
    """Give what the leaves need that are not planned yet."""
    assemblies = count()
    for position, (source, leaf) in enumerate(wanted):
        if position in planned:
            continue
        if isinstance(source, str):
            info = checkpoint.infos[source]
            keeps = keeps_memory(leaf)
            for region, use in _uses(leaf, info.shape, info.nbytes, position):
                yield source, info, region, [use], None, keeps
            continue
        info = checkpoint.infos[source.names[0]]
        nbytes = math.prod(source.shape) * BITS[info.dtype] // 8
        regions: dict[Region, list[Use]] = {}
        whole = tuple((0, size) for size in source.shape)
        for region, use in _uses(leaf, source.shape, nbytes, position):
            regions.setdefault(whole if region is None else region, []).append(use)
        for region, uses in regions.items():
            boxes = boxes_of(source, region)
            found = [(n, part) for n, box in enumerate(boxes) for part in sources_of(source, box)]
            keeps = keeps_memory(leaf)
            far = not keeps and all(map(is_far, uses))
            assembly = Assembly(next(assemblies), source, region, boxes, uses, len(found), far)
            # One region may be in the memory of the batch; several have theirs until all are there.
            keeps = keeps or (len(found) > 1 and not far)
            for number, part in found:
                fine = tuple((0, size) for size in source.fine)
                yield (
                    part.name,
                    info._replace(shape=source.fine, nbytes=checkpoint.infos[part.name].nbytes),
                    None if part.region == fine else part.region,
                    [],
                    Piece(assembly, number, part.place),
                    keeps,
                )


def is_direct(region: Region | None, info: TensorInfo) -> bool:
    """Return whether the runs of a region are few, or long enough to read one by one."""
    if region is None:
        return True
    number, length = runs_in(region, info.shape, BITS[info.dtype] // 8)
    return number <= 1 or length >= _LONG


def nbytes_of(region: Region | None, info: TensorInfo) -> int:
    """Return the bytes of a region of a tensor."""
    if region is None:
        return info.nbytes
    return math.prod(shape_of(region)) * BITS[info.dtype] // 8


def _uses(
    leaf: TemplateLeaf, stored: Shape, nbytes: int, position: int
) -> list[tuple[Region | None, Use]]:
    """List the regions of an array that a leaf needs here, each with its use."""
    sharding = leaf.sharding
    if sharding is None or leaf.target != "jax":
        return [(None, Use(position, None, None))]
    shape = leaf.leaf.shape
    if nbytes < _CUT_BY_JAX and is_ordinary(sharding, shape):
        return [(None, Use(position, sharding, None))]
    memory_kind = getattr(sharding, "memory_kind", None)
    whole = tuple((0, size) for size in stored)
    found: list[tuple[Region | None, Use]] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = region_of(index or (), stored)
        single = jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)
        found.append((None if region == whole else region, Use(position, single, device)))
    return sorted(found, key=lambda pair: pair[0] or ())

"""From the regions of a batch to reads: long runs straight to their places, short ones in bands.

Specification: *Loading into a template*.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._leaves.extents import (
    Region,
    Shape,
    bands_of,
    common,
    ranges_of,
    runs_in,
    shape_of,
    span_of,
    starts_of,
    within,
)
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.plan import Slot, is_direct
from pytree2safetensors._storage.byte_source import ByteSource, Read


class Place(NamedTuple):
    """A slot, and the memory that its bytes are read to."""

    slot: Slot
    memory: NDArray[np.uint8]
    offset: int

    @property
    def raw(self) -> NDArray[np.uint8]:
        """The bytes of the region, in row-major order."""
        return self.memory[self.offset : self.offset + self.slot.nbytes]

    def items(self) -> NDArray[Any]:
        """The region in units of one item."""
        info = self.slot.info
        shape = info.shape if self.slot.region is None else shape_of(self.slot.region)
        found: NDArray[Any] = np.ndarray(
            shape, f"u{BITS[info.dtype] // 8}", self.memory, self.offset
        )
        return found


class Work(NamedTuple):
    """What is to be done to fill places: reads in the order of the file, and bands to cut."""

    reads: list[Read]
    tasks: list[Callable[[], None]]


def plan_reads(
    checkpoint: OpenCheckpoint, places: Sequence[Place], report: Callable[[int], None]
) -> Work:
    """Plan how the places are filled; `report` hears the bytes of each band."""
    work = Work([], [])
    run: _Run | None = None  # neighbours in file and memory, which are one read
    for (name, _), group in groupby(places, key=_tensor_of):
        source, start = checkpoint.places[name]
        mine = list(group)
        if all(is_direct(place.slot.region, place.slot.info) for place in mine):
            for place in mine:
                for offset, length, position in _runs(place):
                    if run is None or not run.goes_on(source, start + offset, place, position):
                        if run is not None:
                            work.reads.append(run.read())
                        run = _Run(source, start + offset, place.memory, position)
                    run.size += length
        else:
            shape, itemsize = mine[0].slot.info.shape, BITS[mine[0].slot.info.dtype] // 8
            for band in bands_of(shape, itemsize):
                work.tasks.append(partial(_read_band, source, start, mine, band, report))
    if run is not None:
        work.reads.append(run.read())
    if checkpoint.in_flight:  # the regions of several devices may be neighbours: one request
        work.reads.sort(key=lambda read: (id(read.source), read.offset))
    return work


def _tensor_of(place: Place) -> tuple[str, Shape]:
    """What places have in common that are cut from one tensor together."""
    return place.slot.name, place.slot.info.shape


class _Run:
    """Bytes that follow each other, in the file and in memory."""

    __slots__ = ("memory", "offset", "position", "size", "source")

    def __init__(
        self, source: ByteSource, offset: int, memory: NDArray[np.uint8], position: int
    ) -> None:
        self.source, self.offset, self.memory, self.position = source, offset, memory, position
        self.size = 0

    def goes_on(self, source: ByteSource, offset: int, place: Place, position: int) -> bool:
        return (
            self.offset + self.size == offset
            and self.position + self.size == position
            and self.source is source
            and self.memory is place.memory
        )

    def read(self) -> Read:
        view = memoryview(self.memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
        return Read(self.source, self.offset, view[self.position : self.position + self.size])


def _runs(place: Place) -> Iterator[tuple[int, int, int]]:
    """Give the runs of a region: where each starts in its tensor, its length, its place in memory."""
    slot = place.slot
    if slot.region is None:
        if slot.nbytes:
            yield 0, slot.nbytes, place.offset
        return
    itemsize = BITS[slot.info.dtype] // 8
    length = runs_in(slot.region, slot.info.shape, itemsize).length
    starts = starts_of(slot.region, slot.info.shape, itemsize).tolist()
    for number, start in enumerate(starts):
        yield start, length, place.offset + number * length


def _read_band(
    source: ByteSource,
    start: int,
    places: list[Place],
    band: Region,
    report: Callable[[int], None],
) -> None:
    """Read what places need of a band of their tensor, and copy it to them."""
    info: TensorInfo = places[0].slot.info
    itemsize = BITS[info.dtype] // 8
    whole = tuple((0, size) for size in info.shape)
    cuts = [(place, common(band, place.slot.region or whole)) for place in places]
    needed = [(place, cut) for place, cut in cuts if cut is not None]
    if not needed:
        return
    origin, end = span_of(band, info.shape, itemsize)
    memory = np.empty(end - origin, np.uint8)
    view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
    ranges: Iterable[tuple[int, int]] = [(origin, end)]
    if sum(place.slot.nbytes for place in places) < info.nbytes:  # something is left out
        ranges = ranges_of((cut for _, cut in needed), info.shape, itemsize, source.gap)
    for first, last in ranges:
        source.fill([view[first - origin : last - origin]], start + first)
    values: NDArray[Any] = np.ndarray(shape_of(band), f"u{itemsize}", memory)
    for place, cut in needed:
        region = place.slot.region or whole
        place.items()[within(cut, region)] = values[within(cut, band)]
        report(int(np.prod(shape_of(cut))) * itemsize)


def mapped(
    slot: Slot,
    memory: NDArray[np.uint8],
    start: int,
    memory_for: Callable[[Slot], tuple[NDArray[np.uint8], int]],
) -> tuple[Place, Callable[[], None] | None]:
    """Find a slot in the map of its file; where it is not one run there, give a copy to make."""
    info = slot.info
    if slot.offset >= 0:
        if slot.region is None:
            return Place(slot, memory, start), None
        itemsize = BITS[info.dtype] // 8
        runs = runs_in(slot.region, info.shape, itemsize)
        if runs.number <= 1:
            first = span_of(slot.region, info.shape, itemsize)[0] if runs.number else 0
            return Place(slot, memory, start + first), None
    place = Place(slot, *memory_for(slot))
    whole = tuple((0, size) for size in info.shape)
    items = place.items()
    values: NDArray[Any] = np.ndarray(info.shape, items.dtype, memory, start)
    return place, partial(np.copyto, items, values[within(slot.region or whole, whole)])

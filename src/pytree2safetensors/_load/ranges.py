"""From the regions of a batch to reads: long runs directly, short ones in bands.

Specification: *Loading into a template*.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._leaves.regions import (
    Region,
    Shape,
    bands_of,
    common,
    ranges_of,
    runs_in,
    shape_of,
    span_of,
    starts_of,
    whole_region,
    within,
)
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.slots import Slot, is_direct
from pytree2safetensors._storage.byte_source import ByteSource, Read

_SHORT: Final = 32 << 10  # bytes of a gap that takes less time than another request of a store


class Place(NamedTuple):
    """A slot, and the memory to read its bytes into."""

    slot: Slot
    memory: NDArray[np.uint8]
    offset: int

    @property
    def raw(self) -> NDArray[np.uint8]:
        """Return the bytes of the region, in row-major order."""
        return self.memory[self.offset : self.offset + self.slot.nbytes]

    def items(self) -> NDArray[Any]:
        """View the region in units of one item."""
        info = self.slot.info
        shape = info.shape if self.slot.region is None else shape_of(self.slot.region)
        found: NDArray[Any] = np.ndarray(shape, f"u{info.itemsize}", self.memory, self.offset)
        return found


def plan_reads(
    checkpoint: OpenCheckpoint, places: Sequence[Place], report: Callable[[int], None]
) -> tuple[list[Read], list[Callable[[], None]]]:
    """Plan how to fill places: return reads in the order of the file, and bands to read and split.

    `report` is called with the bytes of each band.
    """
    reads = Reads()
    tasks: list[Callable[[], None]] = []
    parts: dict[tuple[str, Shape], list[Place]] = {}  # of tensors that are read by regions
    for place in places:
        slot = place.slot
        if slot.region is None:
            reads.add(*checkpoint.places[slot.name], place.memory, place.offset, slot.nbytes)
        else:
            parts.setdefault((slot.name, slot.info.shape), []).append(place)
    for (name, shape), mine in parts.items():
        source, start = checkpoint.places[name]
        if all(is_direct(place.slot.region, place.slot.info) for place in mine):
            for place in mine:
                for offset, length, position in _runs(place):
                    reads.add(source, start + offset, place.memory, position, length)
        else:
            bands = bands_of(shape, mine[0].slot.info.itemsize)
            tasks += [partial(_read_band, source, start, mine, band, report) for band in bands]
    found = reads.all()
    return list(in_file_order(found)) if checkpoint.in_flight else found, tasks


def in_file_order(reads: list[Read]) -> Iterator[Read]:
    """Sort reads and add those of short gaps, so that many become one."""
    reads.sort(key=lambda read: (id(read.source), read.offset))
    unused = memoryview(bytearray(_SHORT))
    source, stop = None, 0
    for read in reads:
        gap = read.offset - stop
        if read.source is source and 0 < gap <= _SHORT:
            yield Read(source, stop, unused[:gap], is_gap=True)
        yield read
        source, stop = read.source, read.offset + len(read.buffer)


class Reads:
    """Reads. Those that are adjacent in file and memory are joined."""

    def __init__(self) -> None:
        self._done: list[Read] = []
        self._source: ByteSource | None = None
        self._memory = np.empty(0, np.uint8)
        self._offset = self._position = self._size = 0

    def add(
        self,
        source: ByteSource,
        offset: int,
        memory: NDArray[np.uint8],
        position: int,
        size: int,
    ) -> None:
        """Add the read of some bytes from an offset in a file to a position in memory."""
        if (
            self._offset + self._size != offset
            or self._position + self._size != position
            or self._source is not source
            or self._memory is not memory
        ):
            self._close()
            self._source, self._memory = source, memory
            self._offset, self._position, self._size = offset, position, 0
        self._size += size

    def _close(self) -> None:
        if self._source is not None and self._size:
            view = memoryview(self._memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
            piece = view[self._position : self._position + self._size]
            self._done.append(Read(self._source, self._offset, piece))

    def all(self) -> list[Read]:
        """Return the reads, in the order in which they were added."""
        self._close()
        self._size = 0
        return self._done


def _runs(place: Place) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of a region: start in the tensor, length, and place in memory."""
    region, info = place.slot.region or (), place.slot.info
    length = runs_in(region, info.shape, info.itemsize).length
    starts = starts_of(region, info.shape, info.itemsize).tolist()
    for number, start in enumerate(starts):
        yield start, length, place.offset + number * length


def _read_band(
    source: ByteSource,
    start: int,
    places: list[Place],
    band: Region,
    report: Callable[[int], None],
) -> None:
    """Read the part of a tensor's band that places need, and copy it there."""
    info = places[0].slot.info
    itemsize, whole = info.itemsize, whole_region(info.shape)
    cuts = [(place, common(band, place.slot.region or whole)) for place in places]
    needed = [(place, cut) for place, cut in cuts if cut is not None]
    if not needed:
        return
    origin, end = span_of(band, info.shape, itemsize)
    memory = np.empty(end - origin, np.uint8)
    view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
    ranges: Iterable[tuple[int, int]] = [(origin, end)]
    if sum(place.slot.nbytes for place in places) < info.nbytes:  # something is left out
        wanted = sum(math.prod(shape_of(cut)) for _, cut in needed) * itemsize
        # If most bytes are gaps, only short gaps are read: locally, up to a page.
        gap = source.gap if 2 * wanted >= end - origin else source.gap // 4
        ranges = ranges_of((cut for _, cut in needed), info.shape, itemsize, gap)
    for first, last in ranges:
        source.fill([view[first - origin : last - origin]], start + first)
    values: NDArray[Any] = np.ndarray(shape_of(band), f"u{itemsize}", memory)
    for place, cut in needed:
        region = place.slot.region or whole
        place.items()[within(cut, region)] = values[within(cut, band)]
        report(math.prod(shape_of(cut)) * itemsize)


def mapped(
    slot: Slot,
    memory: NDArray[np.uint8],
    start: int,
    memory_for: Callable[[Slot], tuple[NDArray[np.uint8], int]],
) -> tuple[Place, Callable[[], None] | None]:
    """Find a slot in the map of its file; return a copy to make if it is not one run there."""
    info = slot.info
    if slot.offset >= 0:
        if slot.region is None:
            return Place(slot, memory, start), None
        runs = runs_in(slot.region, info.shape, info.itemsize)
        if runs.number <= 1:
            first = span_of(slot.region, info.shape, info.itemsize)[0] if runs.number else 0
            return Place(slot, memory, start + first), None
    place = Place(slot, *memory_for(slot))
    whole = whole_region(info.shape)
    items = place.items()
    values: NDArray[Any] = np.ndarray(info.shape, items.dtype, memory, start)
    return place, partial(np.copyto, items, values[within(slot.region or whole, whole)])

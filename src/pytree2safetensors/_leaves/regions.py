"""Regions of a tensor: where the elements of a hyperrectangle are in a file.

A tensor's bytes are in row-major order, so a region consists of equal runs.

Specification: *Loading into a template*.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Shape: TypeAlias = tuple[int, ...]
Region: TypeAlias = tuple[tuple[int, int], ...]  # where it starts and stops on each axis

BAND = 4 << 20  # bytes: few enough for the cache, many enough for one call


def region_of(index: Sequence[Any], shape: Shape) -> Region:
    """Return the region that an index of slices or integers selects; missing axes are whole."""
    found = []
    for axis, size in enumerate(shape):
        part = index[axis] if axis < len(index) else slice(None)
        start, stop, _ = (part if isinstance(part, slice) else slice(part, part + 1)).indices(size)
        found.append((start, max(start, stop)))
    return tuple(found)


def whole_region(shape: Shape) -> Region:
    """Return the region that is all of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(region: Region) -> Shape:
    """Return the shape of a region."""
    return tuple(stop - start for start, stop in region)


class Runs(NamedTuple):
    """Equal runs of bytes: how many there are, and the length of each."""

    number: int
    length: int


def runs_in(region: Region, shape: Shape, itemsize: int) -> Runs:
    """Return how many runs a region has, and how long they are."""
    sizes = shape_of(region)
    if 0 in sizes:
        return Runs(0, 0)
    cut = _cut_axis(region, shape)
    return Runs(math.prod(sizes[:cut]), math.prod(sizes[cut:]) * itemsize)


def _cut_axis(region: Region, shape: Shape) -> int:
    """Return the last axis on which a region is not whole; the axes after it are contiguous."""
    partial = [axis for axis, bounds in enumerate(region) if bounds != (0, shape[axis])]
    return partial[-1] if partial else 0


def starts_of(region: Region, shape: Shape, itemsize: int) -> NDArray[np.int64]:
    """Return where the runs of a region start, in bytes from the start of its tensor, in order."""
    if 0 in shape_of(region):
        return np.empty(0, np.int64)
    starts = np.zeros(1, np.int64)
    if shape:
        cut = _cut_axis(region, shape)
        strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
        starts += region[cut][0] * strides[cut]
        for axis in reversed(range(cut)):
            steps = np.arange(*region[axis], dtype=np.int64) * strides[axis]
            starts = (steps[:, None] + starts).reshape(-1)
    return starts


def span_of(region: Region, shape: Shape, itemsize: int) -> tuple[int, int]:
    """Return where the bytes of a region that is not empty start and stop."""
    first = last = 0
    for (start, stop), size in zip(region, shape, strict=True):
        first, last = first * size + start, last * size + stop - 1
    return first * itemsize, (last + 1) * itemsize


def bands_of(shape: Shape, itemsize: int) -> Iterator[Region]:
    """Split a tensor into regions of one run each that fit the cache."""
    if 0 in shape:
        return
    row, axis = math.prod(shape) * itemsize, -1  # bytes of what one index on `axis` selects
    while axis + 1 < len(shape) and (axis < 0 or row > BAND):
        axis += 1
        row //= shape[axis]
    if axis < 0:
        yield ()
        return
    step = max(1, BAND // row)
    whole = whole_region(shape[axis + 1 :])
    for before in product(*(range(size) for size in shape[:axis])):
        leading = tuple((index, index + 1) for index in before)
        for start in range(0, shape[axis], step):
            yield (*leading, (start, min(start + step, shape[axis])), *whole)


def common(first: Region, second: Region) -> Region | None:
    """Return the intersection of two regions; None if it is empty."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(start >= stop for start, stop in found) else found


def within(region: Region, outer: Region) -> tuple[slice, ...]:
    """Return the index of a region in an array of a larger region."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(region, outer, strict=True)
    )


class Part(NamedTuple):
    """A region of a tensor, and its values in units of one item."""

    region: Region
    values: NDArray[Any]


def gather(parts: Sequence[Part], shape: Shape, itemsize: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes and offsets of parts that do not overlap, with adjacent runs joined."""
    for band in bands_of(shape, itemsize):
        size = math.prod(shape_of(band)) * itemsize
        memory = np.empty(size, np.uint8)
        found = []
        for part in parts:
            shared = common(band, part.region)
            if shared is not None:
                values = memory.view(part.values.dtype).reshape(shape_of(band))
                values[within(shared, band)] = part.values[within(shared, part.region)]
                found.append(shared)
        origin, _ = span_of(band, shape, itemsize)
        view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
        if sum(math.prod(shape_of(shared)) for shared in found) * itemsize == size:
            yield origin, view  # avoids many runs
            continue
        for start, stop in ranges_of(found, shape, itemsize):
            yield start, view[start - origin : stop - origin]


def ranges_of(
    regions: Iterable[Region], shape: Shape, itemsize: int, gap: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield where the bytes of regions start and stop, with regions joined across small gaps."""
    pairs = []
    for region in regions:
        starts, length = starts_of(region, shape, itemsize), runs_in(region, shape, itemsize).length
        if length:
            pairs.append(np.stack([starts, starts + length], axis=1))
    if not pairs:
        return
    ranges = np.concatenate(pairs)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 1])  # a range may contain later ones
    breaks = np.flatnonzero(ranges[1:, 0] > ends[:-1] + gap)
    starts = ranges[np.concatenate([[0], breaks + 1]), 0]
    stops = ends[np.concatenate([breaks, [len(ranges) - 1]])]
    yield from zip(starts.tolist(), stops.tolist(), strict=True)

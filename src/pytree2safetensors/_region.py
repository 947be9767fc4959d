"""Regions of a tensor: where the elements of a hyperrectangle stand in a file.

A tensor's bytes stand in row-major order, so a region of it is one or many equal runs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]  # where it starts and stops on each axis

BAND = 2 << 20  # bytes: few enough for the cache, many enough for one call


def region_of(index: Sequence[Any], shape: Shape) -> Region:
    """The region that an index of slices (or integers) selects; axes that it lacks are whole."""
    found = []
    for axis, size in enumerate(shape):
        part = index[axis] if axis < len(index) else slice(None)
        start, stop, _ = (part if isinstance(part, slice) else slice(part, part + 1)).indices(size)
        found.append((start, max(start, stop)))
    return tuple(found)


def shape_of(region: Region) -> Shape:
    """The shape of a region."""
    return tuple(stop - start for start, stop in region)


class Runs(NamedTuple):
    """Equal runs of bytes: where each starts, in order, and their length."""

    starts: NDArray[np.int64]
    length: int


def runs_of(region: Region, shape: Shape, itemsize: int) -> Runs:
    """Where a region stands, in bytes from the start of its tensor."""
    if 0 in shape_of(region):
        return Runs(np.empty(0, np.int64), 0)
    partial = [axis for axis, bounds in enumerate(region) if bounds != (0, shape[axis])]
    last = partial[-1] if partial else 0
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    if not shape:
        return Runs(np.zeros(1, np.int64), itemsize)
    start, stop = region[last]
    starts = np.array([start * strides[last]], np.int64)
    for axis in reversed(range(last)):
        steps = np.arange(*region[axis], dtype=np.int64) * strides[axis]
        starts = (steps[:, None] + starts).reshape(-1)
    return _joined(Runs(starts, (stop - start) * strides[last]))


def span_of(region: Region, shape: Shape, itemsize: int) -> tuple[int, int]:
    """Where the first byte of a region that is not empty stands, and where its last one ends."""
    first = last = 0
    for (start, stop), size in zip(region, shape, strict=True):
        first, last = first * size + start, last * size + stop - 1
    return first * itemsize, (last + 1) * itemsize


def _joined(runs: Runs) -> Runs:
    """One run where each follows the one before."""
    starts, length = runs
    if len(starts) > 1 and int(starts[-1] - starts[0]) == length * (len(starts) - 1):
        return Runs(starts[:1], length * len(starts))
    return runs


def bands_of(shape: Shape, itemsize: int) -> Iterator[Region]:
    """Cut a tensor into regions of one run each, of a size that suits the cache."""
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
    whole = tuple((0, size) for size in shape[axis + 1 :])
    for before in product(*(range(size) for size in shape[:axis])):
        leading = tuple((index, index + 1) for index in before)
        for start in range(0, shape[axis], step):
            yield (*leading, (start, min(start + step, shape[axis])), *whole)


def common(first: Region, second: Region) -> Region | None:
    """What two regions have in common; None where that is nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(start >= stop for start, stop in found) else found


def within(region: Region, outer: Region) -> tuple[slice, ...]:
    """The index that selects a region from an array of the region around it."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(region, outer, strict=True)
    )


class Part(NamedTuple):
    """A region of a tensor, and its values in units of one item."""

    region: Region
    values: NDArray[Any]


def gather(parts: Sequence[Part], shape: Shape, itemsize: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of parts and their offsets, neighbouring runs together.

    What a piece shows changes with the next.
    """
    memory = np.empty(0, np.uint8)
    for band in bands_of(shape, itemsize):
        size = math.prod(shape_of(band)) * itemsize
        if len(memory) < size:
            memory = np.empty(size, np.uint8)
        found = []
        for part in parts:
            shared = common(band, part.region)
            if shared is not None:
                values = memory[:size].view(part.values.dtype).reshape(shape_of(band))
                values[within(shared, band)] = part.values[within(shared, part.region)]
                found.append(runs_of(shared, shape, itemsize))
        origin, _ = span_of(band, shape, itemsize)
        view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
        for start, stop in ranges_of(found):
            yield start, view[start - origin : stop - origin]


def ranges_of(found: Iterable[Runs], gap: int = 0) -> Iterator[tuple[int, int]]:
    """Where bytes start and stop that follow each other, or with such a gap at most, in order."""
    pairs = [
        np.stack([runs.starts, runs.starts + runs.length], axis=1) for runs in found if runs.length
    ]
    if not pairs:
        return
    ranges = np.concatenate(pairs)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    breaks = np.flatnonzero(ranges[1:, 0] > ranges[:-1, 1] + gap)
    starts = ranges[np.concatenate([[0], breaks + 1]), 0]
    stops = ranges[np.concatenate([breaks, [len(ranges) - 1]]), 1]
    yield from zip(starts.tolist(), stops.tolist(), strict=True)

"""Views: a leaf as regions of tensors, with axes in another order.

A view works in both directions. Reading fills memory in the order of the file, and `to_leaf` turns it
into a region of the leaf. Writing takes a region of the leaf, which `to_file` turns into the order of
the file.

Specification: *Rules*.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product, takewhile
from typing import Any, NamedTuple, TypeAlias

import jax

from pytree2safetensors._leaves.jax_versions import concatenated
from pytree2safetensors._leaves.regions import Region, Shape, shape_of, whole_region, within


class View(NamedTuple):
    """How a leaf is made of tensors.

    In terms of NumPy: reshape each tensor to `fine`, cut it to `region`, and stack the tensors on axes
    of the sizes `stacked`. Each axis of the leaf merges some axes of the result, in the order that
    `axes` gives. All other axes of the result have length 1.
    """

    names: tuple[str, ...]  # the last of the stacked axes changes fastest
    stored: Shape  # of each tensor
    stacked: Shape
    fine: Shape
    region: Region
    axes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> Shape:
        """Return the sizes of the axes that `axes` numbers."""
        return (*self.stacked, *shape_of(self.region))

    @property
    def shape(self) -> Shape:
        """Return the shape of the leaf."""
        sizes = self.sizes
        return tuple(math.prod(sizes[axis] for axis in merged) for merged in self.axes)

    @property
    def is_plain(self) -> bool:
        """Return whether the leaf is one whole tensor."""
        return self == plain_view(self.names[0], self.stored)

    @property
    def order(self) -> tuple[int, ...]:
        """Return the axes in the order of the leaf, after the axes that the leaf does not have."""
        mine = [axis for merged in self.axes for axis in merged]
        others = [axis for axis in range(len(self.sizes)) if axis not in mine]
        return (*others, *mine)


class Box(NamedTuple):
    """A region of a leaf that is also a region on the view's axes."""

    region: Region  # of the leaf
    bounds: Region  # of the stacked axes, and of `fine`

    @property
    def shape(self) -> Shape:
        """Return the shape of its memory in the order of the file."""
        return shape_of(self.bounds)


class Source(NamedTuple):
    """A region of a tensor, and where it belongs in the memory of a box."""

    number: int  # of the tensor, among the names of the view
    region: Region  # of the tensor, reshaped to `fine`
    place: tuple[Any, ...]  # the index that selects its memory


def plain_view(name: str, shape: Shape) -> View:
    """Return the view of a leaf that is one whole tensor."""
    axes = tuple((axis,) for axis in range(len(shape)))
    return View((name,), shape, (), shape, whole_region(shape), axes)


def boxes_of(view: View, region: Region) -> list[Box]:
    """Split a region of the leaf into boxes: none if it is empty, several if it cuts merged axes."""
    sizes = view.sizes
    cuts = [
        list(_cut([sizes[axis] for axis in merged], *bounds))
        for merged, bounds in zip(view.axes, region, strict=True)
    ]
    origins = [0] * len(view.stacked) + [start for start, _ in view.region]
    found = []
    for cut in product(*cuts):
        bounds = [(start, start + size) for start, size in zip(origins, sizes, strict=True)]
        for merged, (_, ranges) in zip(view.axes, cut, strict=True):
            for axis, (start, stop) in zip(merged, ranges, strict=True):
                bounds[axis] = origins[axis] + start, origins[axis] + stop
        found.append(Box(tuple(piece for piece, _ in cut), tuple(bounds)))
    return found


_Range: TypeAlias = tuple[int, int]


def _cut(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[_Range, list[_Range]]]:
    """Split a range of a merged axis into pieces, each with the ranges of the axes in it."""
    if start >= stop:
        return
    if len(sizes) < 2:
        yield (start, stop), [(start, stop)] * len(sizes)
    else:
        inner = math.prod(sizes[1:])
        first, last = -(-start // inner), stop // inner  # whole rows
        if first > last:
            yield from _cut_row(sizes, last, start, stop)
            return
        if start < first * inner:
            yield from _cut_row(sizes, first - 1, start, first * inner)
        if first < last:
            yield (first * inner, last * inner), [(first, last), *((0, n) for n in sizes[1:])]
        if last * inner < stop:
            yield from _cut_row(sizes, last, last * inner, stop)


def _cut_row(
    sizes: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[_Range, list[_Range]]]:
    origin = row * math.prod(sizes[1:])
    for (first, last), ranges in _cut(sizes[1:], start - origin, stop - origin):
        yield (first + origin, last + origin), [(row, row + 1), *ranges]


def sources_of(view: View, box: Box) -> Iterator[Source]:
    """Yield what to read for a box, or where to write it."""
    count = len(view.stacked)
    stacked, region = box.bounds[:count], box.bounds[count:]
    for numbers in product(*(range(*bounds) for bounds in stacked)):
        place = 0
        for number, size in zip(numbers, view.stacked, strict=True):
            place = place * size + number
        index = [n - start for n, (start, _) in zip(numbers, stacked, strict=True)]
        yield Source(place, region, (*index, ...))


def to_leaf(view: View, box: Box, memory: Any) -> Any:
    """View the memory of a box as a region of the leaf. This copies only if axes are merged.

    `memory` is an array of NumPy or JAX, and the result is of the same kind.
    """
    return memory.transpose(view.order).reshape(shape_of(box.region))


def to_file(view: View, box: Box, values: Any) -> Any:
    """View a region of the leaf in the order of the file, without a copy. This inverts `to_leaf`."""
    shape, order = box.shape, view.order
    back = sorted(range(len(order)), key=order.__getitem__)
    return values.reshape([shape[axis] for axis in order]).transpose(back)


def file_parts(
    view: View, region: Region, values: Any, number: int | None = None
) -> Iterator[tuple[Source, Any]]:
    """Yield the parts of tensors that the values of a region of the leaf make.

    `values` is a NumPy array, which is not copied, or a JAX array. With a number, only the parts of
    that tensor are made.
    """
    for box in boxes_of(view, region):
        is_whole = box.region == region
        shown = to_file(
            view, box, values if is_whole else _cut_out(values, within(box.region, region))
        )
        for source in sources_of(view, box):
            if number in {None, source.number}:
                yield source, _selected(shown, source.place)


def _selected(values: Any, place: tuple[Any, ...]) -> Any:
    """Return the values at an index that ends with an ellipsis."""
    if isinstance(values, jax.Array):  # indexing fails in host memory
        for number in place[:-1]:
            values = jax.lax.index_in_dim(values, number, keepdims=False)
        return values
    return values[place]


def tiled(parts: Sequence[tuple[Region, Any]], axis: int = 0) -> Any:
    """Join regions that form a grid into one JAX array; they differ only from `axis` on."""
    if len(parts) == 1:
        return parts[0][1]
    rows: dict[tuple[int, int], list[tuple[Region, Any]]] = {}
    for part in parts:
        rows.setdefault(part[0][axis], []).append(part)
    made = [tiled(rows[bounds], axis + 1) for bounds in sorted(rows)]
    return made[0] if len(made) == 1 else concatenated(made, axis)


def region_of_tensor(view: View, number: int) -> Region:
    """Return the smallest region of the leaf that contains the whole part of a tensor in it."""
    region = []
    for merged, size in zip(view.axes, view.shape, strict=True):
        index, step = 0, size  # of the leading axes that are stacked, together
        for axis in takewhile(lambda axis: axis < len(view.stacked), merged):
            count = view.stacked[axis]
            index = index * count + number // math.prod(view.stacked[axis + 1 :]) % count
            step //= count
        region.append((index * step, (index + 1) * step))
    return tuple(region)


def leaf_of(view: View, tensors: Mapping[str, Any], stack: Any) -> Any:
    """Make the leaf from whole tensors; `stack` is the function of NumPy or JAX."""
    index = tuple(slice(*bounds) for bounds in view.region)
    parts = [_cut_out(tensors[name].reshape(view.fine), index) for name in view.names]
    memory = (parts[0] if len(parts) == 1 else stack(parts)).reshape(view.sizes)
    return memory.transpose(view.order).reshape(view.shape)


def _cut_out(values: Any, index: tuple[slice, ...]) -> Any:
    """Return the values at an index with a slice for each axis."""
    if isinstance(values, jax.Array) and index:  # indexing fails in host memory
        return jax.lax.slice(values, [s.start for s in index], [s.stop for s in index])
    return values[index]

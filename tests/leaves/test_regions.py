"""Regions of tensors as ranges of bytes."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from placed import select
from pytree2safetensors._leaves import regions as regions_module
from pytree2safetensors._leaves.regions import (
    Part,
    Region,
    bands_of,
    common,
    gather,
    ranges_of,
    region_of,
    runs_in,
    span_of,
    starts_of,
)


@st.composite
def shapes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    bounds = [tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape]
    return shape, tuple((start, stop) for start, stop in bounds)


@given(shapes_and_regions(), st.sampled_from([1, 2, 4, 8]))
def test_runs_are_where_a_region_stands(
    case: tuple[tuple[int, ...], Region], itemsize: int
) -> None:
    shape, region = case
    array = np.arange(math.prod(shape), dtype=f"u{itemsize}").reshape(shape)
    whole = array.tobytes()
    starts = starts_of(region, shape, itemsize)
    number, length = runs_in(region, shape, itemsize)
    assert number == len(starts)
    pieces = [whole[start : start + length] for start in starts.tolist()]
    expected = select(array, region).tobytes()
    assert b"".join(pieces) == expected
    assert all(starts[1:] > starts[:-1] + length)  # neighbors are one run
    if expected:
        first, last = span_of(region, shape, itemsize)
        assert first == starts[0]
        assert last == starts[-1] + length


@given(shapes_and_regions(), st.integers(1, 100), st.sampled_from([1, 2, 4, 8]))
def test_bands_cut_a_tensor_into_runs(
    case: tuple[tuple[int, ...], Region], limit: int, itemsize: int
) -> None:
    shape, _ = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions_module, "BAND", limit)
        bands = list(bands_of(shape, itemsize))
    position = 0
    for band in bands:
        length = runs_in(band, shape, itemsize).length
        assert starts_of(band, shape, itemsize).tolist() == [position]
        assert length <= max(limit, itemsize)
        position += length
    assert position == math.prod(shape) * itemsize
    assert len(bands) <= 1 or position > limit  # a small tensor is one band


@given(shapes_and_regions(), st.integers(1, 100), st.data())
def test_gather_gives_the_bytes_of_parts(
    case: tuple[tuple[int, ...], Region], limit: int, data: st.DataObject
) -> None:
    shape, region = case
    array = np.arange(1, math.prod(shape) + 1, dtype=np.uint16).reshape(shape)
    parts = [Part(region, select(array, region))]
    if shape and data.draw(
        st.sampled_from([False, True])
    ):  # and the rest of its first axis beside it
        _, stop = region[0]
        rest = ((stop, shape[0]), *region[1:])
        parts.append(Part(rest, select(array, rest)))
    expected = np.zeros(shape, np.uint16)
    for part in parts:
        expected[tuple(slice(*bounds) for bounds in part.region)] = part.values
    found = bytearray(expected.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions_module, "BAND", limit)
        end, size = -1, 0
        for offset, piece in gather(parts, shape, 2):
            assert offset > end or not offset or limit < 100  # neighbors within a band are one
            end = offset + len(piece)
            found[offset:end] = piece
            size += len(piece)
    assert bytes(found) == expected.tobytes()
    assert size == sum(part.values.nbytes for part in parts)  # and no bytes between them


def test_regions_that_do_not_overlap_have_nothing_in_common() -> None:
    assert common(((0, 2), (0, 4)), ((1, 3), (2, 6))) == ((1, 2), (2, 4))
    assert common(((0, 2),), ((2, 3),)) is None
    assert common((), ()) == ()


@given(shapes_and_regions(), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 30))
@example(((4, 4), ((0, 4), (0, 2))), [], 4)  # gaps that are all closed
def test_ranges_are_the_bytes_of_regions_joined_across_gaps(
    case: tuple[tuple[int, ...], Region], cuts: list[int], gap: int
) -> None:
    shape, region = case
    regions = [region, tuple((min(cut, a), a) for (a, _), cut in zip(region, cuts, strict=False))]
    regions = [found for found in regions if len(found) == len(shape)]
    item = np.arange(2 * math.prod(shape)).reshape(*shape, 2)
    there = sorted({int(byte) for found in regions for byte in select(item, found).reshape(-1)})
    expected: list[tuple[int, int]] = []
    for byte in there:
        if expected and byte <= expected[-1][1] + gap:
            expected[-1] = expected[-1][0], byte + 1
        else:
            expected.append((byte, byte + 1))
    assert list(ranges_of(regions, shape, 2, gap)) == expected


@pytest.mark.parametrize("inner", [(0, 2), (1, 3), (2, 4)])
def test_the_range_of_a_region_contains_that_of_a_region_in_it(inner: tuple[int, int]) -> None:
    regions = [((0, 2), (0, 4)), ((0, 1), inner)]
    assert list(ranges_of(regions, (2, 4), 2)) == [(0, 16)]
    assert list(ranges_of(regions[::-1], (2, 4), 2)) == [(0, 16)]


def test_a_region_is_whole_on_axes_that_its_index_lacks() -> None:
    assert region_of((), (2, 3)) == ((0, 2), (0, 3))
    assert region_of((1,), (2, 3)) == ((1, 2), (0, 3))
    assert region_of((0, 1), (2, 3)) == ((0, 1), (1, 2))
    assert region_of((slice(1, None), slice(2)), (2, 3)) == ((1, 2), (0, 2))
    assert region_of((slice(5, 4),), (6,)) == ((5, 5),)

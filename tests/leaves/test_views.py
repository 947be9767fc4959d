"""Views: a region that was written to tensors reads as the same region."""

import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placed import select
from pytree2safetensors._leaves.regions import Region
from pytree2safetensors._leaves.views import (
    View,
    boxes_of,
    file_parts,
    leaf_of,
    region_of_tensor,
    tiled,
)

axis_sizes = st.lists(st.integers(1, 3), max_size=3)


@st.composite
def views_and_regions(draw: st.DrawFn) -> tuple[View, Region]:
    """A view that stacks, moves and merges axes, and a region of its leaf."""
    stacked, fine = tuple(draw(axis_sizes)), tuple(draw(axis_sizes))
    axes = draw(st.permutations(range(len(stacked) + len(fine))))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(axes) - 1)))))
    merged = tuple(tuple(axes[start:stop]) for start, stop in pairwise([0, *cuts, len(axes)]))
    names = tuple(f"{number}" for number in range(math.prod(stacked)))
    whole = tuple((0, size) for size in fine)
    view = View(names, fine, stacked, fine, whole, merged if axes else ())
    bounds = [draw(st.tuples(*[st.integers(0, size)] * 2)) for size in view.shape]
    return view, tuple((min(pair), max(pair)) for pair in bounds)


def index_of(region: Region) -> tuple[Any, ...]:
    return (*(slice(*bounds) for bounds in region), ...)


@given(views_and_regions())
def test_a_region_writes_what_reads_as_it(case: tuple[View, Region]) -> None:
    view, region = case
    values = np.arange(1, math.prod(view.shape) + 1).reshape(view.shape)
    tensors = {name: np.zeros(view.fine, int) for name in view.names}
    for source, part in file_parts(view, region, np.asarray(select(values, region))):
        tensors[view.names[source.number]][index_of(source.region)] = part
    expected = np.zeros(view.shape, int)
    expected[index_of(region)] = select(values, region)
    assert leaf_of(view, tensors, np.stack).tolist() == expected.tolist()


@given(views_and_regions())
def test_the_region_of_a_tensor_has_all_of_it(case: tuple[View, Region]) -> None:
    view, _ = case
    values = np.arange(math.prod(view.shape)).reshape(view.shape)
    for number, name in enumerate(view.names):
        region = region_of_tensor(view, number)
        tensors = {other: np.full(view.fine, other == name) for other in view.names}
        outside = np.array(leaf_of(view, tensors, np.stack))
        outside[index_of(region)] = False
        assert not outside.any()
        parts = file_parts(view, region, values[index_of(region)], number)
        assert sum(part.size for _, part in parts) == math.prod(view.fine)


def test_tensors_that_are_stacked_outside_of_another_axis_have_small_regions() -> None:
    view = View(
        ("0", "1", "2", "3", "4", "5"), (4, 5), (3, 2), (4, 5), ((0, 4), (0, 5)), ((0, 1, 2), (3,))
    )
    assert [region_of_tensor(view, number) for number in range(6)] == [
        ((4 * number, 4 * number + 4), (0, 5)) for number in range(6)
    ]
    view = view._replace(axes=((2, 0), (1, 3)))
    assert region_of_tensor(view, 3) == ((0, 12), (5, 10))


@settings(max_examples=30)  # JAX compiles a program for each shape
@given(views_and_regions())
def test_the_boxes_of_a_region_are_a_grid_that_makes_it(case: tuple[View, Region]) -> None:
    view, region = case
    values = np.arange(math.prod(view.shape)).reshape(view.shape)
    parts = [
        (box.region, jnp.asarray(values[index_of(box.region)])) for box in boxes_of(view, region)
    ]
    expected = values[index_of(region)]
    assert bool(parts) == bool(expected.size)
    if parts:
        assert tiled(parts[::-1]).tolist() == expected.tolist()

"""Outlines: one row for each node and leaf, and one row for similar siblings."""

import io
from pathlib import Path

import jax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from command import small
from pytree2safetensors import load_pytree, save_pytree
from pytree2safetensors._cli.outline import clip, outline
from pytree2safetensors._cli.summary import Leaf, summarize
from pytree2safetensors._cli.terminal import plain
from pytree2safetensors._load.opening import open_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")


def test_names_that_are_shown_are_prefixes_to_load() -> None:
    file = io.BytesIO()
    save_pytree(small(), file)
    Path("small.safetensors").write_bytes(file.getvalue())
    with open_checkpoint("small.safetensors") as checkpoint:
        summary = summarize(checkpoint)
    rows = outline(summary.leaves, summary.nodes, fold=False)
    assert len(rows) == 27
    for row in rows:
        tree = load_pytree("small.safetensors", prefix=plain(row.name))
        assert len(jax.tree_util.tree_leaves(tree)) == row.leaves, row.name


segments = st.builds(
    "{}{}{}".format,
    st.sampled_from([".", "@", "#", ".a", "@layer_", "@\\(", "x", ""]),
    st.integers(0, 30) | st.sampled_from(["", "07", "08", "09", "10"]),
    st.sampled_from(["", ")", "w", "\\"]),
)
names_of_leaves = st.lists(st.lists(segments, max_size=4).map("".join), unique=True, max_size=40)


@given(names_of_leaves)
@example(["", "a", "a.b", ".a", "x\\y", "x\\y.z", "a#1", "a#01"])
def test_an_outline_of_everything_has_each_leaf_once(names: list[str]) -> None:
    leaves = [Leaf(name, "array", "int8", (), 1) for name in names]
    rows = outline(leaves, {}, fold=False)
    assert sorted(row.name for row in rows if row.leaf is not None) == sorted(names)
    assert all(row.times == 1 for row in rows)


@given(names_of_leaves, st.lists(st.integers(0, 1), min_size=40, max_size=40))
def test_an_outline_loses_no_leaf_and_no_byte(names: list[str], sizes: list[int]) -> None:
    leaves = [
        Leaf(n, "array", "int8", (size,), size) for n, size in zip(names, sizes, strict=False)
    ]
    rows = outline(leaves, {})
    assert sum(row.times for row in rows if row.leaf is not None) == len(leaves)
    for row in rows:  # a row's label is the end of its name
        assert row.name.endswith(row.label)
    own = [(row.times, row.leaf) for row in rows if row.leaf is not None]
    assert sum(times * leaf.nbytes for times, leaf in own) == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["#0", "#1", "#2"], ["#0..2"]),
        (["#0", "#1"], ["#0", "#1"]),
        (["#9", "#10", "#11"], ["#9..11"]),
        (["@w08", "@w09", "@w10"], ["@w08..10"]),
        (["@w8", "@w9", "@w010"], ["@w8", "@w9", "@w010"]),
        (["#0", "#1", "#2", "#4", "#6", "#7"], ["#0..2,4,6..7"]),
        ([f"#{number}" for number in range(0, 20, 2)], ["#0,2,4,..,18"]),
        (["@\\(1)", "@\\(2)", "@\\(3)"], ["@\\(1..3)"]),
        (["block_1_conv", "block_2_conv", "block_3_conv"], ["block_1..3_conv"]),
        (["l#0@a1", "l#1@a1", "l#2@a1"], ["l#0..2@a1"]),
    ],
)
def test_names_that_differ_in_a_number_are_folded(names: list[str], rows: list[str]) -> None:
    leaves = [Leaf(name, "array", "int8", (), 1) for name in names]
    assert [row.name for row in outline(leaves, {})] == rows


def test_what_differs_is_not_folded() -> None:
    leaves = [Leaf(f"#{number}", "array", "int8", (number % 2,), 1) for number in range(8)]
    assert [row.name for row in outline(leaves, {})] == ["#0,2,4,6", "#1,3,5,7"]
    strs = [Leaf(f"#{number}", "str", "", (), 0, value=str(number)) for number in range(3)]
    assert len(outline(strs, {})) == 3


def test_a_path_of_many_keys_has_one_row() -> None:
    name = "@a" * 20_000
    assert [row.name for row in outline([Leaf(name, "array", "int8", (), 1)], {})] == [name]


def leaves_at(*names: str) -> list[Leaf]:
    return [Leaf(name, "array", f"int{place}", (2,), 2) for place, name in enumerate(names)]


def test_an_outline_of_few_rows_is_not_clipped() -> None:
    rows = outline(leaves_at("@a@b", "@a@c#0", "@a@c#1"), {})
    assert clip(rows) == (rows, 0)
    assert clip([]) == ([], 0)


def test_a_clipped_outline_leaves_out_the_deepest_rows() -> None:
    names = [f"@{first}@{second}" for first in "abcde" for second in range(50)]
    rows, more = clip(outline(leaves_at("@single", *names), {}))
    assert more == 0
    assert [(row.name, row.closed) for row in rows] == [
        *((f"@{first}", True) for first in "abcde"),
        ("@single", False),
    ]
    assert [row.leaves for row in rows] == [50, 50, 50, 50, 50, 1]
    assert [row.parameters for row in rows] == [100, 100, 100, 100, 100, 2]


def test_a_clipped_outline_counts_the_rows_of_the_first_level_that_are_left_out() -> None:
    rows, more = clip(outline(leaves_at(*(f"@{number:03}x" for number in range(300))), {}))
    assert (len(rows), more) == (200, 100)
    assert rows[-1].name == "@199x"

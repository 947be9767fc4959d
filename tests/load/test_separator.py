"""Names of other programs as trees: `load_pytree` and `load_abstract` with a separator."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oracle import assert_same_values
from pytree2safetensors import (
    Rule,
    TreeStructureError,
    WeightsMismatchError,
    load_abstract,
    load_into_pytree,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._tree import separated
from pytree2safetensors._tree.separated import build_separated

P: Any = PartitionSpec  # JAX gives its constructor no types


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# Names, and the tree that they make with the separator "."; a leaf is its name.
TREES: list[tuple[list[str], Any]] = [
    ([], {}),
    ([""], ""),
    (["a"], {"a": "a"}),
    (["", "a"], {"": "", "a": "a"}),
    (["a.b", "a.c.d", "e"], {"a": {"b": "a.b", "c": {"d": "a.c.d"}}, "e": "e"}),
    (["h.0.w", "h.1.w"], {"h": [{"w": "h.0.w"}, {"w": "h.1.w"}]}),
    (["0", "1"], ["0", "1"]),
    (["f.0.w", "f.3.w"], {"f": [{"w": "f.0.w"}, None, None, {"w": "f.3.w"}]}),
    (["h.0", "h.x"], {"h": {"0": "h.0", "x": "h.x"}}),
    (["h.00", "h.01"], {"h": {"00": "h.00", "01": "h.01"}}),
    (["h.0", "h.01"], {"h": {"0": "h.0", "01": "h.01"}}),
    (["h.-1", "h.+0", "h.1_0"], {"h": {"+0": "h.+0", "-1": "h.-1", "1_0": "h.1_0"}}),
    (["h.\u0661"], {"h": {"\u0661": "h.\u0661"}}),
    (["h.99999999999"], {"h": {"99999999999": "h.99999999999"}}),
    (["a..b", ".c", "d."], {"": {"c": ".c"}, "a": {"": {"b": "a..b"}}, "d": {"": "d."}}),
    (["w", "w.absmax"], {"w": {"": "w", "absmax": "w.absmax"}}),
    (["w.absmax", "w", "w.0"], {"w": {"": "w", "0": "w.0", "absmax": "w.absmax"}}),
    (["a.b.c", "a.b", "a"], {"a": {"": "a", "b": {"": "a.b", "c": "a.b.c"}}}),
    ([r"a\.b", "@c#0"], {"a\\": {"b": r"a\.b"}, "@c#0": "@c#0"}),
]


@pytest.mark.parametrize(("names", "tree"), TREES, ids=[",".join(names) for names, _ in TREES])
def test_names_with_a_separator_make_a_tree(names: list[str], tree: Any, path: Path) -> None:
    assert build_separated({name: name for name in names}, ".", "") == tree
    assert build_separated({name: name for name in reversed(names)}, ".", "") == tree
    safetensors.numpy.save_file({name: np.zeros(1, np.int8) for name in names}, path)
    for found in (load_pytree(path, separator="."), load_abstract(path, separator=".")):
        assert jax.tree.map(lambda _: 0, found) == jax.tree.map(lambda _: 0, tree)


def test_dicts_are_in_natural_order() -> None:
    names = ["block10.w", "block2.w", "h.10.w", "h.9.w", "h.x.w", "block2.b", "a", "block01.w"]
    tree = build_separated(dict.fromkeys(names, 0), ".", "")
    assert [*tree] == ["a", "block01", "block2", "block10", "h"]
    assert [*tree["block2"]] == ["b", "w"]
    assert [*tree["h"]] == ["9", "10", "x"]


parts = st.text(st.sampled_from("ab01-"), min_size=1, max_size=3).filter(lambda t: not t.isdigit())
trees = st.recursive(
    st.integers(),
    lambda children: (
        st.dictionaries(parts, children, min_size=1, max_size=3)
        | st.lists(children, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


@given(trees, st.sampled_from([".", "/", "__", "::"]))
def test_a_tree_is_built_from_its_names(tree: Any, separator: str) -> None:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = {
        separator.join(str(getattr(key, "key", getattr(key, "idx", None))) for key in keys): leaf
        for keys, leaf in pairs
    }
    assert build_separated(names, separator, "") == tree


def test_a_tree_with_a_separator_loads_sharded_and_saves_as_it_was(path: Path) -> None:
    rng = np.random.default_rng(0)
    file = {f"h.{n}.{w}": rng.random((8, 3), np.float32) for n in range(12) for w in ("q", "k.w")}
    safetensors.numpy.save_file(file, path, metadata={"format": "pt"})
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    seen = []

    def place(name: str, _: Any) -> jax.sharding.Sharding:
        seen.append(name)
        return sharding

    template = load_abstract(path, separator=".", sharding=place)
    assert seen == sorted(file)
    same = [Rule("{*}", "{*}")]
    tree = load_into_pytree(template, path, rename=same)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(tree))
    assert_same_values(tree["h"][11]["k"]["w"], file["h.11.k.w"])
    other = path.with_name("other.safetensors")
    save_pytree(tree, other, rename=same, metadata={"format": "pt"})
    saved = safetensors.numpy.load_file(other)
    assert saved.keys() == file.keys()
    assert all((saved[name] == file[name]).all() for name in file)


def test_a_prefix_ends_at_a_separator(path: Path) -> None:
    names = ["a/b", "a/c/0", "a/c/1", "ab", "a@b"]
    safetensors.numpy.save_file(
        {name: np.full((), n, np.int8) for n, name in enumerate(names)}, path
    )
    found = load_abstract(path, separator="/", prefix="a", flat=True)
    assert [*found] == ["b", "c/0", "c/1"]
    assert jax.tree.map(int, load_pytree(path, separator="/", prefix="a/c")) == [1, 2]
    assert int(load_pytree(path, separator="/", prefix="ab")) == 3
    for prefix, nearest in [("a@", "a@b"), ("a/c/", "a/c"), ("a/cc", "a/c"), ("a/c/0/", "a/c/0")]:
        message = f"has nothing at the prefix '{prefix}' (nearest: '{nearest}'); its names begin"
        with pytest.raises(WeightsMismatchError, match=re.escape(message)):
            load_pytree(path, separator="/", prefix=prefix)
    with pytest.raises(WeightsMismatchError, match="has nothing at the prefix 'x'; its names"):
        load_pytree(path, separator="/", prefix="x")


@pytest.mark.parametrize("separator", [".", "__"])
def test_two_names_at_one_place_are_refused(path: Path, separator: str) -> None:
    names = [name.replace(".", separator) for name in ("a", "a.", "a.b")]
    safetensors.numpy.save_file({name: np.zeros(1) for name in names}, path)
    message = rf"do not form a tree: 'a' and 'a{separator}' are at the same place in the tree; load_abstract"
    with pytest.raises(TreeStructureError, match=message):
        load_abstract(path, separator=separator)
    below: list[Callable[[], Any]] = [
        lambda: load_abstract(path, separator=separator, prefix="a"),
        lambda: load_abstract(path, separator=separator, prefix="a", flat=True),
        lambda: load_pytree(path, separator=separator, prefix="a"),
    ]
    for load in below:
        with pytest.raises(TreeStructureError, match="are at the same place") as caught:
            load()
        assert str(caught.value) == (
            f"in {str(path)!r}, 'a' and 'a{separator}' are at the same place below the prefix 'a'; "
            "load_abstract(..., flat=True) without a prefix lists them"
        )
    assert [*load_abstract(path, separator=separator, flat=True)] == names


def test_gaps_and_depth_are_limited() -> None:
    with pytest.raises(TreeStructureError, match="would have 9000001 elements, and the tree would"):
        build_separated({"9000000": 1}, ".", "")
    with pytest.raises(TreeStructureError, match="more than 1048576 gaps"):
        build_separated({f"{n}.x.{2**18}": 1 for n in range(5)}, ".", "")
    assert build_separated({"a." * 300: 1}, ".", "")["a"]["a"]
    with pytest.raises(TreeStructureError, match="nested deeper than JAX can flatten"):
        build_separated({"a." * 20_000: 1}, ".", "")


def test_a_list_may_have_as_many_gaps_as_allowed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separated, "MAX_GAPS", 3)
        assert build_separated({"3": 1}, ".", "") == [None, None, None, 1]
        with pytest.raises(TreeStructureError, match="more than 3 gaps"):
            build_separated({"4": 1}, ".", "")


def test_scalars_of_a_note_are_kept(path: Path) -> None:
    save_pytree({"a.b": 1, "a.c": "text"}, path)  # the names are @a\.b and @a\.c
    assert load_pytree(path, separator="\\.") == {"@a": {"b": 1, "c": "text"}}

"""The equality of trees that other tests use finds all differences, and nothing else."""

from collections import OrderedDict, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from oracle import assert_same, canonical, from_bits, is_same
from pytree2safetensors import PyTreeContainer
from pytree2safetensors.testing import pytrees


@given(pytrees())
def test_a_tree_is_itself(tree: Any) -> None:
    assert_same(tree, tree)
    assert_same(jax.tree_util.tree_map(lambda leaf: leaf, tree), tree)


# No two of these are the same, in spite of what == says of some.
DIFFERENT: list[Any] = [
    1, 1.0, True, 1 + 0j, "1", 0.0, -0.0, float("nan"), 0j, complex(0.0, -0.0), complex(-0.0, 0.0), None, "", (), [],
    {}, OrderedDict(), defaultdict(list), defaultdict(int), PyTreeContainer(), PyTreeContainer({"a": 1}), {"a": 1},
    {"b": 1}, OrderedDict(a=1), {1: 1}, (1,), [1], [(1,)], [[1]], [1, None], [None, 1],
    OrderedDict([("a", 1), ("b", 2)]), OrderedDict([("b", 2), ("a", 1)]),
    from_bits(0, "float32"), from_bits(0x80000000, "float32"), from_bits(0x7FC00000, "float32"),
    from_bits(0x7FC00001, "float32"), from_bits(0xFFC00000, "float32"), from_bits(1, "float32"),
    from_bits(0, "int32"), from_bits(0, ">f4"), from_bits(0, "float16"), from_bits(0, "bfloat16"),
    from_bits(0, "float8_e4m3fn"), from_bits(0, "float8_e5m2"), from_bits(1, "int4"), from_bits(1, "uint4"),
    from_bits(2, "int4"), np.float32(0), np.zeros((1,), np.float32), np.zeros((0,), np.float32),
    np.zeros((0, 1), np.float32), np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32),
    jnp.zeros((), jnp.float32), jnp.asarray(0.0), jnp.asarray(0), jnp.zeros((), jnp.int32), jnp.zeros((1,)),
    jax.random.key(0), jax.random.key(1), jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg"),
    jax.random.split(jax.random.key(0), 1), jax.random.key_data(jax.random.key(0)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(DIFFERENT)))
def test_differences_are_found(index: int) -> None:
    tree = DIFFERENT[index]
    for other, candidate in enumerate(DIFFERENT):
        assert is_same(candidate, tree) is (other == index)
        assert is_same({"a": [candidate]}, {"a": [tree]}) is (other == index)


def test_bits_that_mean_nothing_do_not_count() -> None:
    assert is_same(from_bits(0xF3, "int4"), from_bits(0x03, "int4"))
    assert not is_same(from_bits(0xF3, "int8"), from_bits(0x03, "int8"))


def test_layouts_do_not_count() -> None:
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    for same in (
        np.asfortranarray(values),
        np.flip(np.flip(values).copy()),
        values.astype(np.int32),
    ):
        assert_same(same, values)
    assert not is_same(values.T.copy(), values)
    assert_same(np.broadcast_to(np.int32(7), (2, 2)), np.full((2, 2), 7, np.int32))


def test_canonical_keeps_the_values() -> None:
    big = np.array([1, 2], ">i4")
    found = canonical([big, big[0], np.float64(0.5), 3, "a"])
    assert_same(found, [jnp.array([1, 2]), jnp.int32(1), np.array(0.5), 3, "a"])

"""Moving floats: no operation of JAX changes the bits of NaNs, of subnormals or of zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from placed import P
from pytree2safetensors import Rule, pytree2dict, set_weights
from pytree2safetensors._leaves.as_bits import moved_as_bits

DTYPES: list[Any] = [
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e5m2,
    np.float16,
    np.float32,
    np.complex64,
    np.int8,
]


def patterns(dtype: Any) -> NDArray[Any]:
    """All bits of a dtype, or many of them, with signalling NaNs."""
    dtype = np.dtype(dtype)
    bits = np.arange(1 << min(8 * dtype.itemsize, 16), dtype=f"u{dtype.itemsize}")
    if dtype.itemsize > 2:
        bits = bits << 16 | bits | bits << (8 * dtype.itemsize - 16)
    found: NDArray[Any] = bits.view(dtype).reshape(-1, 16)
    return found


def mesh_of(order: Any) -> Mesh:
    return Mesh(np.array(jax.devices())[order].reshape(2, 4), ("x", "y"))


def assert_bits(found: Any, expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P("x", "y")])
def test_rules_keep_all_bits(dtype: Any, spec: Any) -> None:
    values = patterns(dtype)
    half = len(values) // 2
    sharding = NamedSharding(mesh_of(slice(None)), spec)
    trees: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
        (Rule("w", "{p:a,b}", "(p i) o -> i o"), {"a": values[:half], "b": values[half:]}, {
            "w": values
        }),
        (Rule("w.{p:a,b}", "w", "i o -> (p i) o"), {"w": values}, {
            "w.a": values[:half], "w.b": values[half:]
        }),
    ]  # fmt: skip
    for rule, tree, file in trees:
        spread = {name: jax.device_put(leaf, sharding) for name, leaf in tree.items()}
        found = pytree2dict(spread, rename=[rule])
        for name, expected in file.items():
            assert_bits(found[name], expected)
        stored = {name: jax.device_put(leaf, sharding) for name, leaf in file.items()}
        back = set_weights(spread, stored, rename=[rule])
        for name, expected in tree.items():
            assert_bits(back[name], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_placing_keeps_all_bits(dtype: Any) -> None:
    values = patterns(dtype)
    given = jax.device_put(values, NamedSharding(mesh_of(slice(None)), P("x", "y")))
    sharding = NamedSharding(mesh_of(slice(None, None, -1)), P("y"))
    found = set_weights({"w": jax.device_put(values, sharding)}, {"@w": given})["w"]
    assert found.sharding == sharding
    assert_bits(found, values)


def test_nothing_is_copied_that_is_in_place() -> None:
    array = jax.device_put(patterns(ml_dtypes.bfloat16), jax.devices()[0])
    found = set_weights({"w": array}, {"@w": array})["w"]
    assert found.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_keep_all_bits(dtype: Any) -> None:
    values = patterns(dtype)
    stack = jax.jit(lambda arrays: moved_as_bits(jnp.stack, arrays))
    found = np.asarray(stack([jnp.asarray(values)] * 2))
    assert_bits(found, np.stack([values, values]))


def test_integers_are_moved_as_they_are() -> None:
    array = jnp.arange(8).astype(jnp.int4)
    assert moved_as_bits(lambda arrays: arrays[0], [array]) is array


@pytest.mark.parametrize("rule", [Rule("w", "{p:a,b}", "p i o -> i o")])
def test_rules_have_derivatives(rule: Rule) -> None:
    leaf = jnp.ones((2, 2), jnp.bfloat16)

    def total(tree: Any) -> Any:
        return (3 * pytree2dict(tree, rename=[rule])["w"]).sum()

    found = jax.grad(total)({"a": leaf, "b": leaf})
    assert (found["a"] == 3).all()

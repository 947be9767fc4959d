"""Moving floats: no operation of JAX changes the bits of NaNs, of subnormals or of zeros."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray
from safetensors.numpy import load_file

from placed import P, Struct
from pytree2safetensors import Rule, load_into_pytree, pytree2dict, save_pytree, set_weights
from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.jax_versions import enable_x64

DTYPES: list[Any] = [
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e5m2,
    np.float16,
    np.float32,
    np.complex64,
    np.int8,
]
# JAX has arrays of int1, if any, but not all programs for them; of int4, only since JAX 0.5.
NARROW: list[Any] = [ml_dtypes.int4, *([ml_dtypes.int1] if hasattr(jnp, "int1") else [])]


def patterns(dtype: Any) -> NDArray[Any]:
    """All bits of a dtype, or many of them, with signalling NaNs."""
    dtype = np.dtype(dtype)
    if dtype in NARROW:
        return np.arange(256, dtype=np.int8).astype(dtype).reshape(-1, 16)
    bits = np.arange(1 << min(8 * dtype.itemsize, 16), dtype=f"u{dtype.itemsize}")
    if dtype.itemsize > 2:
        bits = bits << 16 | bits | bits << (8 * dtype.itemsize - 16)
    found: NDArray[Any] = bits.view(dtype).reshape(-1, 16)
    return found


def mesh_of(order: Any) -> Mesh:
    return Mesh(np.array(jax.devices())[order].reshape(2, -1), ("x", "y"))


def assert_bits(found: Any, expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    values = np.asarray(found)
    if expected.dtype in NARROW:  # the rest of their bytes has no meaning
        values, expected = values.astype(np.int8), expected.astype(np.int8)
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
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


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
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


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P("x", "y")])
def test_spreading_keeps_all_bits(dtype: Any, spec: Any) -> None:
    values = patterns(dtype)
    sharding = NamedSharding(mesh_of(slice(None)), spec)
    for given in (jax.device_put(values), jax.device_put(values, jax.devices()[5])):
        found = set_weights({"w": jax.device_put(values, sharding)}, {"@w": given})["w"]
        assert found.sharding == sharding
        assert_bits(found, values)


KINDS = [memory.kind for memory in jax.devices()[0].addressable_memories()]


@pytest.mark.skipif(
    len(KINDS) == 1, reason="this JAX has one kind of memory on CPUs, without a name"
)
@pytest.mark.parametrize("kinds", [(one, other) for one in KINDS for other in KINDS])
@pytest.mark.parametrize(
    "orders", [([7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]), ([0, 1], [3, 2])]
)
def test_placing_in_another_memory_of_other_devices(
    kinds: tuple[str, str], orders: tuple[list[int], list[int]]
) -> None:
    values = patterns(np.float16)
    template, given = (
        NamedSharding(mesh_of(order), P("x"), memory_kind=kind)
        for order, kind in zip(orders, kinds, strict=True)
    )
    tree = {"w": Struct(values.shape, values.dtype, sharding=template)}
    found = set_weights(tree, {"@w": jax.device_put(values, given)})["w"]
    assert found.sharding == template
    assert_bits(found, values)


WIDE: list[Any] = [np.float64, np.complex128, np.int64, np.uint64]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("place", [None, P(), P("x", "y")])
def test_arrays_of_64_bits_stay_so_without_x64(tmp_path: Path, dtype: Any, place: Any) -> None:
    values = np.arange(1 << 8, dtype=dtype).reshape(16, 16) * dtype(1.0000000001e15)
    with enable_x64(True):
        sharding = place if place is None else NamedSharding(mesh_of(slice(None)), place)
        array = jax.device_put(values, sharding)
        template = {"w": jax.device_put(values, jax.devices()[3])}
    assert_bits(set_weights(template, {"@w": array})["w"], values)
    assert_bits(set_weights({"w": array}, {"@w": template["w"]})["w"], values)
    rules = [Rule("w", "{p:a,b}", "(p i) o -> o i")]
    if dtype is np.complex128:  # which rules cannot rearrange
        return
    with enable_x64(True):
        tree = {"a": jax.device_put(values[:8].T, sharding), "b": jnp.asarray(values[8:].T)}
    assert_bits(pytree2dict(tree, rename=rules)["w"], values)
    assert_bits(set_weights(tree, {"w": array}, rename=rules)["a"], values[:8].T.copy())
    save_pytree(tree, tmp_path / "file", rename=rules)
    assert_bits(load_file(tmp_path / "file")["w"], values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saves_by_rules_keep_all_bits(tmp_path: Path, dtype: Any) -> None:
    values = patterns(dtype)
    leaf = jnp.asarray(values.reshape(4, -1, 16))
    save_pytree({"w": leaf}, tmp_path / "file", rename=[Rule("{n}", "w", "o i -> n i o")])
    template = {str(n): np.zeros((16, leaf.shape[1]), dtype) for n in range(4)}
    rules = [Rule(str(n), str(n)) for n in range(4)]
    found = load_into_pytree(template, tmp_path / "file", rename=rules)
    for n, part in enumerate(values.reshape(leaf.shape)):
        assert_bits(found[str(n)], np.ascontiguousarray(part.T))


@pytest.mark.filterwarnings("ignore:jax.sharding.PositionalSharding is deprecated")
def test_placing_in_a_positional_sharding() -> None:
    positional: Any = getattr(jax.sharding, "PositionalSharding", None)
    if positional is None:
        pytest.skip("this JAX has no PositionalSharding")
    values = patterns(np.float16)
    sharding = positional(np.array(jax.devices())[:2]).reshape(2, 1)
    tree = {"w": Struct(values.shape, values.dtype, sharding=sharding)}
    assert_bits(set_weights(tree, {"@w": jnp.asarray(values)})["w"], values)


def test_placing_arrays_without_values() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    given = jax.device_put(np.zeros((4, 0), np.float32), NamedSharding(mesh, P("x")))
    template = jax.device_put(np.zeros((4, 0), np.float32), jax.devices()[5])
    assert_bits(set_weights({"w": template}, {"@w": given})["w"], np.zeros((4, 0), np.float32))

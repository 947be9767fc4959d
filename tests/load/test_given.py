"""Leaves of a dictionary: how JAX converts and places them."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from oracle import assert_same, assert_same_values
from placed import P, raw
from pytree2safetensors import Rule, set_weights
from pytree2safetensors._leaves.jax_versions import enable_x64, structs_are_weak
from pytree2safetensors._leaves.spec import jax_holds
from pytree2safetensors._leaves.to_jax import to_jax
from pytree2safetensors._load import given

Struct: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types
NANS = np.array([[np.nan, 1], [np.inf, 3]], np.float32)
MOVED = [Rule("@w", "@w", "a b -> b a")]
STACKED = [Rule("w.{l}", "@w", "a b -> l a b")]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("names", "dtype", "options", "expected"),
    [
        (["@w"], np.float32, {}, NANS),
        (["@w"], np.float16, {"cast": True}, NANS.astype(np.float16)),
        (["@w"], np.float32, {"rename": MOVED}, np.ascontiguousarray(NANS.T)),
        (["w.0", "w.1"], np.float32, {"rename": STACKED}, np.stack([NANS, NANS])),
    ],
)
def test_no_setting_of_jax_stops_set_weights(
    kind: Any, names: list[str], dtype: Any, options: Any, expected: Any
) -> None:
    dictionary = {name: kind(NANS) for name in names}
    with jax.debug_nans(True), jax.debug_infs(True), jax.transfer_guard("disallow"):
        found = set_weights({"w": Struct(expected.shape, dtype)}, dictionary, **options)["w"]
    assert isinstance(found, jax.Array)
    assert_same_values(np.asarray(found), expected)


def test_an_array_that_is_cast_stays_on_its_device() -> None:
    values = jax.device_put(jnp.ones(2, jnp.float16), jax.devices()[1])
    found = set_weights({"w": Struct((2,), np.float32)}, {"@w": values}, cast=True)["w"]
    assert found.devices() == {jax.devices()[1]}
    assert_same_values(np.asarray(found), np.ones(2, np.float32))


def test_a_trace_casts_arrays() -> None:
    @jax.jit
    def traced(value: Any) -> Any:
        return set_weights({"w": Struct((2,), np.float32)}, {"@w": value}, cast=True)["w"]

    assert_same(traced(jnp.ones(2, jnp.float16)), jnp.ones(2, jnp.float32))


@pytest.mark.skipif(not structs_are_weak(), reason="this JAX has no weak types of structs")
@pytest.mark.parametrize("weak", [False, True])
def test_a_scalar_is_as_weak_as_the_struct_that_it_replaces(weak: bool) -> None:
    template = {"w": Struct((), np.float32, weak_type=weak)}
    assert set_weights(template, {"@w": 2.5})["w"].aval.weak_type is weak


@pytest.mark.parametrize("weak", [jnp.full((3,), 0.5), jnp.full((0,), 0.5), jnp.full((2, 3), 1)])
@pytest.mark.parametrize("strict", [False, True])
def test_only_scalars_of_numpy_become_weakly_typed(weak: Any, strict: bool) -> None:
    assert weak.aval.weak_type
    values = np.ones(weak.shape, weak.dtype)
    found = set_weights([weak], {"#0": values}, strict=strict)[0]
    assert not found.aval.weak_type
    assert_same_values(np.asarray(found), values)
    scalar = set_weights([jnp.asarray(0.5)], {"#0": np.float32(2)}, strict=strict)[0]
    assert scalar.aval.weak_type


@pytest.mark.skipif(not structs_are_weak(), reason="this JAX has no weak types of structs")
@pytest.mark.parametrize(
    ("dictionary", "options"),
    [
        ({"@w": NANS}, {}),
        ({"@w": NANS.astype(np.float16)}, {"cast": True}),
        ({"@w": np.ascontiguousarray(NANS.T)}, {"rename": MOVED}),
        ({"w.0": NANS[0], "w.1": NANS[1]}, {"rename": [Rule("w.{l}", "@w", "a -> l a")]}),
    ],
)
def test_arrays_of_numpy_fit_a_weakly_typed_struct(dictionary: Any, options: Any) -> None:
    template = {"w": Struct(NANS.shape, np.float32, weak_type=True)}
    found = set_weights(template, dictionary, **options)["w"]
    assert not found.aval.weak_type
    assert_same_values(np.asarray(found), NANS)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_the_data_of_keys_become_keys(kind: Any) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    found = set_weights({"k": keys}, {"@k": kind(jax.random.key_data(keys))})["k"]
    assert found.dtype == keys.dtype
    assert raw(found) == raw(keys)


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh") or not hasattr(jax.sharding, "get_mesh"),
    reason="this JAX has no mesh in force",
)
@pytest.mark.parametrize("within", [False, True])
def test_entries_may_be_spread_over_explicit_axes(within: bool) -> None:
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh: Any = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    entries = {f"w.{n}": jax.device_put(values, NamedSharding(mesh, P(None, n))) for n in "xy"}
    rules = [Rule("w.{l:x,y}", "@w", "(p a) b -> p b (l a)", p=2)]
    sharding = NamedSharding(mesh.abstract_mesh if within else mesh, P(None, "x"))
    template = {"w": Struct((2, 8, 8), np.float32, sharding=sharding)}
    if within:
        with jax.set_mesh(mesh):
            found = set_weights(template, entries, rename=rules)["w"]
    else:
        found = set_weights(template, entries, rename=rules)["w"]
    assert found.sharding == NamedSharding(mesh, P(None, "x"))
    half = values.reshape(2, 4, 8).transpose(0, 2, 1)
    assert_same_values(np.asarray(found), np.concatenate([half, half], -1))


@pytest.mark.parametrize("name", ["uint1", "float6_e2m3fn", "float6_e3m2fn", "float8_e5m2"])
def test_arrays_are_cast_even_if_no_program_of_jax_can_do_it(name: str) -> None:
    if not hasattr(ml_dtypes, name) or not jax_holds(np.dtype(getattr(ml_dtypes, name))):
        pytest.skip("this JAX has no such dtype")
    wide = jnp.arange(2, dtype=np.float32)
    narrow = jax.device_put(np.asarray(wide).astype(getattr(ml_dtypes, name)))
    assert_same(set_weights([wide], {"#0": narrow}, cast=True), [wide])
    if "float" in name:
        assert_same(set_weights([narrow], {"#0": wide}, cast=True), [narrow])


@pytest.mark.parametrize(("batch", "calls"), [(1 << 26, 1), (1 << 14, 3)])
def test_arrays_of_numpy_become_arrays_of_jax_in_few_calls(
    batch: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def counted(arrays: Any) -> Any:
        sent.append(len(arrays))
        return to_jax(arrays)

    monkeypatch.setattr(given, "to_jax", counted)
    monkeypatch.setattr(given, "_BATCH", batch)
    small = [np.full(4, number, np.float32) for number in range(1200)]
    tree = [*small, np.ones(5000, np.float32), 2.5, np.int32(7)]
    template = [*map(jnp.zeros_like, tree[:-2]), 0.0, jnp.int32(0)]
    expected = [*map(jnp.array, tree[:-2]), 2.5, jnp.int32(7)]
    found = set_weights(template, {f"#{n}": leaf for n, leaf in enumerate(tree)})
    for leaf in tree[:-2]:
        leaf[:] = -1  # the arrays of the caller are copied
    assert_same(found, expected)
    assert (len(sent), sum(sent)) == (calls, 1202)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_jax_cannot_hold_becomes_an_array_of_numpy(dtype: Any) -> None:
    with enable_x64(True):
        given = jnp.arange(3, dtype=dtype)
    with enable_x64(False):
        sharding = jnp.zeros(3).sharding
        template = Struct((3,), np.float64, sharding=sharding)
        [found] = set_weights([template], {"#0": given}, cast=True)
    assert type(found) is np.ndarray
    assert_same_values(found, np.arange(3, dtype=np.float64))

"""Leaves of a dictionary: how JAX converts and places them."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from oracle import assert_same, assert_same_values
from placed import P, assert_in_place, raw
from pytree2safetensors import Rule, set_weights
from pytree2safetensors._leaves.jax_versions import (
    enable_x64,
    pinned_sharding,
    structs_are_weak,
)
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


HERE = jax.devices()[4:]  # the default device is not among these
ROWS = NamedSharding(Mesh(np.array(HERE), ("x",)), P("x"))
PLACES = {
    "a device": SingleDeviceSharding(HERE[1]),
    "parts": ROWS,
    "copies": NamedSharding(ROWS.mesh, P()),
    "pinned memory": pinned_sharding(SingleDeviceSharding(HERE[1])),
    "parts in pinned memory": pinned_sharding(ROWS),
}


@pytest.mark.parametrize("sharding", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    ("dictionary", "options"),
    [
        ({"@w": np.arange(64.0, dtype=np.float32).reshape(8, 8)}, {}),
        ({"@w": np.arange(64, dtype=np.int8).reshape(8, 8)}, {}),
        ({"@w": np.arange(64.0).reshape(8, 8)}, {"cast": True}),
        ({"@w": np.arange(64).astype(ml_dtypes.bfloat16).reshape(8, 8)}, {}),
        ({"@w": np.arange(64).astype(ml_dtypes.int4).reshape(8, 8)}, {}),
        ({"@w": np.zeros((0, 8), np.float32)}, {}),
        ({"@w": np.arange(64).reshape(8, 8)}, {"cast": True, "rename": MOVED}),
        (
            {f"w.{n}": np.arange(n, n + 8, dtype=np.float32).reshape(1, 8) for n in range(8)},
            {"rename": [Rule("w.{l}", "@w", "a b -> (l a) b", a=1)]},
        ),
        (
            {f"w.{n}": np.arange(n, n + 8).astype("f2" if n % 2 else "f4") for n in range(8)},
            {"cast": True, "rename": [Rule("w.{l}", "@w", "a -> l a")]},
        ),
    ],
)
def test_arrays_of_numpy_are_put_only_on_the_devices_of_their_leaves(
    sharding: Any, dictionary: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may be too small for them."""
    if sharding is None:
        pytest.skip("the CPU devices of this JAX have no pinned memory")
    given = dictionary.get("@w", np.zeros((8, 8), np.float32))
    dtype = given.dtype if not options.get("cast") else np.dtype(np.float32)
    template = {"w": Struct(given.shape, dtype, sharding=sharding)}
    plain = set_weights({"w": np.zeros(given.shape, dtype)}, dictionary, **options)["w"]
    used: set[Any] = set()
    put: Any = jax.device_put

    def device_put(values: Any, *arguments: Any) -> Any:
        made = put(values, *arguments)
        arrays = made if isinstance(made, list) else [made]
        used.update(device for array in arrays if array.shape for device in array.devices())
        return made

    monkeypatch.setattr(jax, "device_put", device_put)
    found = set_weights(template, dictionary, **options)["w"]
    monkeypatch.undo()
    assert used <= sharding.device_set
    assert_in_place(found, plain, sharding)
    for values in dictionary.values():
        values[:] = 1  # the arrays of the caller are copied
    assert raw(found) == raw(plain)


def test_joined_values_that_jax_cannot_hold_are_not_narrowed() -> None:
    thirds = np.arange(3) / 3
    dictionary = {"w.0": jnp.arange(3, dtype=np.float32), "w.1": thirds}
    rules = [Rule("w.{l}", "@w", "a -> l a")]
    template = {"w": np.zeros((2, 3), np.float64)}
    found = set_weights(template, dictionary, rename=rules, cast=True)["w"]
    assert_same_values(found, np.stack([np.arange(3.0), thirds]))


def test_a_trace_decides_where_arrays_of_numpy_are() -> None:
    values = np.arange(8, dtype=np.float32)
    for sharding in (SingleDeviceSharding(HERE[1]), ROWS):
        for template in (
            jax.device_put(jnp.zeros(8), sharding),
            Struct((8,), np.float32, sharding=sharding),
        ):

            def total(scale: Any, template: Any = template) -> Any:
                return scale * set_weights({"x": template}, {"@x": values})["x"].sum()

            for one in (jnp.float32(2), jax.device_put(jnp.float32(2), jax.devices()[0])):
                assert jax.jit(total)(one) == 56
                assert jax.eval_shape(total, one).shape == ()


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


@pytest.mark.parametrize("name", PLACES)
def test_copies_on_all_devices_move_to_any_memory(name: str) -> None:
    sharding = PLACES[name]
    if sharding is None:
        pytest.skip("the CPU devices of this JAX have no pinned memory")
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P())
    values = jax.device_put(np.arange(8, dtype=np.float32), everywhere)
    template = {"w": Struct((8,), np.float32, sharding=sharding)}
    assert_in_place(set_weights(template, {"@w": values})["w"], values, sharding)


@pytest.mark.parametrize(
    "sharding",
    [
        NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P("x")),
        pinned_sharding(SingleDeviceSharding(jax.devices()[0])),
    ],
)
def test_a_weakly_typed_array_stays_weak_on_its_device(sharding: Any) -> None:
    if sharding is None:
        pytest.skip("the CPU devices of this JAX have no pinned memory")
    template = {"w": Struct((3,), np.float32, sharding=sharding)}
    found = set_weights(template, {"@w": jnp.full(3, 0.5)})["w"]
    assert found.aval.weak_type
    assert_in_place(found, np.full(3, 0.5, np.float32), sharding)

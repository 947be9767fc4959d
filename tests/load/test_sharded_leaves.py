"""Leaves of every kind into shardings."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

import pytree2safetensors as p2s
from placed import (
    ROUTES,
    SPECS,
    P,
    Struct,
    assert_in_place,
    into,
    pretend_that_devices_are_elsewhere,
    raw,
    take_route,
    values_of,
)
from pytree2safetensors._leaves.jax_versions import pinned_sharding
from pytree2safetensors._load import reading
from versions import unmapped


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "dtype",
    [
        "bool", "int4", "uint4", "int8", "uint16", "int32", "float16", "bfloat16", "complex64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz",
    ],
)  # fmt: skip
def test_every_dtype_loads_in_every_sharding(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, dtype: str, route: str
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16), getattr(ml_dtypes, dtype, dtype))
    p2s.save_pytree([values], tmp_path / "file")
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        for mmap in False, True:
            found = into(tmp_path / "file", (8, 16), values.dtype, sharding, mmap=mmap)
            assert_in_place(found, values, sharding)


def test_packed_values_out_of_range_are_refused_in_any_shard(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route("bands", monkeypatch)
    p2s.save_pytree([values_of((8, 16), ml_dtypes.int4)], tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] = 100
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(p2s.FileFormatError, match="has values that are not int4"):
        into(tmp_path / "file", (8, 16), ml_dtypes.int4, NamedSharding(mesh, P(None, "x")))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_dtypes_of_64_bits(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, dtype: str, route: str
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16), dtype)
    p2s.save_pytree([values], tmp_path / "file")
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        for mmap in False, True:
            found = into(tmp_path / "file", (8, 16), dtype, sharding, mmap=mmap)
            assert_in_place(found, values, sharding)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_what_jax_cannot_hold_is_a_numpy_array(tmp_path: Path, mesh: Mesh, dtype: str) -> None:
    values = values_of((8, 16), dtype)
    p2s.save_pytree([values], tmp_path / "file")
    with pytest.warns(UserWarning, match="JAX does not support the dtypes of some leaves here"):
        found = into(tmp_path / "file", (8, 16), np.dtype(dtype), NamedSharding(mesh, P("x")))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, raw(found)) == (values.dtype, raw(values))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (8,), (4, 8), (0, 4)])
def test_keys_load_in_every_sharding(
    tmp_path: Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    impl: str,
    route: str,
) -> None:
    take_route(route, monkeypatch)
    keys = jax.random.split(jax.random.key(7, impl=impl), shape)
    p2s.save_pytree([keys], tmp_path / "keys")
    p2s.save_pytree([jax.random.key_data(keys)], tmp_path / "data")
    specs = [P(), P("x"), P(None, "x"), P("x", "y")]
    for spec in (spec for spec in specs if len(spec) <= len(shape)):
        sharding = NamedSharding(mesh, spec)
        template = jax.device_put(keys, sharding)
        for path in tmp_path / "keys", tmp_path / "data":
            for leaf in template, Struct(shape, keys.dtype, sharding=sharding):
                found = p2s.load_into_pytree([leaf], path)[0]
                assert_in_place(found, keys, sharding)


@pytest.mark.parametrize("route", ROUTES)
def test_arrays_without_dimensions_or_elements(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    values = [np.float32(-0.0), np.zeros((0, 8), np.int8), np.zeros((8, 0), np.float32)]
    p2s.save_pytree(values, tmp_path / "file")
    specs = [[P(), P("x"), P("x")], [P(), P(None, "x"), P(None, "x")]]
    for chosen in specs:
        shardings = [NamedSharding(mesh, spec) for spec in chosen]
        template = [
            Struct(array.shape, array.dtype, sharding=sharding)
            for array, sharding in zip(values, shardings, strict=True)
        ]
        for mmap in False, True:
            found = p2s.load_into_pytree(template, tmp_path / "file", mmap=mmap)
            for one, array, sharding in zip(found, values, shardings, strict=True):
                assert_in_place(one, array, sharding)


@pytest.mark.parametrize("route", ROUTES)
def test_a_weak_type_stays_on_several_devices(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    sharding = NamedSharding(mesh, P())
    weak = jax.device_put(jnp.asarray(2.5), sharding)
    assert weak.aval.weak_type
    p2s.save_pytree([weak], tmp_path / "file")
    found = p2s.load_into_pytree([weak], tmp_path / "file")[0]
    assert found.aval.weak_type
    assert_in_place(found, np.asarray(weak), sharding)


def test_python_scalars_go_into_sharded_arrays(tmp_path: Path, mesh: Mesh) -> None:
    p2s.save_pytree([3, 0.5, True], tmp_path / "file")
    sharding = NamedSharding(mesh, P())
    dtypes = [np.int32, np.float32, np.bool_]
    template = [Struct((), dtype, sharding=sharding) for dtype in dtypes]
    found = p2s.load_into_pytree(template, tmp_path / "file")
    for one, value, dtype in zip(found, [3, 0.5, True], dtypes, strict=True):
        assert_in_place(one, np.array(value, dtype), sharding)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_values_are_cast_in_every_sharding(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str, mmap: bool
) -> None:
    take_route(route, monkeypatch)
    values = np.arange(128, dtype=np.float32).reshape(8, 16) / 3
    p2s.save_pytree([values], tmp_path / "file")
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        with pytest.raises(p2s.WeightsMismatchError):
            into(tmp_path / "file", (8, 16), ml_dtypes.bfloat16, sharding, mmap=mmap)
        found = into(tmp_path / "file", (8, 16), ml_dtypes.bfloat16, sharding, cast=True, mmap=mmap)
        assert_in_place(found, values.astype(ml_dtypes.bfloat16), sharding)


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_weak_types_stay_in_the_memory_of_their_template(tmp_path: Path, kind: str) -> None:
    device = jax.devices()[1]
    if pinned_sharding(SingleDeviceSharding(device)) is None:
        pytest.skip("the CPU devices of this JAX have no pinned memory")
    sharding = SingleDeviceSharding(device, memory_kind=kind)
    p2s.save_pytree({"a": jnp.asarray(1.5)}, tmp_path / "file")
    template = {"a": Struct((), np.float32, sharding=sharding)}
    found = p2s.load_into_pytree(template, tmp_path / "file")["a"]
    assert found.sharding == sharding
    assert found.weak_type
    assert float(found) == 1.5


@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "complex64", "int4"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 8)])
def test_the_devices_and_the_memory_of_an_array_change_at_once(
    dtype: str, shape: tuple[int, int]
) -> None:
    meshes = [Mesh(np.array(jax.devices())[::step].reshape(4, 2), ("x", "y")) for step in (1, -1)]
    here = NamedSharding(meshes[0], P(None, "x"))
    there = pinned_sharding(NamedSharding(meshes[1], P(None, "y")))
    if there is None:
        pytest.skip("the CPU devices of this JAX have no pinned memory")
    values = values_of(shape, getattr(ml_dtypes, dtype, dtype))
    array = jax.device_put(values, here)
    for sharding in (there, here):
        template = {"w": Struct(shape, values.dtype, sharding=sharding)}
        array = p2s.set_weights(template, {"@w": array})["w"]
        assert_in_place(array, values, sharding)


def test_arrays_of_no_keys_change_their_devices() -> None:
    meshes = [Mesh(np.array(jax.devices())[::step], ("x",)) for step in (1, -1)]
    here, there = (NamedSharding(mesh, P("x")) for mesh in meshes)
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8).reshape(8, 1)[:, :0], here)
    template = {"k": Struct(keys.shape, keys.dtype, sharding=there)}
    found = p2s.set_weights(template, {"@k": keys})["k"]
    assert (found.shape, found.dtype) == (keys.shape, keys.dtype)
    assert found.sharding.is_equivalent_to(there, 2)


TENSORS = [
    np.arange(start, start + 8 * width, dtype=np.float32).reshape(8, width)
    for start, width in [(0, 64), (600, 32), (1000, 8)]
]


@settings(max_examples=max(50, settings().max_examples // 4))
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # the tensor
            st.sampled_from(["numpy", "float16", "everywhere", *SPECS]),
        ),
        max_size=8,
    ),
    st.sampled_from([1, 200, 700, 3000, 1 << 20]),  # bytes of a batch
    st.sampled_from(ROUTES),
    st.sampled_from(["read", "mapped", "streamed", "transferred"]),
    st.booleans(),
)
def test_leaves_of_any_plan_are_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    mesh: Mesh,
    leaves: list[tuple[int, str]],
    limit: int,
    route: str,
    way: str,
    checksum: bool,
) -> None:
    path = unmapped(tmp_path_factory.getbasetemp() / "plan.safetensors")
    p2s.save_pytree(TENSORS, path, checksum=checksum)
    template: dict[str, Any] = {}
    for number, (tensor, kind) in enumerate(leaves):
        shape, name = TENSORS[tensor].shape, f"{number}.{tensor}"
        if kind == "numpy":
            template[name] = np.zeros(shape, np.float32)
        elif kind in SPECS:
            sharding = NamedSharding(mesh, SPECS[kind])
            template[name] = Struct(shape, np.float32, sharding=sharding)
        else:
            template[name] = Struct(shape, np.float16 if kind == "float16" else np.float32)
    with pytest.MonkeyPatch.context() as patch:
        take_route(route, patch)
        if way == "transferred":
            pretend_that_devices_are_elsewhere(patch)
        for name in "_BATCH", "_STAGED_BATCH":
            patch.setattr(reading, name, limit)
        found = p2s.load_into_pytree(
            template,
            io.BytesIO(path.read_bytes()) if way == "streamed" else path,
            rename=lambda name: f"#{name[-1]}",
            unexpected="skip",
            cast=True,
            mmap=way == "mapped",
        )
    for name, leaf in template.items():
        values, array = TENSORS[int(name[-1])], found[name]
        assert raw(array) == raw(values.astype(leaf.dtype))
        assert isinstance(array, np.ndarray if isinstance(leaf, np.ndarray) else jax.Array)
        if getattr(leaf, "sharding", None) is not None:
            assert_in_place(array, values, leaf.sharding)

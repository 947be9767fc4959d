"""Loading into shardings: every device has its slices, bit for bit, and nothing is read twice."""

import io
import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from numpy.typing import NDArray

import pytree2safetensors as p2s
from oracle import assert_same
from pytree2safetensors._leaves import extents, staging
from pytree2safetensors._leaves.extents import (
    Part,
    Region,
    bands_of,
    common,
    gather,
    runs_in,
    span_of,
    starts_of,
)
from pytree2safetensors._load import plan, reading, slots
from pytree2safetensors._load.checkpoint import open_checkpoint
from pytree2safetensors._load.ranges import Place, plan_reads
from pytree2safetensors._load.slots import Slot
from pytree2safetensors._storage import file_source as _source
from pytree2safetensors._storage.read_pool import ReadPool

P: Any = PartitionSpec  # whose constructor JAX leaves untyped
Struct: Any = jax.ShapeDtypeStruct

ROUTES = ("by JAX", "direct", "bands")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def take_route(route: str, patch: pytest.MonkeyPatch) -> None:
    """Have small arrays read the way that large ones are."""
    if route == "by JAX":
        return
    patch.setattr(plan, "_CUT_BY_JAX", 0)
    patch.setattr(extents, "BAND", 256)
    if route == "direct":
        patch.setattr(slots, "_LONG", 1)


def is_key(array: Any) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))  # type: ignore[attr-defined] # public, and not exported


def raw(array: Any) -> bytes:
    values = np.asarray(jax.random.key_data(array) if is_key(array) else array)
    packed = values.dtype.name in {"int4", "uint4"}  # half of each byte means nothing
    return (values.astype(np.int8) if packed else values).tobytes()


def assert_in_place(found: Any, expected: Any, sharding: Sharding) -> None:
    """The very sharding, dtype and shape, and on each device the bits of its slice."""
    assert isinstance(found, jax.Array)
    if is_key(found):  # JAX spells the shardings of keys anew
        assert found.sharding.is_equivalent_to(sharding, found.ndim)
    else:
        assert found.sharding == sharding
    assert is_committed(found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert {shard.device for shard in found.addressable_shards} == sharding.addressable_devices
    expected = expected if is_key(expected) else np.asarray(expected)
    for shard in found.addressable_shards:
        index = shard.index[: len(expected.shape)]  # that of keys has the axes of their data too
        assert raw(shard.data) == raw(expected[index])


def is_committed(array: jax.Array) -> bool:
    committed = getattr(array, "committed", None)  # public since JAX 0.5
    return bool(array._committed if committed is None else committed)  # type: ignore[attr-defined] # the older name


def values_of(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> NDArray[Any]:
    """An array of random bits, NaNs among them."""
    dtype = np.dtype(dtype)
    count = math.prod(shape)
    bits = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype == np.bool_:
        bits = bits % 2
    found: NDArray[Any] = (
        bits.astype(dtype) if dtype.name in {"int4", "uint4"} else bits.view(dtype)
    )
    return found.reshape(shape)


def into(path: Any, shape: Any, dtype: Any, sharding: Sharding, **options: Any) -> Any:
    return p2s.load_into_pytree([Struct(shape, dtype, sharding=sharding)], path, **options)[0]


# --- regions ----------------------------------------------------------------------------------


@st.composite
def shapes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    bounds = [tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape]
    return shape, tuple((start, stop) for start, stop in bounds)


def select(array: NDArray[Any], region: Region) -> NDArray[Any]:
    part: NDArray[Any] = array[tuple(slice(*bounds) for bounds in region)]
    return part


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
    assert all(starts[1:] > starts[:-1] + length)  # neighbours are one run
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
        patch.setattr(extents, "BAND", limit)
        bands = list(bands_of(shape, itemsize))
    position = 0
    for band in bands:
        length = runs_in(band, shape, itemsize).length
        assert starts_of(band, shape, itemsize).tolist() == [position]
        assert length <= max(limit, itemsize)
        position += length
    assert position == math.prod(shape) * itemsize


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
        patch.setattr(extents, "BAND", limit)
        end = -1
        for offset, piece in gather(parts, shape, 2):
            assert offset > end or not offset or limit < 100  # neighbours within a band are one
            end = offset + len(piece)
            found[offset:end] = piece
    assert bytes(found) == expected.tobytes()


def test_common_is_none_where_regions_do_not_meet() -> None:
    assert common(((0, 2), (0, 4)), ((1, 3), (2, 6))) == ((1, 2), (2, 4))
    assert common(((0, 2),), ((2, 3),)) is None
    assert common((), ()) == ()


# --- slices of every kind ---------------------------------------------------------------------

SPECS: dict[str, Any] = {
    "rows": P("x"),
    "all rows": P(("x", "y")),
    "columns": P(None, "x"),
    "all columns": P(None, ("y", "x")),
    "mixed": P("x", "y"),
    "mixed, the other way": P("y", "x"),
    "partly replicated": P("y"),
    "replicated": P(),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(8, 16), (16, 8, 6), (8, 8, 3, 5)])
def test_every_device_gets_its_slices(
    tmp_path: Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    spec: str,
    route: str,
    mmap: bool,
) -> None:
    take_route(route, monkeypatch)
    values = values_of(shape)
    p2s.save_pytree([values], tmp_path / "file")
    sharding = NamedSharding(mesh, SPECS[spec])
    found = into(tmp_path / "file", shape, np.float32, sharding, mmap=mmap)
    assert_in_place(found, values, sharding)


@pytest.mark.parametrize("spec", SPECS)
def test_arrays_of_a_real_size(tmp_path: Path, mesh: Mesh, spec: str) -> None:
    values = values_of((1024, 2048))
    p2s.save_pytree([values, values[:3]], tmp_path / "file")
    sharding = NamedSharding(mesh, SPECS[spec])
    for mmap in False, True:
        template = [Struct(values.shape, values.dtype, sharding=sharding), values[:3]]
        found = p2s.load_into_pytree(template, tmp_path / "file", mmap=mmap)
        assert_in_place(found[0], values, sharding)
        assert raw(found[1]) == raw(values[:3])


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    """A shape, and a spec that divides it."""
    axes = draw(st.permutations(["x", "y"]))
    entries: list[Any] = []
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        mine = [axes.pop() for _ in range(draw(st.integers(0, len(axes))))]
        parts = math.prod({"x": 4, "y": 2}[axis] for axis in mine)
        shape.append(parts * draw(st.integers(0 if draw(st.booleans()) else 1, 5)))
        entries.append(tuple(mine) or None)
    return tuple(shape), P(*entries)


@settings(max_examples=settings().max_examples * 3 // 5)
@given(
    cases(),
    st.sampled_from(["float32", "bfloat16", "int8", "bool", "complex64", "float16"]),
    st.sampled_from(ROUTES),
    st.booleans(),
    st.integers(1, 300),
)
def test_loading_into_a_sharding_is_slicing(
    tmp_path_factory: pytest.TempPathFactory,
    mesh: Mesh,
    case: tuple[tuple[int, ...], Any],
    dtype: str,
    route: str,
    mmap: bool,
    band: int,
) -> None:
    shape, spec = case
    path = tmp_path_factory.mktemp("sharding") / "file"
    values = values_of(shape, getattr(ml_dtypes, dtype, dtype))
    p2s.save_pytree([values], path)
    sharding = NamedSharding(mesh, spec)
    with pytest.MonkeyPatch.context() as patch:
        take_route(route, patch)
        patch.setattr(extents, "BAND", band)
        found = into(path, shape, values.dtype, sharding, mmap=mmap)
    assert_in_place(found, values, sharding)


@pytest.mark.parametrize("route", ROUTES)
def test_file_objects_need_no_mapping(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    file = io.BytesIO()
    p2s.save_pytree([values], file)

    class Pipe(io.RawIOBase):
        """A file object that cannot seek."""

        def read(self, size: int = -1, /) -> bytes:
            return file.read(size)

    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        for source in file, Pipe():
            file.seek(0)
            assert_in_place(into(source, (8, 16), np.float32, sharding), values, sharding)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_files_of_other_writers_are_not_aligned(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str, mmap: bool
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    before = {f"#{n}": np.zeros(n, np.uint8) for n in (1, 2, 3)}
    safetensors.numpy.save_file({**before, "#0": values}, tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[:8] = (size + 1).to_bytes(8, "little")
    content.insert(8 + size, ord(" "))  # a header of odd length, as the format allows
    (tmp_path / "file").write_bytes(content)
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        found = into(tmp_path / "file", (8, 16), np.float32, sharding, mmap=mmap, strict=False)
        assert_in_place(found, values, sharding)


@pytest.mark.parametrize("mmap", [False, True])
def test_folders_of_shards(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, mmap: bool
) -> None:
    take_route("bands", monkeypatch)
    tree = {f"w{n}": values_of((8, 16), seed=n) for n in range(5)}
    p2s.save_pytree(tree, tmp_path / "model", max_shard_size=1200)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    sharding = {
        name: NamedSharding(mesh, spec) for name, spec in zip(tree, SPECS.values(), strict=False)
    }
    template = {name: Struct((8, 16), np.float32, sharding=sharding[name]) for name in tree}
    found = p2s.load_into_pytree(template, tmp_path / "model", mmap=mmap)
    for name, values in tree.items():
        assert_in_place(found[name], values, sharding[name])


# --- leaves of every kind ---------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "dtype",
    [
        "bool", "int4", "uint4", "int8", "uint16", "int32", "float16", "bfloat16", "complex64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz",
    ],
)  # fmt: skip
def test_dtypes(
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
    with pytest.raises(p2s.FileFormatError, match="holds values outside of int4"):
        into(tmp_path / "file", (8, 16), ml_dtypes.int4, NamedSharding(mesh, P(None, "x")))


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call] # JAX gives it no types
    yield
    jax.config.update("jax_enable_x64", False)  # type: ignore[no-untyped-call] # JAX gives it no types


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
    with pytest.warns(UserWarning, match="JAX does not support the dtypes of 1 leaves"):
        found = into(tmp_path / "file", (8, 16), np.dtype(dtype), NamedSharding(mesh, P("x")))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, raw(found)) == (values.dtype, raw(values))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (8,), (4, 8), (0, 4)])
def test_keys(
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
def test_weak_types(
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
def test_cast(
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


# --- shardings of every kind ------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_single_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    for device in jax.devices()[:3]:
        template = jax.device_put(values, device)
        found = p2s.load_into_pytree([template], tmp_path / "file")[0]
        assert_in_place(found, values, SingleDeviceSharding(device))


@pytest.mark.skipif(jax.__version_info__ >= (0, 7), reason="this JAX has no PositionalSharding")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # JAX is about to remove it
def test_positional_shardings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_route("bands", monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    positional: Any = jax.sharding.PositionalSharding  # type: ignore[attr-defined] # in older versions
    whole = positional(jax.devices())
    for sharding in whole.reshape(4, 2), whole.reshape(8, 1), whole.replicate():
        assert_in_place(into(tmp_path / "file", (8, 16), np.float32, sharding), values, sharding)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pmap is on its way out
@pytest.mark.parametrize("route", ROUTES)
def test_what_pmap_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    template = jax.pmap(lambda row: row * 2)(values)
    take_route(route, monkeypatch)
    p2s.save_pytree([template], tmp_path / "file")
    loaded = p2s.load_into_pytree([template], tmp_path / "file")[0]
    for found in loaded, p2s.set_weights([template], {"#0": values * 2})[0]:
        assert found.sharding == template.sharding
        assert raw(found) == raw(values * 2)


@pytest.mark.parametrize("route", ROUTES)
def test_memory_kinds(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if len(kinds) == 1:
        pytest.skip("this JAX knows one kind of memory on the CPU, which has no name")
    for kind in kinds:
        for spec in SPECS.values():
            sharding = NamedSharding(mesh, spec, memory_kind=kind)
            found = into(tmp_path / "file", (8, 16), np.float32, sharding)
            assert_in_place(found, values, sharding)
            assert found.sharding.memory_kind == kind


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh") or not hasattr(jax.sharding, "get_mesh"),
    reason="this JAX has no mesh in force",
)
def test_abstract_meshes_mean_the_mesh_in_force(tmp_path: Path) -> None:
    explicit: Any = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    with jax.set_mesh(explicit):
        start = jax.device_put(values, NamedSharding(explicit, P("x")))
        template = [jax.eval_shape(lambda array: array * 2, start)]
        found = p2s.load_into_pytree(template, tmp_path / "file")[0]
    assert_in_place(found, values, NamedSharding(explicit, P("x", None)))
    with pytest.raises(
        p2s.WeightsMismatchError,
        match=r"'#0': the sharding that the template has for it names no devices, as its mesh is "
        r"abstract; load under jax\.set_mesh, or give the template concrete shardings",
    ):
        p2s.load_into_pytree(template, tmp_path / "file")


def test_what_jax_cannot_divide_is_an_error_that_names_the_leaf(tmp_path: Path, mesh: Mesh) -> None:
    p2s.save_pytree({"odd": np.zeros((7, 3), np.float32)}, tmp_path / "file")
    template = {"odd": Struct((7, 3), np.float32, sharding=NamedSharding(mesh, P("x")))}
    with pytest.raises(
        p2s.WeightsMismatchError, match="'@odd': it does not fit the sharding of its template: "
    ) as caught:
        p2s.load_into_pytree(template, tmp_path / "file")
    assert caught.value.mismatched[0].startswith("'@odd': ")


def test_what_jax_cannot_divide_is_told_of_all_leaves_as_the_template_calls_them(
    tmp_path: Path, mesh: Mesh
) -> None:
    odd, even = np.zeros((7, 3), np.float32), np.zeros((8, 2), np.float32)
    p2s.save_pytree({"params": {"b": odd, "a": odd, "c": even}}, tmp_path / "file")
    place = NamedSharding(mesh, P("x"))
    template = {
        name: Struct(values.shape, np.float32, sharding=place)
        for name, values in (("a", odd), ("b", odd), ("c", even))
    }
    with pytest.raises(p2s.WeightsMismatchError) as caught:
        p2s.load_into_pytree(template, tmp_path / "file", prefix="@params")
    assert [line.split(":")[0] for line in caught.value.mismatched] == ["'@a'", "'@b'"]
    assert str(caught.value).count("does not fit the sharding of its template") == 2


def test_uncommitted_stays_uncommitted(tmp_path: Path) -> None:
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    found = p2s.load_into_pytree([jnp.asarray(values)], tmp_path / "file")[0]
    assert not is_committed(found)
    assert raw(found) == raw(values)


def test_a_traced_value_has_no_place_of_its_own(mesh: Mesh) -> None:
    places: list[Any] = [jax.devices()[0], jax.devices()[1], NamedSharding(mesh, P("x"))]
    for place in places:
        array = jax.device_put(jnp.zeros(8), place)
        for template in (array, Struct((8,), np.float32, sharding=array.sharding)):

            def total(value: Any, template: Any = template) -> Any:
                return p2s.set_weights({"x": template}, {"@x": value})["x"].sum()

            assert_same(jax.grad(total)(jnp.arange(8.0)), jnp.ones(8))
            assert jax.jit(total)(jnp.ones(8)) == 8
            assert jax.vmap(total)(jnp.ones((2, 8))).tolist() == [8, 8]


def test_a_mesh_that_is_set_changes_nothing(mesh: Mesh, tmp_path: Path) -> None:
    sharding: Any = jax.sharding
    enter = getattr(jax, "set_mesh", None) or getattr(sharding, "use_mesh", None)
    if enter is None or not hasattr(sharding, "get_abstract_mesh"):
        pytest.skip("this JAX sets no mesh")
    tree = [[np.full(3, n, np.float32) for n in range(1100)], jnp.asarray(1.5), jax.random.key(0)]
    p2s.save_pytree(tree, tmp_path / "file")
    with enter(mesh):
        found = p2s.load_pytree(tmp_path / "file")
        traced = jax.jit(lambda: p2s.set_weights({"w": jnp.zeros(3)}, {"@w": np.ones(3, "f4")}))()
        assert not sharding.get_abstract_mesh().empty
    assert_same(found, jax.tree_util.tree_map(jnp.asarray, tree))
    assert not any(map(is_committed, jax.tree_util.tree_leaves(found)))
    assert {len(leaf.devices()) for leaf in jax.tree_util.tree_leaves(found)} == {1}
    assert raw(traced["w"]) == raw(np.ones(3, np.float32))


def test_set_weights_puts_leaves_into_shardings(mesh: Mesh) -> None:
    values = values_of((8, 16))
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        template = [Struct((8, 16), np.float32, sharding=sharding)]
        for value in values, jnp.asarray(values):
            found = p2s.set_weights(template, {"#0": value})[0]
            assert_in_place(found, values, sharding)


# --- a file carries no device -----------------------------------------------------------------


def test_from_eight_devices_to_one_three_and_none_and_back(tmp_path: Path, mesh: Mesh) -> None:
    tree = {
        "rows": (values_of((24, 16), seed=1), P("x")),
        "columns": (values_of((24, 16), seed=2), P(None, ("x", "y"))),
        "mixed": (values_of((24, 16), ml_dtypes.bfloat16, seed=3), P("x", "y")),
        "everywhere": (values_of((24, 16), seed=4), P()),
        "packed": (values_of((24, 16), ml_dtypes.int4, seed=5), P(("x", "y"))),
        "keys": (jax.random.split(jax.random.key(1), 24), P("y")),
        "count": (np.int32(3), P()),
        "nothing": (np.zeros((0, 24), np.float32), P("x")),
    }
    plain = {name: jnp.asarray(values) for name, (values, _) in tree.items()}
    eight = {
        name: jax.device_put(values, NamedSharding(mesh, spec))
        for name, (values, spec) in tree.items()
    }
    p2s.save_pytree(plain, tmp_path / "plain")
    p2s.save_pytree(eight, tmp_path / "eight")
    assert (tmp_path / "eight").read_bytes() == (tmp_path / "plain").read_bytes()

    without_devices = p2s.load_pytree(tmp_path / "eight")
    three = Mesh(np.array(jax.devices()[3:6]), ("z",))
    places: dict[str, Any] = {
        "one": {name: SingleDeviceSharding(jax.devices()[5]) for name in tree},
        "three": {
            name: NamedSharding(three, P("z") if values.shape[:1] == (24,) else P())
            for name, (values, _) in tree.items()
        },
        "eight": {name: array.sharding for name, array in eight.items()},
    }
    for name, array in plain.items():
        assert not is_committed(without_devices[name])
        assert raw(without_devices[name]) == raw(array)
    for count, shardings in places.items():
        template = {
            name: Struct(array.shape, array.dtype, sharding=shardings[name])
            for name, array in plain.items()
        }
        found = p2s.load_into_pytree(template, tmp_path / "eight")
        for name, array in plain.items():
            assert_in_place(found[name], array, shardings[name])
        p2s.save_pytree(found, tmp_path / count)
        assert (tmp_path / count).read_bytes() == (tmp_path / "plain").read_bytes()


def test_saving_leaves_no_copy_inside_sharded_arrays(tmp_path: Path, mesh: Mesh) -> None:
    array = jax.device_put(values_of((8, 16)), NamedSharding(mesh, P("x", "y")))
    p2s.save_pytree([array], tmp_path / "file")
    assert array._npy_value is None  # where JAX keeps it


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P("x", "y"), P(("y", "x"))], ids=str)
def test_saving_makes_no_whole_of_what_is_spread_over_devices(
    spec: Any, tmp_path: Path, mesh: Mesh
) -> None:
    values = np.arange(8 << 20, dtype=np.float32).reshape(2048, -1)
    tree = [jax.device_put(values, NamedSharding(mesh, spec))]
    p2s.save_pytree([values], tmp_path / "plain", checksum=True)
    tracemalloc.start()
    try:
        p2s.save_pytree(tree, tmp_path / "file", checksum=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert (tmp_path / "file").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("spread", [False, True])
def test_saving_leaves_no_copy_inside_what_has_to_be_unpacked(
    spread: bool, tmp_path: Path, mesh: Mesh
) -> None:
    place = NamedSharding(mesh, P()) if spread else jax.devices()[0]
    array: Any = jax.device_put(jnp.zeros((100, 100), jnp.int4), place)
    p2s.save_pytree([array], tmp_path / "file")
    p2s.save_pytree_async([array], tmp_path / "file").result()
    assert array._npy_value is None
    assert all(shard.data._npy_value is None for shard in array.addressable_shards)


# --- what is read, and what is kept -----------------------------------------------------------


class Counter:
    """Counts the bytes that are read, and how often each."""

    def __init__(self, patch: pytest.MonkeyPatch, size: int) -> None:
        self.times = np.zeros(size, np.int64)
        original = _source.FileSource.read_into

        def read_into(source: Any, buffers: list[memoryview], offset: int) -> int:
            count = original(source, buffers, offset)
            self.times[offset : offset + count] += 1
            return count

        patch.setattr(_source.FileSource, "read_into", read_into)


@pytest.mark.parametrize("spec", SPECS)
def test_each_byte_is_read_once(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    values = values_of((512, 1024))
    p2s.save_pytree([values], tmp_path / "file", metadata={"": " " * 70_000})
    size = (tmp_path / "file").stat().st_size
    counter = Counter(monkeypatch, size)
    into(tmp_path / "file", values.shape, values.dtype, NamedSharding(mesh, SPECS[spec]))
    assert counter.times[size - values.nbytes :].tolist() == [1] * values.nbytes


@pytest.mark.parametrize(
    ("shape", "regions", "exactly"),
    [
        ((64, 64), [((0, 32), (0, 64))], True),  # rows
        ((64, 64), [((0, 16), (0, 64)), ((32, 48), (0, 64))], True),
        ((64, 64), [((0, 64), (0, 32))], False),  # columns beside short gaps
        ((16, 16384), [((0, 16), (0, 1024))], True),  # columns beside long ones
        ((16, 16384), [((0, 16), (0, 16)), ((0, 16), (16, 32))], True),
        ((4, 16, 64), [((0, 4), (0, 8), (0, 32)), ((0, 4), (0, 8), (32, 64))], False),
        ((4, 256, 64), [((0, 4), (0, 128), (0, 32)), ((0, 4), (0, 128), (32, 64))], True),
        ((4, 16, 64), [((1, 2), (3, 7), (0, 32)), ((1, 2), (3, 7), (32, 64))], True),
    ],
)
def test_what_a_process_does_not_hold_is_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    regions: list[Region],
    exactly: bool,
) -> None:
    values = values_of(shape)
    p2s.save_pytree([values], tmp_path / "file")
    counter = Counter(monkeypatch, (tmp_path / "file").stat().st_size)
    needed = np.zeros(shape, np.int64)
    with open_checkpoint(tmp_path / "file") as store, ReadPool(2) as pool:
        counter.times[:] = 0  # the header came with it
        info, start = store.infos["#0"], store.places["#0"][1]
        sizes = [slots.nbytes_of(region, info) for region in regions]
        wanted = [
            Slot("#0", info, region, 0, nbytes, [])
            for region, nbytes in zip(regions, sizes, strict=True)
        ]
        places = [Place(slot, staging.aligned(slot.nbytes), 0) for slot in wanted]
        reads, tasks = plan_reads(store, places, lambda _: None)
        for future in pool.start(reads, tasks, lambda _: None):
            future.result()
    for region, place in zip(regions, places, strict=True):
        assert place.raw.tobytes() == select(values, region).tobytes()
        select(needed, region)[...] = 1
    counts = counter.times[start:].reshape(-1, 4)[:, 0].reshape(shape)
    assert counter.times[:start].sum() == 0
    assert (counts <= 1).all()
    assert (counts >= needed).all()
    if exactly:
        assert (counts == needed).all()
    else:  # gaps between runs, and nothing before or after
        elements = np.flatnonzero(needed)
        assert not counts.reshape(-1)[: elements[0]].any()
        assert not counts.reshape(-1)[elements[-1] + 1 :].any()


@pytest.mark.parametrize("spec", SPECS)
def test_memory_is_that_of_the_data_once(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    values = values_of((4096, 4096), np.int8)
    p2s.save_pytree([values], tmp_path / "file")
    sizes: list[int] = []
    original = staging.aligned

    def aligned(size: int) -> NDArray[np.uint8]:
        sizes.append(size)
        return original(size)

    monkeypatch.setattr(reading, "aligned", aligned)
    sharding = NamedSharding(mesh, SPECS[spec])
    found = into(tmp_path / "file", values.shape, values.dtype, sharding)
    assert_in_place(found, values, sharding)
    assert max(sizes) == values.nbytes
    assert sum(sizes) <= values.nbytes + 4 * extents.BAND


def test_the_file_may_change_after_loading(tmp_path: Path, mesh: Mesh) -> None:
    values = values_of((512, 1024))
    p2s.save_pytree([values], tmp_path / "file")
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        found = into(tmp_path / "file", values.shape, values.dtype, sharding)
        content = (tmp_path / "file").read_bytes()
        with (tmp_path / "file").open("r+b") as file:
            file.write(bytes(len(content)))
        assert_in_place(found, values, sharding)
        (tmp_path / "file").write_bytes(content)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mmap", [False, True])
def test_donating_what_was_loaded_changes_nothing_else(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str, mmap: bool
) -> None:
    take_route(route, monkeypatch)
    values = np.arange(512 * 64, dtype=np.float32).reshape(512, 64)
    p2s.save_pytree({"w": values}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    step = jax.jit(lambda array: array + 1, donate_argnums=0)
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        template = {"a": Struct((512, 64), np.float32, sharding=sharding)}
        template["b"] = template["a"]
        found = p2s.load_into_pytree(template, tmp_path / "file", rename=lambda _: "@w", mmap=mmap)
        after = step(found["a"])
        assert raw(after) == raw(values + 1)
        assert_in_place(found["b"], values, sharding)
        assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", SPECS)
def test_digests_are_checked(
    tmp_path: Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    route: str,
    mmap: bool,
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file", checksum=True)
    sharding = NamedSharding(mesh, SPECS[spec])
    found = into(tmp_path / "file", (8, 16), np.float32, sharding, mmap=mmap)
    assert_in_place(found, values, sharding)
    content = bytearray((tmp_path / "file").read_bytes())
    content[-100] ^= 1
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(p2s.FileFormatError, match="does not match its digest"):
        into(tmp_path / "file", (8, 16), np.float32, sharding, mmap=mmap)


@pytest.mark.parametrize("route", ROUTES)
def test_progress_counts_everything_once(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    tree = [values_of((8, 16), seed=seed) for seed in range(4)]
    p2s.save_pytree(tree, tmp_path / "file")
    shardings = [NamedSharding(mesh, spec) for spec in (P("x"), P(None, "x"), P())]
    template = [Struct((8, 16), np.float32, sharding=sharding) for sharding in shardings]
    told: list[tuple[int, int]] = []
    p2s.load_into_pytree(
        [*template, np.zeros((8, 16), np.float32)],
        tmp_path / "file",
        progress=lambda done, total: told.append((done, total)),
    )
    total = sum(array.nbytes for array in tree)
    assert {size for _, size in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_a_file_that_is_cut_short_while_it_is_read(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route("bands", monkeypatch)
    values = values_of((64, 64))
    p2s.save_pytree([values], tmp_path / "file")
    original = plan.plan_batches

    def plan_batches(*arguments: Any) -> Any:
        with (tmp_path / "file").open("r+b") as file:
            file.truncate(5000)
        return original(*arguments)

    monkeypatch.setattr(reading, "plan_batches", plan_batches)
    for spec in SPECS.values():
        (tmp_path / "file").unlink()
        p2s.save_pytree([values], tmp_path / "file")
        with pytest.raises(p2s.FileFormatError, match="was truncated while it was read"):
            into(tmp_path / "file", (64, 64), np.float32, NamedSharding(mesh, spec))


def test_the_header_of_a_file_says_nothing_of_devices(tmp_path: Path, mesh: Mesh) -> None:
    array = jax.device_put(values_of((8, 16)), NamedSharding(mesh, P("x")))
    p2s.save_pytree([array], tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header) == {"__metadata__", "#0"}
    assert header["__metadata__"] == {"format": "flax"}
    assert set(header["#0"]) == {"dtype", "shape", "data_offsets"}


def test_thin_slices_take_no_memory_for_their_places() -> None:
    region: Region = ((0, 2**40), (0, 1))
    assert runs_in(region, (2**40, 8), 1) == (2**40, 1)


def test_progress_reaches_the_end_where_two_leaves_take_one_tensor(
    tmp_path: Path, mesh: Mesh
) -> None:
    values = values_of((8, 16))
    p2s.save_pytree({"w": values}, tmp_path / "file")
    leaf = Struct(values.shape, values.dtype, sharding=NamedSharding(mesh, P("x")))
    told: list[tuple[int, int]] = []
    p2s.load_into_pytree(
        {"a": leaf, "b": leaf},
        tmp_path / "file",
        rename=lambda _: "@w",
        progress=lambda *both: told.append(both),
    )
    assert told[-1] == (values.nbytes, values.nbytes)  # which is read once


def test_progress_of_a_map_is_told_at_its_end(tmp_path: Path, mesh: Mesh) -> None:
    values = values_of((1024, 1024))
    p2s.save_pytree([values, values], tmp_path / "file")
    told: list[tuple[int, int]] = []
    sharded = Struct(values.shape, values.dtype, sharding=NamedSharding(mesh, P("x")))
    p2s.load_into_pytree(
        [sharded, Struct(values.shape, values.dtype)],
        tmp_path / "file",
        mmap=True,
        progress=lambda *both: told.append(both),
    )
    assert told[-1] == (2 * values.nbytes, 2 * values.nbytes)


@pytest.mark.parametrize("size", [4, 1 << 21])
def test_a_sharding_that_does_not_fit_is_a_mismatch(tmp_path: Path, mesh: Mesh, size: int) -> None:
    values = np.zeros(size + 1, np.float32)
    p2s.save_pytree({"x": values}, tmp_path / "file")
    template = {"x": Struct(values.shape, values.dtype, sharding=NamedSharding(mesh, P("x")))}
    with pytest.raises(p2s.WeightsMismatchError, match="'@x': it does not fit the sharding"):
        p2s.load_into_pytree(template, tmp_path / "file")
    with pytest.raises(p2s.WeightsMismatchError, match="'@x': it does not fit the sharding"):
        p2s.set_weights(template, {"@x": values})

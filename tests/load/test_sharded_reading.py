"""Loading into shardings: what is read and kept, and that files do not depend on devices."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from numpy.typing import NDArray

import pytree2safetensors as p2s
from placed import (
    ROUTES,
    SPECS,
    P,
    Struct,
    assert_in_place,
    into,
    is_committed,
    raw,
    select,
    take_route,
    values_of,
)
from pytree2safetensors._leaves import regions as regions_module
from pytree2safetensors._leaves import staging
from pytree2safetensors._leaves.regions import Region, runs_in
from pytree2safetensors._load import ahead, plan, reading, slots
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._load.ranges import Place, plan_reads
from pytree2safetensors._load.slots import Slot
from pytree2safetensors._storage import file_source as _source
from pytree2safetensors._storage.read_pool import ReadPool

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
def test_saving_sharded_arrays_makes_no_whole_copies(spec: Any, tmp_path: Path, mesh: Mesh) -> None:
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

    monkeypatch.setattr(ahead, "aligned", aligned)
    sharding = NamedSharding(mesh, SPECS[spec])
    found = into(tmp_path / "file", values.shape, values.dtype, sharding)
    assert_in_place(found, values, sharding)
    assert max(sizes) == values.nbytes
    assert sum(sizes) <= values.nbytes + 4 * regions_module.BAND


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
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(p2s.FileFormatError, match="does not match its digest"):
        into(tmp_path / "damaged", (8, 16), np.float32, sharding, mmap=mmap)


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


def test_progress_counts_regions_when_they_are_read(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route("bands", monkeypatch)
    monkeypatch.setattr("pytree2safetensors._storage.progress._STEP", 1)
    tree = [values_of((8, 16))] * 2
    p2s.save_pytree(tree, tmp_path / "file")
    leaf = Struct((8, 16), np.float32, sharding=NamedSharding(mesh, P(None, "x")))
    told: list[int] = []
    p2s.load_into_pytree(
        [leaf, leaf], tmp_path / "file", progress=lambda done, _: told.append(done)
    )
    assert told[-2] >= tree[0].nbytes


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(
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


def test_progress_of_a_map_is_reported_at_its_end(tmp_path: Path, mesh: Mesh) -> None:
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


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("regions", range(1, 9))  # of a batch
def test_two_leaves_take_one_tensor_that_is_read_in_several_batches(
    regions: int, mmap: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route("direct", monkeypatch)
    values = values_of((8, 1 << 10))
    monkeypatch.setattr(reading, "_BATCH", regions * values.nbytes // 8)
    p2s.save_pytree({"w": values}, tmp_path / "file")
    leaf = Struct(values.shape, values.dtype, sharding=NamedSharding(mesh, P(("x", "y"))))
    loaded = p2s.load_into_pytree(
        {"v": leaf, "w": leaf}, tmp_path / "file", rename=lambda _: "@w", mmap=mmap
    )
    for name in "vw":
        np.testing.assert_array_equal(loaded[name], values)

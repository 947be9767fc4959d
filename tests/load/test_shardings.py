"""Loading into shardings: every device gets its slices, bit for bit."""

import io
import math
import os
import signal
import sys
import threading
import time
from functools import partial
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
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

import pytree2safetensors as p2s
from oracle import assert_same
from placed import (
    ROUTES,
    SPECS,
    P,
    Struct,
    assert_in_place,
    into,
    is_committed,
    raw,
    take_route,
    values_of,
)
from pytree2safetensors._leaves import regions
from pytree2safetensors._leaves.jax_versions import enable_x64
from pytree2safetensors._leaves.spec import _jax_holds
from pytree2safetensors._load import eager, finishing, reading, shardings

# --- slices of every kind ---------------------------------------------------------------------


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
        patch.setattr(regions, "BAND", band)
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
def test_folders_of_shards_load_in_every_sharding(
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


# --- shardings of every kind ------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_arrays_load_onto_single_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    take_route(route, monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    for device in jax.devices()[:3]:
        template = jax.device_put(values, device)
        found = p2s.load_into_pytree([template], tmp_path / "file")[0]
        assert_in_place(found, values, SingleDeviceSharding(device))


@pytest.mark.skipif(jax.__version_info__ >= (0, 7), reason="this JAX has no PositionalSharding")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # JAX is about to remove it
def test_arrays_load_in_positional_shardings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route("bands", monkeypatch)
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    positional: Any = jax.sharding.PositionalSharding  # type: ignore[attr-defined] # in older versions
    whole = positional(jax.devices())
    for sharding in whole.reshape(4, 2), whole.reshape(8, 1), whole.replicate():
        assert_in_place(into(tmp_path / "file", (8, 16), np.float32, sharding), values, sharding)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pmap is on its way out
@pytest.mark.parametrize("route", ROUTES)
def test_arrays_load_in_the_shardings_of_pmap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    template = jax.pmap(lambda row: row * 2)(values)
    take_route(route, monkeypatch)
    p2s.save_pytree([template], tmp_path / "file")
    loaded = p2s.load_into_pytree([template], tmp_path / "file")[0]
    for found in loaded, p2s.set_weights([template], {"#0": values * 2})[0]:
        assert found.sharding == template.sharding
        assert raw(found) == raw(values * 2)


@pytest.mark.parametrize("route", ROUTES)
def test_arrays_load_into_every_kind_of_memory(
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
    for kind in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        abstract = NamedSharding(explicit.abstract_mesh, P("x"), memory_kind=kind)
        with jax.set_mesh(explicit):
            found = into(tmp_path / "file", (8, 16), np.float32, abstract)
        assert found.sharding.memory_kind == kind
    with pytest.raises(
        p2s.WeightsMismatchError,
        match=r"'#0': the sharding that the template has for it names no devices, because its mesh is "
        r"abstract; load under jax\.set_mesh and outside of jax\.jit, or give the template concrete shardings",
    ):
        p2s.load_into_pytree(template, tmp_path / "file")


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh") or not hasattr(jax.sharding, "get_mesh"),
    reason="this JAX has no mesh in force",
)
def test_abstract_meshes_within_jit(tmp_path: Path) -> None:
    explicit: Any = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    template = [Struct((8,), np.float32, sharding=NamedSharding(explicit.abstract_mesh, P("x")))]
    p2s.save_pytree([np.ones(8, np.float32)], tmp_path / "file")
    with jax.set_mesh(explicit):

        @jax.jit
        def traced(value: Any) -> Any:
            with pytest.raises(p2s.WeightsMismatchError, match=r"load under jax\.set_mesh"):
                p2s.load_into_pytree(template, tmp_path / "file")
            return p2s.set_weights(template, {"#0": value})

        assert_same(np.asarray(traced(jnp.arange(8.0))[0]), np.arange(8, dtype=np.float32))


class Elsewhere(SingleDeviceSharding):
    """A sharding whose devices seem to belong to other processes."""

    addressable_devices: Any = frozenset()
    is_fully_addressable = False

    def addressable_devices_indices_map(self, global_shape: Any) -> Any:
        del global_shape
        return {}


def test_leaves_elsewhere_are_made_of_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shardings, "has_empty_arrays", lambda: True)
    sharding = Elsewhere(jax.devices()[0])
    tree: dict[str, Any] = {"w": values_of((8, 8)), "key": jax.random.key(1)}
    tree["none"] = np.zeros((0, 2), np.int8)
    p2s.save_pytree(tree, tmp_path / "file")
    template = {
        name: Struct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in tree.items()
    }
    made: list[Any] = []
    result = jnp.zeros(())

    def make(shape: Any, sharding: Any, shards: Any, *, dtype: Any) -> Any:
        made.append((shape, sharding, shards, dtype))
        return result

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", make)
    rules = [p2s.Rule("@w", "@w", "a b -> b a"), p2s.Rule("{=}", "{=}")]
    expected: list[Any] = [(leaf.shape, sharding, [], leaf.dtype) for leaf in template.values()]
    loads: list[Any] = [
        lambda: p2s.load_into_pytree(template, tmp_path / "file"),
        lambda: p2s.load_into_pytree(template, tmp_path / "file", mmap=True),
        lambda: p2s.load_into_pytree(template, tmp_path / "file", rename=rules),
        lambda: p2s.set_weights(template, p2s.pytree2dict(tree)),
    ]
    for load in loads:
        made.clear()
        assert all(leaf is result for leaf in load().values())
        assert sorted(made, key=str) == sorted(expected, key=str)


def test_leaves_elsewhere_are_errors_if_jax_has_no_such_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shardings, "has_empty_arrays", lambda: False)
    p2s.save_pytree([values_of((8, 16))], tmp_path / "file")
    with pytest.raises(
        p2s.WeightsMismatchError,
        match=r"'#0': all devices of its template's sharding belong to other processes, and this JAX "
        r"makes no such arrays; use JAX 0\.7\.1 or newer",
    ):
        into(tmp_path / "file", (8, 16), np.float32, Elsewhere(jax.devices()[0]))


@pytest.mark.skipif(not hasattr(jax, "typeof"), reason="this JAX has no types of arrays")
def test_types_of_arrays_are_templates(tmp_path: Path) -> None:
    values = values_of((8, 16))
    p2s.save_pytree([values], tmp_path / "file")
    found: Any = p2s.load_into_pytree([jax.typeof(values)], tmp_path / "file")[0]
    assert_same(found, jnp.asarray(values))
    assert not is_committed(found)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has it in another place")
def test_a_load_in_a_shard_map_needs_jit(tmp_path: Path, mesh: Mesh) -> None:
    values = np.ones((8, 16), ml_dtypes.bfloat16)
    p2s.save_pytree([values], tmp_path / "file")
    _jax_holds.cache_clear()
    placed = Struct((8, 16), values.dtype, sharding=NamedSharding(mesh, P("x")))

    def plain(array: Any) -> Any:
        return array + p2s.load_pytree(tmp_path / "file")[0][:1, :1]

    def sharded(array: Any) -> Any:
        return array + p2s.load_into_pytree([placed], tmp_path / "file")[0][:1, :1]

    for function in (plain, sharded):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        with pytest.raises(
            RuntimeError,
            match=r"JAX makes no arrays in a function that jax\.shard_map or jax\.pmap runs without "
            r"jax\.jit; load before the call, or compile it with jax\.jit",
        ):
            mapped(values)
        with pytest.raises(FileNotFoundError):
            jax.shard_map(
                lambda _: p2s.load_pytree(tmp_path / "no"), mesh=mesh, in_specs=P(), out_specs=P()
            )(values)
    mapped = jax.shard_map(plain, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert_same(np.asarray(jax.jit(mapped)(values)), values + values)
    assert isinstance(p2s.load_pytree(tmp_path / "file")[0], jax.Array)


def test_what_jax_cannot_divide_is_an_error_that_names_the_leaf(tmp_path: Path, mesh: Mesh) -> None:
    p2s.save_pytree({"odd": np.zeros((7, 3), np.float32)}, tmp_path / "file")
    template = {"odd": Struct((7, 3), np.float32, sharding=NamedSharding(mesh, P("x")))}
    with pytest.raises(
        p2s.WeightsMismatchError, match="'@odd': it does not fit the sharding of its template: "
    ) as caught:
        p2s.load_into_pytree(template, tmp_path / "file")
    assert caught.value.mismatched[0].startswith("'@odd': ")


def test_indivisible_shardings_of_all_leaves_are_listed_by_key_path(
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
    with jax.default_device(jax.devices()[1]):
        elsewhere = jnp.zeros((8, 16), jnp.float32)
    for template in jnp.asarray(values), elsewhere:
        found = p2s.load_into_pytree([template], tmp_path / "file")[0]
        assert not is_committed(found)
        assert found.devices() == {jax.devices()[0]}
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


@pytest.mark.parametrize("x64", [False, True])
def test_a_mesh_that_a_trace_keeps_changes_nothing(mesh: Mesh, tmp_path: Path, x64: bool) -> None:
    sharding: Any = jax.sharding
    enter = getattr(jax, "set_mesh", None) or getattr(sharding, "use_mesh", None)
    if enter is None or not hasattr(sharding, "get_abstract_mesh"):
        pytest.skip("this JAX sets no mesh")
    equal = [np.full(3, n, np.float64 if x64 else np.float32) for n in range(1100)]
    alone = jax.devices()[5]  # not on the mesh
    part = Mesh(np.array(jax.devices()[:4]), ("x",))
    with enable_x64(x64):
        p2s.save_pytree([equal, jnp.asarray(1.5), jax.random.key(0), 7], tmp_path / "file")
        template = p2s.load_abstract(tmp_path / "file", sharding=SingleDeviceSharding(alone))
        template[3] = jnp.asarray(0)
        plain = p2s.load_pytree(tmp_path / "file")
    found: list[Any] = []

    def load(_: Any) -> None:
        found.append(p2s.load_pytree(tmp_path / "file"))
        found.append(p2s.load_into_pytree(template, tmp_path / "file"))

    with enter(part), jax.default_device(alone), enable_x64(x64):
        jax.eval_shape(load, 0.0)
        assert_same(found[0], plain)
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(found[0]) if isinstance(leaf, jax.Array)]
    assert not any(map(is_committed, arrays))
    assert {device for leaf in arrays for device in leaf.devices()} == {alone}
    *sharded, scalar = found[1]
    places = {leaf.sharding for leaf in jax.tree_util.tree_leaves(sharded)}
    assert places == {SingleDeviceSharding(alone)}
    assert found[1][1].aval.weak_type
    assert int(scalar) == 7
    assert scalar.aval.weak_type
    assert len(scalar.devices()) == 1
    assert not is_committed(scalar)


@pytest.mark.skipif(
    os.name != "posix" or sys.thread_info.lock == "mutex+cond",
    reason="a signal does not interrupt a thread that waits for another one",
)
@pytest.mark.parametrize("mmap", [False, True])
def test_an_interrupt_under_a_mesh_that_a_trace_keeps_ends_the_load(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool
) -> None:
    sharding: Any = jax.sharding
    enter = getattr(jax, "set_mesh", None) or getattr(sharding, "use_mesh", None)
    if enter is None or not hasattr(sharding, "get_abstract_mesh"):
        pytest.skip("this JAX sets no mesh")
    p2s.save_pytree([np.full(5000, n, np.float32) for n in range(30)], tmp_path / "file")
    template = [Struct((5000,), np.float32)] * 30

    def load() -> float:
        p2s.load_into_pytree(template, tmp_path / "file", mmap=mmap)
        return 0.0

    finished: list[int] = []
    finish = finishing.Finisher.finish

    def interrupted(finisher: Any, places: Any, **options: Any) -> Any:
        finished.append(len(places))
        if len(finished) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)  # until the thread that waits for this one has got it
        return finish(finisher, places, **options)

    def interrupt(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reading, "_BATCH", 20_000)
    monkeypatch.setattr(finishing.Finisher, "finish", interrupted)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with enter(mesh), pytest.raises(ZeroDivisionError):
            jax.eval_shape(load)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert finished == [1]
    monkeypatch.undo()
    with enter(mesh):
        jax.eval_shape(load)


def test_an_interrupt_of_the_start_of_the_other_thread_waits_for_its_end(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jax.__version_info__ < (0, 6):
        pytest.skip("this JAX needs no other thread")
    sharding: Any = jax.sharding
    enter = getattr(jax, "set_mesh", None) or sharding.use_mesh
    begun, real, steps = threading.Event(), threading.Thread.start, list[str]()

    def start(thread: threading.Thread) -> None:
        real(thread)
        begun.wait()
        raise ZeroDivisionError

    def make() -> None:
        begun.set()
        time.sleep(0.2)
        steps.append("made")

    monkeypatch.setattr(threading.Thread, "start", start)
    with enter(mesh), pytest.raises(ZeroDivisionError):
        jax.eval_shape(lambda: eager.eagerly(make))
    assert steps == ["made"]


def test_set_weights_puts_leaves_into_shardings(mesh: Mesh) -> None:
    values = values_of((8, 16))
    for spec in SPECS.values():
        sharding = NamedSharding(mesh, spec)
        template = [Struct((8, 16), np.float32, sharding=sharding)]
        for value in values, jnp.asarray(values):
            found = p2s.set_weights(template, {"#0": value})[0]
            assert_in_place(found, values, sharding)


def test_set_weights_keeps_weak_types_in_every_sharding(mesh: Mesh) -> None:
    weak = jnp.asarray(2.5)
    shardings: list[Any] = [SingleDeviceSharding(device) for device in jax.devices()[:2]]
    for sharding in (*shardings, NamedSharding(mesh, P())):
        template = {"a": Struct((), np.float32, sharding=sharding)}
        for value in weak, jax.device_put(weak, sharding):
            found = p2s.set_weights(template, {"@a": value})["a"]
            assert found.aval.weak_type
            assert_in_place(found, np.float32(2.5), sharding)
        shape = jax.eval_shape(partial(p2s.set_weights, template, {"@a": weak}))["a"]
        assert (shape.shape, shape.dtype) == ((), np.float32)

"""Several processes that save and load together, with every option."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import pytree2safetensors as p2s
from pytree2safetensors._leaves.jax_versions import has_empty_arrays
from pytree2safetensors._save import calls
from pytree2safetensors._storage import file_source as _source
from pytree2safetensors._storage.naming import temporary_prefix
from system_calls import Call, watched
from together import (
    SPECS,
    Group,
    assert_same_shards,
    connect,
    contents_of,
    devices_of,
    first,
    group_of,
    large,
    load_large,
    mesh_of_four,
    on_one_device,
    raw,
    save_large,
    spread,
    values_of,
)

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # JAX gives its constructor no types
Struct: Any = jax.ShapeDtypeStruct

OLD = {"old": np.arange(3, dtype=np.float32)}


@pytest.fixture
def pair() -> Group:
    """Two processes of two devices each."""
    return group_of(2, 2)


def everything() -> dict[str, tuple[Any, Any]]:
    """Values of every kind, and how they are spread."""
    found: dict[str, tuple[Any, Any]] = {}
    for shape in (8, 16), (4, 8, 6), (4, 4, 2, 3):
        for number, spec in enumerate(SPECS):
            found[f"{len(shape)} axes, {number}"] = (values_of(shape), spec)
    names = ["bool", "int4", "uint4", "uint16", "bfloat16", "complex64", "float8_e4m3fn"]
    names += ["float8_e4m3b11fnuz", "float64", "complex128", "int64"]
    for name in names:
        for number, spec in enumerate(SPECS):
            dtype = getattr(ml_dtypes, name, name)
            found[f"{name}, {number}"] = (values_of((8, 16), dtype), spec)
    for number, spec in enumerate(SPECS):
        found[f"keys, {number}"] = (jax.random.split(jax.random.key(number), (8, 4)), spec)
    found["one key"] = (jax.random.key(9, impl="rbg"), P())
    found["no axes"] = (np.float32(-0.0), P())
    found["nothing"] = (np.zeros((0, 4), np.int16), P("x", "y"))
    found["large rows"] = (values_of((1024, 300)), P(("x", "y")))
    found["large columns"] = (values_of((1024, 300)), P(None, ("x", "y")))
    found["large everywhere"] = (values_of((1024, 300)), P())
    return found


@contextmanager
def with_x64() -> Iterator[None]:
    update: Any = jax.config.update
    update("jax_enable_x64", True)
    try:
        yield
    finally:
        update("jax_enable_x64", False)


# --- saving and loading -----------------------------------------------------------------------


def save_everything(folder: str) -> None:
    with with_x64():
        described = everything()
        tree = {name: spread(values, spec) for name, (values, spec) in described.items()}
        assert not any(array.is_fully_addressable for array in tree.values())
        p2s.save_pytree(tree, f"{folder}/together", metadata={"run": "17"})
        if first():  # what one process alone would have written
            alone = {name: on_one_device(values) for name, (values, _) in described.items()}
            p2s.save_pytree(alone, f"{folder}/alone", metadata={"run": "17"})


def load_everything(folder: str, mmap: bool) -> int:
    with with_x64():
        described = everything()
        tree = {name: spread(values, spec) for name, (values, spec) in described.items()}
        structs = {
            name: Struct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in tree.items()
        }
        for template in tree, structs:
            found = p2s.load_into_pytree(template, f"{folder}/together", mmap=mmap)
            for name, array in tree.items():
                assert_same_shards(found[name], array)
    return len(tree)


def test_the_file_is_what_one_process_would_write(pair: Group, tmp_path: Path) -> None:
    pair.run(save_everything, tmp_path)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]
    for mmap in False, True:
        assert set(pair.run(load_everything, tmp_path, mmap)) == {len(everything_names())}


def everything_names() -> list[str]:
    with with_x64():
        return list(everything())


def test_what_several_processes_saved_loads_anywhere(pair: Group, tmp_path: Path) -> None:
    pair.run(save_large, tmp_path)
    expected = values_of((1024, 300))
    eight = Mesh(np.array(jax.devices()), ("z",))
    for sharding in (
        NamedSharding(eight, P("z")),
        NamedSharding(Mesh(np.array(jax.devices()[:3]), ("z",)), P(None, "z")),
        SingleDeviceSharding(jax.devices()[3]),
    ):
        template = {
            name: Struct((1024, 300), np.float32, sharding=sharding) for name in ("rows", "columns")
        }
        found = p2s.load_into_pytree(template, tmp_path / "file")
        for array in found.values():
            assert array.sharding == sharding
            assert raw(array) == raw(expected)
    for array in p2s.load_pytree(tmp_path / "file").values():
        assert raw(array) == raw(expected)
    # And back: what eight devices of one process hold goes to four of two processes.
    whole = {
        name: jax.device_put(expected, NamedSharding(eight, P("z"))) for name in ("rows", "columns")
    }
    p2s.save_pytree(whole, tmp_path / "eight")
    assert (tmp_path / "eight").read_bytes() == (tmp_path / "file").read_bytes()
    pair.run(load_large, tmp_path / "eight")


def save_with_what_is_local(folder: str, options: dict[str, Any]) -> None:
    rank = jax.process_index()
    tree = {
        "global": spread(np.arange(8, dtype=np.float32), P("x")),
        "numpy": np.full((3, 5), rank, np.int16),
        "large": np.full((600, 300), rank, np.float32),
        "local": jax.device_put(np.full(4, rank, np.float32), jax.local_devices()[1]),
        "key": jax.random.key(rank),
        "int": 10,
        "float": 0.5,
        "str": "the same",
        "weak": jnp.asarray(1.5 + rank),
        "tuple": (1, None, {}),
    }
    metadata = {"rank": str(rank) * (rank + 1) * 5000}
    p2s.save_pytree(tree, f"{folder}/file", metadata=metadata, **options)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("shards", [None, "100kB", "1GB"])
def test_what_is_no_global_array_comes_from_process_0(
    pair: Group, tmp_path: Path, shards: str | None, checksum: bool
) -> None:
    options = {"max_shard_size": shards, "checksum": checksum}
    pair.run(save_with_what_is_local, tmp_path, options)
    found = p2s.load_pytree(tmp_path / "file")
    assert raw(found["global"]) == raw(np.arange(8, dtype=np.float32))
    assert raw(found["numpy"]) == raw(np.zeros((3, 5), np.int16))
    assert raw(found["large"]) == raw(np.zeros((600, 300), np.float32))
    assert raw(found["local"]) == raw(np.zeros(4, np.float32))
    assert raw(found["key"]) == raw(jax.random.key(0))
    assert (found["int"], found["float"], found["str"]) == (10, 0.5, "the same")
    assert found["weak"].aval.weak_type
    assert float(found["weak"]) == 1.5
    assert found["tuple"] == (1, None, {})
    assert p2s.load_metadata(tmp_path / "file") == {"rank": "0" * 5000}


def save_alone(folder: str) -> None:
    if first():
        p2s.save_pytree(
            {"local": jnp.arange(3), "host": np.arange(4, dtype=np.int8)}, f"{folder}/file"
        )


def test_a_tree_without_global_arrays_is_saved_without_waiting(pair: Group, tmp_path: Path) -> None:
    pair.run(save_alone, tmp_path)
    assert set(p2s.load_pytree(tmp_path / "file")) == {"local", "host"}


def load_other_leaves(folder: str) -> None:
    """Python scalars, keys and weak types, into global templates, from a file or a dictionary."""
    values: dict[str, Any] = {
        "count": 3,
        "weak": jnp.asarray(0.5),
        "w": np.arange(8, dtype=np.float32),
    }
    values["packed"] = values_of((8, 4), ml_dtypes.int4)
    values["keys"] = jax.random.split(jax.random.key(1), 4)
    if first():
        p2s.save_pytree(values, f"{folder}/file")
    connect(jax.devices()[::2])  # process 1 reads what process 0 wrote
    template = {
        "count": Struct((), np.int32, sharding=NamedSharding(mesh_of_four(), P())),
        "weak": Struct((), np.float32, sharding=NamedSharding(mesh_of_four(), P())),
        "w": spread(values["w"] * 0, P("y")),
        "packed": spread(values["packed"], P(None, "x")),
        "keys": spread(values["keys"], P("x")),
    }
    found = p2s.load_into_pytree(template, f"{folder}/file")
    given = p2s.set_weights(template, p2s.pytree2dict(values))
    assert found["weak"].aval.weak_type
    assert given["weak"].aval.weak_type
    for tree in found, given:
        for name, array in tree.items():
            assert not array.is_fully_addressable
            assert array.sharding.is_equivalent_to(template[name].sharding, array.ndim)
            expected = np.array(3, np.int32) if name == "count" else values[name]
            for shard in array.addressable_shards:
                assert raw(shard.data) == raw(expected[shard.index[: len(expected.shape)]])


def test_leaves_of_other_kinds_go_into_global_templates(pair: Group, tmp_path: Path) -> None:
    pair.run(load_other_leaves, tmp_path)


def load_elsewhere(folder: str) -> str:
    """Load leaves whose devices all belong to process 1, in both; return the error, if there is one."""
    values: dict[str, Any] = {
        "w": np.multiply.outer(np.arange(8.0, dtype=np.float32), np.arange(8.0, dtype=np.float32)),
        "packed": values_of((8, 4), ml_dtypes.int4),
        "keys": jax.random.split(jax.random.key(1), 4),
        "weak": jnp.asarray(0.5),
        "nothing": np.zeros((0, 4), np.int16),
    }
    if first():
        p2s.save_pytree(values, f"{folder}/file")
    connect(jax.devices()[::2])  # process 1 reads what process 0 wrote
    mesh = Mesh(np.array(devices_of(1)), ("x",))
    specs = {name: P() if name in {"weak", "nothing"} else P("x") for name in values}
    template = {
        name: Struct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, leaf in values.items()
    }
    rules = [p2s.Rule("@w", "@w", "a b -> b a"), p2s.Rule("{=}", "{=}")]  # w is symmetric
    try:
        loaded = [
            p2s.load_into_pytree(template, f"{folder}/file", rename=rename, mmap=mmap)
            for rename in (None, rules)
            for mmap in (False, True)
        ]
        given = p2s.set_weights(template, p2s.pytree2dict(values))
    except p2s.WeightsMismatchError as error:
        return str(error)
    assert all(tree["weak"].aval.weak_type for tree in (*loaded, given))
    for tree in *loaded, given:
        for name, array in tree.items():
            leaf, wanted = values[name], template[name]
            assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
            assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
            assert len(array.addressable_shards) == (0 if first() else 2)
            for shard in array.addressable_shards:
                assert raw(shard.data) == raw(leaf[shard.index[: leaf.ndim]])
    return ""


def test_leaves_whose_devices_belong_to_other_processes_have_no_shards(
    pair: Group, tmp_path: Path
) -> None:
    error, none = pair.run(load_elsewhere, tmp_path)
    assert none == ""
    assert bool(error) is not has_empty_arrays()
    assert not error or (
        "'@w': all devices of its template's sharding belong to other processes, and this JAX makes "
        "no such arrays; use JAX 0.7.1 or newer" in error
    )


def load_nothing(folder: str) -> list[Any]:
    """Load an array without elements by a rule, in one process alone."""
    if not first():
        return []
    p2s.save_pytree({"w": np.zeros((0, 4), np.float32)}, f"{folder}/file")
    sharding = NamedSharding(mesh_of_four(), P("x"))
    template = {"w": Struct((4, 0), np.float32, sharding=sharding)}
    rules = [p2s.Rule("@w", "@w", "a b -> b a")]
    found = p2s.load_into_pytree(template, f"{folder}/file", rename=rules)["w"]
    assert found.sharding == sharding
    return [found.shape, str(found.dtype)]


def test_arrays_without_elements_wait_for_no_other_process(pair: Group, tmp_path: Path) -> None:
    assert pair.run(load_nothing, tmp_path) == [[[4, 0], "float32"], []]


def count_bytes(folder: str) -> tuple[int, int]:
    """How many bytes this process reads of rows and of columns, and how many it has of each."""
    values = values_of((256, 65536), np.int8)  # with gaps too long to read
    if first():
        p2s.save_pytree([values], f"{folder}/file")
    connect(jax.devices()[::2])
    size = Path(folder, "file").stat().st_size
    counts = []
    for spec in P("x"), P(None, "x"):
        times = np.zeros(size, np.int8)
        original = _source.FileSource.read_into

        def read_into(source: Any, buffers: list[memoryview], offset: int) -> int:
            count = original(source, buffers, offset)
            times[offset : offset + count] += 1
            return count

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_source.FileSource, "read_into", read_into)
            template = [spread(values, spec)]
            (found,) = p2s.load_into_pytree(template, f"{folder}/file")
        assert_same_shards(found, template[0])
        assert times[1 << 16 :].max() == 1  # beyond what was read to find the header
        counts.append(int(times.sum()))
    return counts[0], counts[1]


def test_loading_reads_local_slices_only(pair: Group, tmp_path: Path) -> None:
    head = 1 << 16  # bytes, which are read to find the header
    for counts in pair.run(count_bytes, tmp_path):
        for count in counts:
            assert 256 * 65536 // 2 <= count <= 256 * 65536 // 2 + head


def count_opened(folder: str) -> int:
    """How many temporary files this process opens during a save."""
    values = values_of((8, 16))
    tree = {"everywhere": spread(values, P()), "rows": spread(values, P("x"))}
    opened = set()

    def act(call: Call) -> Any:
        if call.name == "open" and ".pytree2safetensors-" in str(call.args[0]):
            opened.add(Path(call.args[0]).name)
        return call.run()

    with watched(act):
        p2s.save_pytree(tree, folder, max_shard_size=100)
    return len(opened)


def test_a_process_opens_only_files_that_contain_its_shards(pair: Group, tmp_path: Path) -> None:
    # Process 0 writes both files and the index, and it has the shards of the replicated array.
    assert pair.run(count_opened, tmp_path / "m") == [3, 1]
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2


def measure_memory(folder: str) -> list[int]:
    """The most that saving and loading take on the host, beside what the tree itself takes."""
    peaks = []
    for spec, shape in (P("x"), (16384, 1024)), (P(None, "x"), (4096, 4096)):
        sharding = NamedSharding(mesh_of_four(), spec)
        shard = sharding.shard_shape(shape)
        blank = np.zeros(shard, np.float32)
        parts = [jax.device_put(blank, device) for device in jax.local_devices()]
        array = jax.make_array_from_single_device_arrays(shape, sharding, parts)
        tracemalloc.start()
        p2s.save_pytree([array], f"{folder}/file")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return peaks


def test_no_array_is_whole_in_the_memory_of_a_host(pair: Group, tmp_path: Path) -> None:
    for peaks in pair.run(measure_memory, tmp_path):
        for peak in peaks:
            assert peak < 16 << 20
    assert (tmp_path / "file").stat().st_size > 64 << 20


def make_numpy_of_a_global_array() -> str:
    try:
        p2s.set_weights({"rows": np.zeros((1024, 300), np.float32)}, {"@rows": large()["rows"]})
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_what_spans_processes_becomes_no_numpy_array(pair: Group) -> None:
    for told in pair.run(make_numpy_of_a_global_array):
        assert "non-addressable" in told


def tell_progress(folder: str) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    p2s.save_pytree(
        {**large(), "host": np.zeros(100_000)},
        f"{folder}/file",
        progress=lambda done, total: told.append((done, total)),
    )
    return told


def test_each_process_tells_of_its_own_progress(pair: Group, tmp_path: Path) -> None:
    ends = [told[-1] for told in pair.run(tell_progress, tmp_path)]
    assert all(done == total for done, total in ends)
    assert sum(total for _, total in ends) == (tmp_path / "file").stat().st_size


def save_under_a_mesh(folder: str) -> bool:
    if not hasattr(jax, "set_mesh"):
        return False
    with jax.set_mesh(mesh_of_four()):
        save_large(folder)
    return True


def test_a_mesh_in_force_does_not_matter(pair: Group, tmp_path: Path) -> None:
    if not all(pair.run(save_under_a_mesh, tmp_path)):
        pytest.skip("this JAX has no mesh in force")
    assert raw(p2s.load_pytree(tmp_path / "file")["columns"]) == raw(values_of((1024, 300)))


def replace_through_a_link(folder: str) -> None:
    save_large(folder + "/links")


def names_meanwhile(folder: str) -> list[str]:
    """The names in the folder of a link's target, during a save."""
    found = set[str]()

    def progress(*_: int) -> None:
        found.update(path.name for path in Path(folder, "files").iterdir())

    p2s.save_pytree(large(), f"{folder}/link", progress=progress)
    return sorted(found - {"target"})


def test_temporary_names_follow_from_the_target_of_a_link(pair: Group, tmp_path: Path) -> None:
    """By these names, a later save of one process finds what a killed one has left."""
    (tmp_path / "files").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "files" / "target")
    for names in pair.run(names_meanwhile, tmp_path):
        assert names
        assert all(name.startswith(temporary_prefix("target")) for name in names)


def test_links_and_permissions_stay(pair: Group, tmp_path: Path) -> None:
    for name in "links", "files":
        (tmp_path / name).mkdir()
    target = tmp_path / "files" / "target"
    p2s.save_pytree(OLD, target)
    target.chmod(0o640)
    (tmp_path / "links" / "file").symlink_to(target)
    pair.run(replace_through_a_link, tmp_path)
    assert (tmp_path / "links" / "file").is_symlink()
    assert set(p2s.load_pytree(target)) == {"rows", "columns"}
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["target"]


# --- options ----------------------------------------------------------------------------------


def small() -> dict[str, tuple[Any, Any]]:
    """Values of some kinds, and how they are spread."""
    found: dict[str, tuple[Any, Any]] = {
        f"{dtype} {number}": (values_of((8, 16), getattr(ml_dtypes, dtype, dtype)), spec)
        for dtype in ("int4", "bfloat16", "float32")
        for number, spec in enumerate(SPECS)
    }
    found["keys"] = (jax.random.split(jax.random.key(1), (8, 4)), P("x", "y"))
    found["rows"] = (values_of((1024, 300)), P(("x", "y")))
    found["columns"] = (values_of((1024, 300)), P(None, ("x", "y")))
    found["nothing"] = (np.zeros((0, 4), np.int16), P("x", "y"))
    return found


def save_small(folder: str, options: dict[str, Any], background: bool) -> None:
    """Save with both processes, and with one alone."""
    described = small()
    local = {"count": 7, "name": "a", "host": np.arange(70_000, dtype=np.int32), "none": None}
    tree = local | {name: spread(values, spec) for name, (values, spec) in described.items()}
    if background:
        p2s.save_pytree_async(tree, f"{folder}/together", **options).result()
    else:
        p2s.save_pytree(tree, f"{folder}/together", **options)
    if first():
        alone = local | {name: on_one_device(values) for name, (values, _) in described.items()}
        p2s.save_pytree(alone, f"{folder}/alone", **options)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shards", [None, "100kB", "1GB"])
@pytest.mark.parametrize("checksum", [False, True])
def test_every_option_gives_the_bytes_of_one_process(
    pair: Group, tmp_path: Path, background: bool, shards: str | None, checksum: bool
) -> None:
    options: dict[str, Any] = {"checksum": checksum, "metadata": {"run": "17"}}
    if shards is not None:
        (tmp_path / "alone").mkdir()
        options["max_shard_size"] = shards
    for durable in False, True:  # the second save replaces the first
        pair.run(save_small, tmp_path, options | {"durable": durable}, background)
        together, alone = contents_of(tmp_path / "together"), contents_of(tmp_path / "alone")
        assert together == alone
        assert (len(together) > 3) == (shards == "100kB")
    assert p2s.load_pytree(tmp_path / "together")["count"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def save_over_shards(folder: str) -> None:
    """Save shards together, and then one file to the same path."""
    tree = {name: spread(values, spec) for name, (values, spec) in small().items()}
    p2s.save_pytree(tree, f"{folder}/m.safetensors", max_shard_size="100kB")
    p2s.save_pytree(tree, f"{folder}/m.safetensors", checksum=True)


def test_one_file_replaces_the_shards_at_its_path(pair: Group, tmp_path: Path) -> None:
    pair.run(save_over_shards, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert p2s.load_pytree(tmp_path).keys() == small().keys()


RULES = [
    p2s.Rule("h.{l}.weight", "layers.kernel", "o i -> l i o"),
    p2s.Rule("h.{l}.bias", "layers.bias", "o -> l o"),
    p2s.Rule("joined", "{p:embed,host}", "(p a) b -> a b"),
    p2s.Rule("{=}", "{=}"),
]


def save_with_rules(folder: str, options: dict[str, Any], background: bool) -> None:
    """Save by rules with both processes, and with one alone."""
    described = {
        "layers": {
            "kernel": (values_of((4, 64, 48)), P("x", "y")),
            "bias": (values_of((4, 48)), P(None, "y")),
        },
        "embed": (values_of((128, 16)), P(("x", "y"))),
        "host": (values_of((128, 16)), None),
        "steps": (np.arange(6, dtype=np.int32), None),
    }

    def made(together: bool) -> Any:
        def make(leaf: Any) -> Any:
            values, spec = leaf
            return spread(values, spec) if together and spec is not None else values

        return jax.tree.map(make, described, is_leaf=lambda node: isinstance(node, tuple))

    save = p2s.save_pytree_async if background else p2s.save_pytree
    options = {"rename": RULES, **options}
    future = save(made(together=True), f"{folder}/together", **options)
    if background:
        future.result()  # type: ignore[union-attr] # which the other function does not return
    if first():
        p2s.save_pytree(made(together=False), f"{folder}/alone", **options)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shards", [None, "20kB"])
def test_rules_give_the_bytes_of_one_process(
    pair: Group, tmp_path: Path, shards: str | None, background: bool
) -> None:
    if shards is not None:
        (tmp_path / "alone").mkdir()
    options = {"max_shard_size": shards, "checksum": True}
    pair.run(save_with_rules, tmp_path, options, background)
    assert contents_of(tmp_path / "together") == contents_of(tmp_path / "alone")


# --- in one process ---------------------------------------------------------------------------


def test_one_process_spans_no_other() -> None:
    assert not calls.spans_processes([jnp.arange(3), np.arange(3), 1])

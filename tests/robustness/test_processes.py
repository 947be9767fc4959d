"""Several processes: two real ones, of two devices each, that save and load together.

Run as a script this file is one of them: it carries out the functions whose names are told it.
"""

import errno
import inspect
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

import pytree2safetensors as p2s
from pytree2safetensors._leaves import jax_versions
from pytree2safetensors._leaves.encode import host_shard
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._save import calls, joint, share
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._storage import descriptor as _file
from pytree2safetensors._storage import file_source as _source

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # whose constructor JAX leaves untyped
Struct: Any = jax.ShapeDtypeStruct

LIMIT = 180  # seconds for one step of both processes, on a machine with much else to do
OLD = {"old": np.arange(3, dtype=np.float32)}


# --- two processes ----------------------------------------------------------------------------

# The package is checked at run time here as it is in the tests.
START = (
    "import runpy, sys; from jaxtyping import install_import_hook as check; "
    "check('pytree2safetensors', 'beartype.beartype'); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Pair:
    """Two processes that carry out the functions of this file."""

    def __init__(self, folder: Path, heartbeat: int = 100) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = "--xla_force_host_platform_device_count=2"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.logs = [folder / f"process{rank}.log" for rank in range(2)]
        self.answers: list[queue.SimpleQueue[Any]] = []
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(2):
            with self.logs[rank].open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", START, __file__, str(rank), str(port), str(heartbeat)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    text=True,
                )
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=listen, args=(process, answers), daemon=True).start()
            self.processes.append(process)
            self.answers.append(answers)
        for ready in self.hear():
            if "lacks" in ready:
                self.end()
                pytest.skip(ready["lacks"])

    def hear(self) -> list[Any]:
        """What each process answers; {"ended": ...} where it has ended."""
        deadline = time.monotonic() + LIMIT
        found = []
        for answers in self.answers:
            try:
                found.append(answers.get(timeout=max(0, deadline - time.monotonic())))
            except queue.Empty:
                self.end()
                pytest.fail(f"no answer within {LIMIT} s\n{self.said()}", pytrace=False)
        return found

    def ask(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have both carry out a function."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([work.__name__, *map(plain, arguments)]) + "\n")
            process.stdin.flush()
        return self.hear()

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have both carry out a function, which must not fail; its results."""
        answers = self.ask(work, *arguments)
        for answer in answers:
            assert "result" in answer, answer.get("trace", answer)
        return [answer["result"] for answer in answers]

    def fail(self, work: Callable[..., Any], *arguments: Any) -> list[tuple[str, str]]:
        """Have both carry out a function, which must fail on both; the errors."""
        answers = self.ask(work, *arguments)
        for answer in answers:
            assert "error" in answer, answer
        return [(answer["error"], answer["message"]) for answer in answers]

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument


def listen(process: "subprocess.Popen[str]", answers: "queue.SimpleQueue[Any]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.startswith("{"):  # what JAX prints begins otherwise
                answers.put(json.loads(line))
    answers.put({"ended": process.wait()})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pair]]:
    pairs: list[Pair] = []
    yield pairs
    for pair in pairs:
        pair.end()


@pytest.fixture
def pair(shared: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two processes that are there already, unless a test has lost them."""
    alive = [one for one in shared if all(p.poll() is None for p in one.processes)]
    if not alive:
        alive = [Pair(tmp_path_factory.mktemp("pair"))]
        shared.extend(alive)
    return alive[-1]


@pytest.fixture
def mortals(tmp_path: Path) -> Iterator[Pair]:
    """Two processes of which a test may kill one."""
    (tmp_path / "logs").mkdir()
    pair = Pair(tmp_path / "logs", heartbeat=8)
    yield pair
    pair.end()


def main(rank: int, port: str, heartbeat: str) -> None:
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call] # JAX gives it no types
    except AttributeError:
        print(json.dumps({"lacks": "this JAX has no collectives between processes on the CPU"}))
        return
    start: Any = jax.distributed.initialize
    known = inspect.signature(start).parameters
    name = "heartbeat_timeout_seconds"  # which older JAX has not: there a death is noticed later
    limit = {name: int(heartbeat)} if name in known else {}
    start(f"127.0.0.1:{port}", num_processes=2, process_id=rank, **limit)
    assert (jax.process_count(), len(jax.local_devices()), len(jax.devices())) == (2, 2, 4)
    for local in range(2):
        connect([devices_of(process)[local] for process in range(2)])
    say({"ready": rank})
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            say({"result": globals()[name](*arguments)})
        except Exception as error:  # noqa: BLE001 - whatever it is, the test hears of it
            kind = f"{type(error).__module__}.{type(error).__name__}"
            trace = "".join(traceback_of(error))
            say({"error": kind, "message": str(error), "trace": trace})


def connect(devices: list[Any]) -> None:
    """Make the connection of one group of devices: older JAX makes two at once only with luck."""
    mesh = Mesh(np.array(devices), ("devices",))
    mine = [jax.device_put(np.zeros(1), device) for device in devices if is_mine(device)]
    spread = jax.make_array_from_single_device_arrays(
        (len(devices),), NamedSharding(mesh, P("devices")), mine
    )
    together = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))(spread)
    together.block_until_ready()


def is_mine(device: Any) -> bool:
    return bool(device.process_index == jax.process_index())


def devices_of(process: int) -> list[Any]:
    return [device for device in jax.devices() if device.process_index == process]


def traceback_of(error: BaseException) -> list[str]:
    import traceback

    return traceback.format_exception(error)


def say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


# --- trees ------------------------------------------------------------------------------------


def spread(values: Any, spec: Any, mesh: Mesh | None = None) -> jax.Array:
    """A global array: each process makes its own shards."""
    sharding = NamedSharding(mesh or mesh_of_four(), spec)
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    shards = [
        jax.device_put(values[index], device)  # of keys
        for device, index in sharding.addressable_devices_indices_map(values.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(values.shape, sharding, shards)


def mesh_of_four() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))


SPECS: list[Any] = [
    P("x"), P("y"), P(("x", "y")), P(None, "x"), P(None, "y"), P(None, ("y", "x")), P("x", "y"),
    P("y", "x"), P(),
]  # fmt: skip


def values_of(shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(len(shape)).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if dtype.name in {"int4", "uint4"}:
        return (bits[..., 0] % 8).astype(dtype)
    found: NDArray[Any] = (bits % 2 if dtype == np.bool_ else bits).view(dtype)[..., 0]
    return found


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


def on_one_device(values: Any) -> Any:
    """The same leaf, as one process has it."""
    return values if isinstance(values, jax.Array) else jnp.asarray(values)


def raw(array: Any) -> bytes:
    if not isinstance(array, np.ndarray) and jax.dtypes.issubdtype(  # type: ignore[attr-defined] # public, and not exported
        array.dtype, jax.dtypes.prng_key
    ):
        array = jax.random.key_data(array)
    values = np.asarray(array)
    packed = values.dtype.name in {"int4", "uint4"}  # half of each byte means nothing
    return (values.astype(np.int8) if packed else values).tobytes()


def assert_same_shards(found: jax.Array, expected: jax.Array) -> None:
    assert found.sharding == expected.sharding
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.aval.weak_type == expected.aval.weak_type
    pairs = list(zip(found.addressable_shards, expected.addressable_shards, strict=True))
    assert len(pairs) == 2
    for one, other in pairs:
        assert one.device == other.device
        assert raw(one.data) == raw(other.data)


@contextmanager
def with_x64() -> Iterator[None]:
    update: Any = jax.config.update
    update("jax_enable_x64", True)
    try:
        yield
    finally:
        update("jax_enable_x64", False)


def first() -> bool:
    return jax.process_index() == 0


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


def test_the_file_is_what_one_process_would_write(pair: Pair, tmp_path: Path) -> None:
    pair.run(save_everything, tmp_path)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]
    for mmap in False, True:
        assert set(pair.run(load_everything, tmp_path, mmap)) == {len(everything_names())}


def everything_names() -> list[str]:
    with with_x64():
        return list(everything())


def test_what_several_processes_saved_loads_anywhere(pair: Pair, tmp_path: Path) -> None:
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


def large() -> dict[str, jax.Array]:
    values = values_of((1024, 300))
    return {"rows": spread(values, P(("x", "y"))), "columns": spread(values, P(None, ("x", "y")))}


def save_large(folder: str) -> None:
    p2s.save_pytree(large(), f"{folder}/file")


def load_large(path: str) -> None:
    tree = large()
    found = p2s.load_into_pytree(tree, path)
    for name, array in tree.items():
        assert_same_shards(found[name], array)


def save_with_what_is_local(folder: str) -> None:
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
    p2s.save_pytree(tree, f"{folder}/file", metadata={"rank": str(rank) * (rank + 1) * 5000})


def test_what_is_no_global_array_comes_from_process_0(pair: Pair, tmp_path: Path) -> None:
    pair.run(save_with_what_is_local, tmp_path)
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


def test_a_tree_without_global_arrays_waits_for_nobody(pair: Pair, tmp_path: Path) -> None:
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
    assert found["weak"].aval.weak_type
    given = p2s.set_weights(template, p2s.pytree2dict(values))
    for tree in found, given:
        for name, array in tree.items():
            assert not array.is_fully_addressable
            assert array.sharding.is_equivalent_to(template[name].sharding, array.ndim)
            expected = np.array(3, np.int32) if name == "count" else values[name]
            for shard in array.addressable_shards:
                assert raw(shard.data) == raw(expected[shard.index[: len(expected.shape)]])


def test_leaves_of_other_kinds_go_into_global_templates(pair: Pair, tmp_path: Path) -> None:
    pair.run(load_other_leaves, tmp_path)


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


def test_loading_reads_local_slices_only(pair: Pair, tmp_path: Path) -> None:
    head = 1 << 16  # bytes, which are read to find the header
    for counts in pair.run(count_bytes, tmp_path):
        for count in counts:
            assert 256 * 65536 // 2 <= count <= 256 * 65536 // 2 + head


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


def test_no_array_is_whole_in_the_memory_of_a_host(pair: Pair, tmp_path: Path) -> None:
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


def test_what_spans_processes_becomes_no_numpy_array(pair: Pair) -> None:
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


def test_each_process_tells_of_its_own_progress(pair: Pair, tmp_path: Path) -> None:
    ends = [told[-1] for told in pair.run(tell_progress, tmp_path)]
    assert all(done == total for done, total in ends)
    assert sum(total for _, total in ends) == (tmp_path / "file").stat().st_size


def save_under_a_mesh(folder: str) -> bool:
    if not hasattr(jax, "set_mesh"):
        return False
    with jax.set_mesh(mesh_of_four()):
        save_large(folder)
    return True


def test_a_mesh_in_force_does_not_matter(pair: Pair, tmp_path: Path) -> None:
    if not all(pair.run(save_under_a_mesh, tmp_path)):
        pytest.skip("this JAX has no mesh in force")
    assert raw(p2s.load_pytree(tmp_path / "file")["columns"]) == raw(values_of((1024, 300)))


def replace_through_a_link(folder: str) -> None:
    save_large(folder + "/links")


def test_links_and_permissions_stay(pair: Pair, tmp_path: Path) -> None:
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


# --- failures ---------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that a save which fails must leave as it is, alone in its folder."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    p2s.save_pytree(OLD, folder / "file")
    before = (folder / "file").read_bytes()
    yield folder
    assert (folder / "file").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["file"]


def save_with(folder: str, what: str, where: int) -> None:
    """Save, and have one process fail in some way."""
    here = jax.process_index() == where
    tree: dict[str, Any] = large()
    options: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if what == "unsupported" and here:
            tree["function"] = print
        elif what == "key path" and here:
            tree["bad"] = {float("nan"): 1}  # which has no spelling
        elif what == "unsortable" and here:
            tree = {"tree": [tree], "keys": {1: 1, "one": 1}}  # which JAX cannot flatten
        elif what == "metadata" and here:
            options["metadata"] = {"pytree2safetensors": "mine"}
        elif what == "disk full" and here:

            def write_at(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(joint, "write_at", write_at)
        elif what == "bug" and here:
            patch.setattr(share, "owned_chunks", lambda *_: 1 / 0)
        elif what == "interrupt" and here:

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(joint, "write_at", interrupt)
        elif what == "deleted" and here:
            tree["rows"].delete()
        elif what == "commit" and here:

            def replace(*_: Any, **__: Any) -> None:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

            patch.setattr(os, "replace", replace)
        elif what == "progress" and here:
            options["progress"] = lambda *_: 1 / 0
        try:
            p2s.save_pytree(tree, f"{folder}/file", **options)
        except KeyboardInterrupt:
            raise RuntimeError("interrupted") from None


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("unsupported", "pytree2safetensors.UnsupportedLeafError", "'@function'"),
        ("key path", "pytree2safetensors.KeyPathError", "nan"),
        ("unsortable", "pytree2safetensors.TreeStructureError", "sort"),
        ("metadata", "pytree2safetensors.FileFormatError", "'pytree2safetensors'"),
        ("disk full", "builtins.OSError", os.strerror(errno.ENOSPC)),
        ("deleted", None, "deleted"),
        ("bug", None, "division by zero"),
        ("progress", None, "division by zero"),
        ("interrupt", None, "nterrupt"),
    ],
)
def test_an_error_on_one_is_raised_on_all(
    pair: Pair, old: Path, what: str, where: int, kind: str | None, message: str
) -> None:
    found = pair.fail(save_with, old, what, where)
    for error, text in found:
        assert message in text
        assert kind is None or error == kind
    assert f"process {where} could not save: " in found[1 - where][1]
    assert f"process {where} could not save: " not in found[where][1]


def test_a_commit_that_fails_is_an_error_on_all(pair: Pair, old: Path) -> None:
    for error, text in pair.fail(save_with, old, "commit", 0):
        assert error == "builtins.PermissionError"
        assert os.strerror(errno.EPERM) in text


def test_the_processes_go_on_after_an_error(pair: Pair, old: Path, tmp_path: Path) -> None:
    pair.fail(save_with, old, "disk full", 1)
    pair.run(save_large, tmp_path)
    assert set(p2s.load_pytree(tmp_path / "file")) == {"rows", "columns"}


def save_differently(folder: str, what: str) -> None:
    rank = jax.process_index()
    tree: dict[str, Any] = large()
    values = values_of((1024, 300))
    path, options = f"{folder}/file", dict[str, Any]()
    if what == "shape":
        tree["rows"] = spread(values_of((1024, 300 + 4 * rank)), P("x"))
    elif what == "dtype":
        tree["rows"] = spread(values.view([np.float32, np.int32][rank]), P("x"))
    elif what == "sharding":
        tree["rows"] = spread(values, [P("x"), P(None, "x")][rank])
    elif what == "order":
        tree["rows"] = spread(values, P("x"), mesh_in_order_of(rank))
    elif what == "name":
        tree[f"rank {rank}"] = np.zeros(3, np.float32)
    elif what == "structure":
        tree["some"] = [(), []][rank]
    elif what == "kind":
        tree["number"] = [1.5, np.float64(1.5)][rank]
    elif what == "int":
        tree["number"] = 7 + rank
    elif what == "str":
        tree["number"] = f"a {rank}"
    elif what == "global":
        tree["some"] = spread(np.zeros(4, np.float32), P("x")) if rank else np.zeros(4, np.float32)
    elif what == "path":
        path = f"{folder}/{['file', 'other'][rank]}"
    elif what == "durable":
        options["durable"] = bool(rank)
    p2s.save_pytree(tree, path, **options)


def mesh_in_order_of(process: int) -> Mesh:
    """A mesh that begins with the devices of a process."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index != process)
    return Mesh(np.array(devices).reshape(2, 2), ("x", "y"))


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("shape", "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 304] {} on process 1"),
        ("dtype", "'@rows' is F32[1024, 300] {} on process 0 and I32[1024, 300] {} on process 1"),
        (
            "sharding",
            "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 300] {} on process 1",
        ),
        ("order", "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 300] {} on process 1"),
        ("name", "'@rank 0' is F32[3] on process 0 and missing on process 1"),
        ("structure", "the node '@some' is tuple on process 0 and list on process 1"),
        ("kind", "'@number' is 1.5 on process 0 and F64[] on process 1"),
        ("int", "'@number' is 7 on process 0 and 8 on process 1"),
        ("str", "'@number' is ['str', 'a 0'] on process 0 and ['str', 'a 1'] on process 1"),
        ("global", "'@some' is F32[4] on process 0 and F32[4] {} on process 1"),
        ("path", "the name of the file is 'file' on process 0 and 'other' on process 1"),
        ("durable", "the option durable= is False on process 0 and True on process 1"),
    ],
)
def test_processes_that_differ_save_nothing(
    pair: Pair, old: Path, what: str, difference: str
) -> None:
    start, end = "the processes do not save the same: ", "; nothing was written; give all processes"
    pattern = re.escape(f"{start}{difference}{end}").replace(r"\{\}", "with shards [0-9a-f]{32}")
    for error, text in pair.fail(save_differently, old, what):
        assert error == "pytree2safetensors.FileFormatError"
        assert re.match(pattern, text), text


def save_elsewhere(folder: str, elsewhere: str) -> None:
    p2s.save_pytree(large(), f"{folder if first() else elsewhere}/file")


@pytest.mark.parametrize("exists", [False, True])
def test_a_process_that_does_not_see_the_folder(
    pair: Pair, old: Path, tmp_path: Path, exists: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if exists:
        elsewhere.mkdir()
    found = pair.fail(save_elsewhere, old, elsewhere)
    for error, text in found:
        assert error == "builtins.FileNotFoundError"
        assert str(elsewhere / "file") in text
    assert "process 1 could not save: " in found[0][1]
    assert not exists or not list(elsewhere.iterdir())


def save_to(path: Any) -> None:
    p2s.save_pytree(large(), io.BytesIO() if path is None else path)


@pytest.mark.parametrize("path", [None, os.devnull])
def test_several_processes_need_a_file_that_all_can_open(pair: Pair, path: str | None) -> None:
    for error, text in pair.fail(save_to, path):
        assert error == "pytree2safetensors.FileFormatError"
        assert "several processes save together into a regular file, or with max_shard" in text


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


def contents_of(path: Path) -> dict[str, bytes]:
    """The files of a save: one, or those of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shards", [None, "100kB", "1GB"])
@pytest.mark.parametrize("checksum", [False, True])
def test_every_option_gives_the_bytes_of_one_process(
    pair: Pair, tmp_path: Path, background: bool, shards: str | None, checksum: bool
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


def die_while_saving(folder: str, where: int, when: str) -> None:
    """Save, and have one process die: before it writes, after a part, or before the commit."""
    if jax.process_index() == where:

        def die(*_: Any) -> None:
            os.kill(os.getpid(), 9)

        original = _file.write_at
        calls: list[int] = []

        def write_at(*arguments: Any) -> None:
            original(*arguments)
            calls.append(1)
            if len(calls) == 2:
                die()

        if when == "at the end":
            pytest.MonkeyPatch().setattr(joint, "flush", die)
        else:
            pytest.MonkeyPatch().setattr(joint, "write_at", write_at)
    p2s.save_pytree(large(), f"{folder}/file")


@pytest.mark.parametrize(("where", "when"), [(0, "midway"), (1, "midway"), (1, "at the end")])
def test_where_a_process_dies_the_old_file_stays(
    mortals: Pair, tmp_path: Path, where: int, when: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    p2s.save_pytree(OLD, folder / "file")
    before = (folder / "file").read_bytes()
    answers = mortals.ask(die_while_saving, folder, where, when)
    assert answers[where] == {"ended": -9}
    # The other one is told by JAX, or ended by it.
    assert "error" in answers[1 - where] or "ended" in answers[1 - where], answers
    assert (folder / "file").read_bytes() == before
    assert raw(p2s.load_pytree(folder / "file")["old"]) == raw(OLD["old"])
    # A temporary may be there, which the next save is not hindered by.
    p2s.save_pytree({"new": 1}, folder / "file")
    assert p2s.load_pytree(folder / "file") == {"new": 1}


# --- saves that are not the same on all processes ---------------------------------------------


def save_replicated_over_meshes_in_another_order(folder: str) -> None:
    mesh = mesh_in_order_of(jax.process_index())
    tree = {
        "replicated": spread(values_of((1024, 300)), P(), mesh),
        "rows": spread(values_of((1024, 300)), P("x")),
    }
    p2s.save_pytree(tree, f"{folder}/file")


def test_who_owns_a_replica_does_not_follow_the_order_of_the_mesh(
    pair: Pair, tmp_path: Path
) -> None:
    pair.run(save_replicated_over_meshes_in_another_order, tmp_path)
    for array in p2s.load_pytree(tmp_path / "file").values():
        assert raw(array) == raw(values_of((1024, 300)))


def checkpoint(number: int) -> dict[str, Any]:
    """A tree like any other, of a number."""
    values = np.full((1024, 300), number, np.float32)
    return {"rows": spread(values, P(("x", "y"))), "columns": spread(values, P(None, ("x", "y")))}


def number_in(path: Path) -> int:
    """The number of a checkpoint, which must be no mixture."""
    tree = p2s.load_pytree(path)
    (number,) = set(np.unique(tree["rows"]).tolist()) | set(np.unique(tree["columns"]).tolist())
    return int(number)


def save_all(folder: str, names: list[str], at: str, number: int) -> list[str]:
    """Save checkpoints 0, 1, ... to these names; what happens at one of them on one process."""
    found = []
    for place, name in enumerate(names):
        tree, options = checkpoint(place), dict[str, Any]()
        path: Any = f"{folder}/{name}"
        with pytest.MonkeyPatch.context() as patch:
            if place == number:
                if at == "metadata":
                    options["metadata"] = 5
                elif at == "unknown option":
                    options["metdata"] = {}
                elif at == "progress":
                    options["progress"] = 5
                elif at == "path":
                    path = None
                elif at == "silent":  # interrupted before it begins
                    known = calls.present()
                    known.calls += 1
                    found.append("silent")
                    continue
                elif at in {"write", "vote", "outcome", "agree"}:
                    interrupt_in(at, patch)
            try:
                p2s.save_pytree(tree, path, **options)
                found.append("saved")
            except KeyboardInterrupt:
                found.append("interrupted")
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the test looks at its text
                found.append(f"{type(error).__name__}: {error}")
    return found


def interrupt_in(step: str, patch: pytest.MonkeyPatch) -> None:
    """Send this process a Ctrl-C while it writes, or waits in a step."""
    known: list[Interrupt] = []
    original = Interrupt.__init__

    def create(self: Interrupt) -> None:
        original(self)
        known.append(self)

    def interrupting(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if step == "write" or f"/{step}" in str(arguments[1]):
                patch.undo()
                os.kill(os.getpid(), signal.SIGINT)
                while not known[-1].received:  # it reaches the thread of the caller
                    time.sleep(0.01)
            return function(*arguments)

        return call

    patch.setattr(Interrupt, "__init__", create)
    if step == "write":
        patch.setattr(joint, "write_at", interrupting(_file.write_at))
    else:
        keys = jax_versions.CoordinationKeys
        patch.setattr(keys, "wait", interrupting(keys.wait))


def save_on_both(folder: str, orders: list[list[str]], at: str, where: int, number: int) -> Any:
    rank = jax.process_index()
    return save_all(folder, orders[rank], at if rank == where else "nothing", number)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("at", ["metadata", "unknown option", "progress", "path"])
def test_a_wrong_argument_on_one_is_an_error_on_all(
    pair: Pair, tmp_path: Path, where: int, at: str
) -> None:
    found = pair.run(save_on_both, tmp_path, [["a", "b", "c"]] * 2, at, where, 1)
    for process, said in enumerate(found):
        assert [word == "saved" for word in said] == [True, False, True]
        assert (f"process {where} could not save: " in said[1]) == (process != where)
    assert [number_in(tmp_path / name) for name in "ac"] == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("where", [0, 1])
def test_a_call_that_only_one_knows_of_fails_on_all(pair: Pair, tmp_path: Path, where: int) -> None:
    found = pair.run(save_on_both, tmp_path, [["a", "b", "c"]] * 2, "silent", where, 1)
    assert [said[0] for said in found] == ["saved", "saved"]
    assert found[where][1] == "silent"
    assert "begins save" in found[1 - where][1]
    assert [said[2] for said in found] == ["saved", "saved"]
    assert [number_in(tmp_path / name) for name in "ac"] == [0, 2]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("at", ["write", "agree", "vote", "outcome"])
def test_an_interrupt_on_one(pair: Pair, tmp_path: Path, where: int, at: str) -> None:
    if at == ("outcome", "vote")[where]:
        return  # process 0 waits for votes, process 1 for the outcome
    found = pair.run(save_on_both, tmp_path, [["a", "a", "b"]] * 2, at, where, 1)
    assert found[where] == ["saved", "interrupted", "saved"]
    other = found[1 - where]
    assert (other[0], other[2]) == ("saved", "saved")
    if at == "outcome":  # process 1 has voted: this part of the save is done
        assert other[1] == "saved"
    else:
        assert f"process {where} could not save: " in other[1]
    assert number_in(tmp_path / "a") == (at == "outcome")
    assert number_in(tmp_path / "b") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_saves_in_another_order_are_an_error_on_all(pair: Pair, tmp_path: Path) -> None:
    orders = [["params", "average", "last"], ["average", "params", "last"]]
    for said in pair.run(save_on_both, tmp_path, orders, "nothing", 0, 0):
        assert "the name of the file is 'params' on process 0 and 'average' on process 1" in said[0]
        assert "the name of the file is 'average' on process 0 and 'params' on process 1" in said[1]
        assert said[2] == "saved"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def save_local_here_and_global_there(folder: str) -> list[str]:
    """Process 0 saves one tree more."""
    found = save_all(folder, ["a"], "nothing", 0)
    if first():
        found += save_all(folder, ["local"], "nothing", 0)
    return [*found, *save_all(folder, ["b"] if first() else ["b", "end"], "nothing", 0)]


def test_one_save_more_on_one_is_an_error_on_all(pair: Pair, tmp_path: Path) -> None:
    zero, one = pair.run(save_local_here_and_global_there, tmp_path)
    assert zero[0] == one[0] == "saved"
    for words in zero[1:] + one[1:]:
        assert words.startswith("FileFormatError: the processes do not save the same: the name of")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- pieces, in one process -------------------------------------------------------------------


def test_pieces_are_joined_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_SMALL", 4)
    monkeypatch.setattr(share, "_JOINED", 8)
    monkeypatch.setattr(share, "_LARGEST", 16)
    content = bytes(range(100))
    ranges = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 50), (50, 52), (60, 61), (61, 64), (80, 84)]
    pieces = ((start, memoryview(content)[start:stop]) for start, stop in ranges)
    found = [(start, start + len(piece), bytes(piece)) for start, piece in share._arranged(pieces)]
    assert [(start, stop) for start, stop, _ in found] == [
        (0, 9), (9, 12), (12, 28), (28, 44), (44, 50), (50, 52), (60, 64), (80, 84),
    ]  # fmt: skip
    assert all(piece == content[start:stop] for start, stop, piece in found)


def test_nothing_is_needed_of_one_process() -> None:
    assert not calls.is_needed([jnp.arange(3), np.arange(3), 1])


def test_shards_on_the_host_leave_no_copy_behind() -> None:
    data: Any = jnp.arange(TAKEN_OVER).astype(jnp.int4)  # which is packed on any device
    assert raw(host_shard(data)) == raw(np.asarray(jnp.array(data)))
    assert data._npy_value is None  # where JAX keeps it


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

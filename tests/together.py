"""Processes that save and load together, for tests: a few real ones, which talk through jax.distributed.

Run as a script this file is one of them: it carries out functions of test modules.
"""

import importlib.util
import inspect
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

import pytree2safetensors as p2s

P: Any = PartitionSpec  # JAX gives its constructor no types

LIMIT = 180  # seconds for one step of all processes, on a machine with much else to do

# The package is checked at run time here as it is in the tests. A shell starts what runs in the
# background with interrupts ignored, which Python would keep.
START = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from jaxtyping import install_import_hook as check; "
    "'JAXTYPING_DISABLE' in os.environ or check('pytree2safetensors', 'beartype.beartype'); "
    "sys.path.insert(0, sys.argv[1]); "
    "import together; together.main(*map(int, sys.argv[2:]))"
)


class Group:
    """Processes that carry out functions of test modules."""

    def __init__(self, count: int, devices: int, heartbeat: int = 100) -> None:
        if os.name == "nt":
            pytest.skip("JAX has no collectives between processes on the CPU of Windows")
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.logs = [Path(self.folder.name, f"process{rank}.log") for rank in range(count)]
        self.answers: list[queue.SimpleQueue[Any]] = []
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(count):
            numbers = rank, count, devices, port, heartbeat
            with self.logs[rank].open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", START, str(Path(__file__).parent), *map(str, numbers)],
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
            if "ready" not in ready:
                said = self.said()
                self.end()
                pytest.fail(f"a process did not start: {ready}\n{said}", pytrace=False)

    def hear(self) -> list[Any]:
        """What each process answers; {"ended": ...} where it has ended."""
        deadline = time.monotonic() + LIMIT
        found = []
        for answers in self.answers:
            try:
                found.append(answers.get(timeout=max(0, deadline - time.monotonic())))
            except queue.Empty:
                said = self.said()
                self.end()
                pytest.fail(f"no answer within {LIMIT} s\n{said}", pytrace=False)
        return found

    def ask(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have all carry out a function."""
        words = [inspect.getfile(work), work.__name__, *map(plain, arguments)]
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        return self.hear()

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have all carry out a function, which must not fail; its results."""
        answers = self.ask(work, *arguments)
        for answer in answers:
            assert "result" in answer, answer.get("trace", answer)
        return [answer["result"] for answer in answers]

    def fail(self, work: Callable[..., Any], *arguments: Any) -> list[tuple[str, str]]:
        """Have all carry out a function, which must fail on all; the errors."""
        answers = self.ask(work, *arguments)
        for answer in answers:
            assert "error" in answer, answer
        return [(answer["error"], answer["message"]) for answer in answers]

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def end(self) -> None:
        for process in reversed(self.processes):  # without process 0, JAX ends the others
            assert process.stdin is not None
            with suppress(OSError):  # it has ended already
                process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()


def plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument


def listen(process: "subprocess.Popen[str]", answers: "queue.SimpleQueue[Any]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.startswith("{"):  # what JAX prints begins otherwise
                answers.put(json.loads(line))
    answers.put({"ended": process.wait()})


_groups: dict[tuple[int, int], Group] = {}


def group_of(count: int, devices: int) -> Group:
    """Return processes that an earlier test started, or start new ones."""
    group = _groups.get((count, devices))
    if group is not None and any(process.poll() is not None for process in group.processes):
        group.end()
        group = None
    if group is None:
        group = _groups[count, devices] = Group(count, devices)
    return group


def end_all() -> None:
    while _groups:
        _groups.popitem()[1].end()


def main(rank: int, count: int, devices: int, port: int, heartbeat: int) -> None:
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call] # JAX gives it no types
    except AttributeError:
        print(json.dumps({"lacks": "this JAX has no collectives between processes on the CPU"}))
        return
    start: Any = jax.distributed.initialize
    known = inspect.signature(start).parameters
    name = "heartbeat_timeout_seconds"  # older JAX lacks this, and notices a death later
    limit = {name: heartbeat} if name in known else {}
    start(f"127.0.0.1:{port}", num_processes=count, process_id=rank, **limit)
    assert (jax.process_count(), len(jax.local_devices())) == (count, devices)
    for local in range(devices):
        connect([devices_of(process)[local] for process in range(count)])
    say({"ready": rank})
    for line in sys.stdin:
        file, name, *arguments = json.loads(line)
        try:
            say({"result": getattr(module_of(file), name)(*arguments)})
        except Exception as error:  # noqa: BLE001 - whatever it is, the test hears of it
            kind = f"{type(error).__module__}.{type(error).__name__}"
            trace = "".join(traceback.format_exception(error))
            say({"error": kind, "message": str(error), "trace": trace})
    os._exit(0)  # JAX would wait for processes that have died


@lru_cache
def module_of(file: str) -> Any:
    """The test module in a file."""
    name = Path(file).stem
    if name == __name__:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def first() -> bool:
    return jax.process_index() == 0


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


def arrays_of(number: int) -> dict[str, NDArray[Any]]:
    """The values of a checkpoint."""
    return dict.fromkeys(("rows", "columns"), np.full((1024, 300), number, np.float32))


def checkpoint(number: int) -> dict[str, Any]:
    """A tree that differs for each number."""
    specs = {"rows": P(("x", "y")), "columns": P(None, ("x", "y"))}
    return {name: spread(values, specs[name]) for name, values in arrays_of(number).items()}


def number_in(path: Path) -> int:
    """Return the number of a checkpoint, and assert that it is not a mixture."""
    tree = p2s.load_pytree(path)
    (number,) = set(np.unique(tree["rows"]).tolist()) | set(np.unique(tree["columns"]).tolist())
    return int(number)


def mesh_in_order_of(process: int) -> Mesh:
    """A mesh that begins with the devices of a process."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index != process)
    return Mesh(np.array(devices).reshape(2, 2), ("x", "y"))


def contents_of(path: Path) -> dict[str, bytes]:
    """The files of a save: one, or those of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in path.iterdir()}

"""Save or load one tree once, in a process of its own, and print what that took.

The driver passes a task as JSON in the only argument. What is printed: `READY` when the tree is there, the system is
warm and the memory is backed; `START` and `END` around the work, after the driver's answer; `RESULT` and JSON at last.
"""

import gc
import json
import mmap
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from systems import SYSTEMS, System
from workloads import WORKLOADS, fill, nbytes, numpy_leaves

PAGE = 4096
TRIES = 5
WARM = 0.25 / 2**30  # seconds for a byte


def touch(size: int) -> float:
    """Allocate memory, touch it, give it back, and return how long the touching took."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = time.perf_counter()
        np.frombuffer(memory, np.uint8)[::PAGE] = 1
        return time.perf_counter() - start


def back_memory(size: int) -> None:
    """Have the machine below back the memory that is about to be used.

    On a virtual machine the first touch of memory that the host has not given yet costs twenty times
    what the next one does, and the host takes back what is free. Without this the figures would be
    the hypervisor's.
    """
    for _ in range(TRIES):
        if touch(size) < WARM * size:
            return


def status(field: str) -> int:
    """Read a size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def warm_up(system: System, writer: System, skeleton: Any, op: str) -> None:
    """Let a small tree pay for what the first call pays: imports, caches, threads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small"
        writer.save(writer.prepare(fill(skeleton)), path)
        if op == "load":
            jax.block_until_ready(system.load(path, system.template(skeleton)))


def read_through(path: Path) -> None:
    """Bring the files into the page cache."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for name in files:
        with name.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def measure(act: Any) -> tuple[dict[str, float], Any]:
    """Run `act` once, and return wall and CPU seconds, the peak of memory over what was there, and its result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    memory = status("VmRSS")
    print("START", status("RssAnon"), flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    result = act()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "wall": wall,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": status("VmHWM") - memory,
    }
    print("END", flush=True)
    return figures, result


def same_bits(leaves: list[Any], skeleton: Any) -> bool:
    """Compare what was loaded with what was saved; arrays of JAX, of the right dtype, of the same bits."""
    expected = numpy_leaves(skeleton)
    if len(leaves) != len(expected):
        return False
    for leaf, array in zip(leaves, expected, strict=True):
        found = np.asarray(leaf)
        if (
            found.dtype != array.dtype
            or found.shape != array.shape
            or found.tobytes() != array.tobytes()
        ):
            return False
    return True


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task."""
    system, workload = SYSTEMS[task["system"]], WORKLOADS[task["workload"]]
    writer = SYSTEMS[system.written_by or task["system"]]
    skeleton, path = workload.skeleton(task["scale"]), Path(task["path"])
    warm_up(system, writer, workload.skeleton(system.warm_up or workload.warm_up), task["op"])
    if task["op"] == "save":
        prepared = system.prepare(fill(skeleton))

        def act() -> Any:
            system.save(prepared, path)
    else:
        template = system.template(skeleton)
        read_through(path)

        def act() -> Any:
            return jax.block_until_ready(system.load(path, template))

    print("READY", flush=True)
    sys.stdin.readline()
    back_memory(int(task["memory"] * nbytes(skeleton)) + (64 << 20))
    figures, result = measure(act)
    if task["op"] == "load" and task["check"]:
        leaves = system.leaves(result, skeleton)
        figures["jax"] = all(isinstance(leaf, jax.Array) for leaf in leaves)
        figures["same"] = same_bits(leaves, skeleton)
    return figures


if __name__ == "__main__":
    answer = run(json.loads(sys.argv[1]))
    print("RESULT", json.dumps(answer), flush=True)
    os._exit(0)  # no library's farewell may keep the driver waiting

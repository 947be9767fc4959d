"""Measure one thing on the first device, in a process of its own, and print it.

The driver passes a task as JSON in the only argument. What is printed: `START` and the bytes of memory in use when
all is prepared, `END` after the work, where something is compared then, `RESULT` and JSON at last.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_systems import (
    PIECE,
    READERS,
    SYSTEMS,
    in_pinned_memory,
    names_of,
    pinned_memory,
    read,
)
from driver import HOST_MEMORY, memory_of, remove

BLOCK = 64 << 20
LIMIT_BYTES = 2 << 30  # of each limit's measurement
AGAIN = 4  # runs after the first, at most,
SECONDS = 8.0  # and none after these
STEP = 8192  # rows of the matrix that a step multiplies
STEPS = 100


def model(nbytes: int) -> Any:
    """Describe a transformer of some size in bfloat16, with the shapes of one of 7 billion parameters."""
    wide, hidden, words = (4096, 11008, 32000) if nbytes >= 1 << 30 else (512, 1376, 4000)

    def weight(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {
        "attention": {name: weight(wide, wide) for name in ("query", "key", "value", "out")},
        "mlp": {
            "gate": weight(hidden, wide),
            "up": weight(hidden, wide),
            "down": weight(wide, hidden),
        },
        "norms": [weight(wide), weight(wide)],
    }
    ends = {"embed": weight(words, wide), "head": weight(words, wide), "norm": weight(wide)}
    layers = max(1, round((nbytes - size_of(ends)) / size_of(layer)))
    return ends | {"layers": [layer] * layers}


def small(leaves: int) -> Any:
    """Describe small leaves of float32, of three shapes."""
    shapes = {"kernel": (16, 32), "bias": (32,), "scale": (16,)}
    block = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {"blocks": [block] * -(-leaves // len(block))}


def size_of(template: Any) -> int:
    """Count the bytes of data."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))


def bits(position: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Make random bits of a dtype."""
    kind = jnp.uint16 if dtype == jnp.bfloat16 else jnp.uint32
    return jax.random.bits(jax.random.key(position), shape, kind).view(dtype)


def fill(template: Any) -> Any:
    """Make the tree on the device, always with the same bits."""
    make = jax.jit(bits, static_argnums=(1, 2))
    leaves, treedef = jax.tree.flatten(template)
    made = [make(i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.block_until_ready(jax.tree.unflatten(treedef, made))


def same(loaded: Any, template: Any) -> bool:
    """Compare, on the device, the bits of what was loaded with those that were saved."""

    @jax.jit
    def equal(so_far: Any, position: Any, found: Any) -> Any:
        wanted = bits(position, found.shape, found.dtype)
        kind = jnp.uint16 if found.dtype == jnp.bfloat16 else jnp.uint32
        return so_far & (found.view(kind) == wanted.view(kind)).all()

    found = dict(zip(names_of(loaded), jax.tree.leaves(loaded), strict=True))
    specs = dict(zip(names_of(template), jax.tree.leaves(template), strict=True))
    if found.keys() != specs.keys():
        return False
    device = jax.devices()[0]
    answer = jnp.array(True)
    for i, (name, spec) in enumerate(specs.items()):
        leaf = found[name]
        if not isinstance(leaf, jax.Array) or leaf.devices() != {device}:
            return False
        if (leaf.shape, leaf.dtype) != (spec.shape, spec.dtype):
            return False
        answer = equal(answer, i, leaf)
    return bool(answer)


def rounds(
    act: Callable[[], Any], between: Callable[[], None] = lambda: None
) -> tuple[list[float], Any]:
    """Run `act` once and, while there is time, again; return the seconds of each run, and the last result."""
    found: list[float] = []
    result = None
    while not found or (len(found) <= AGAIN and sum(found) < SECONDS):
        if found:
            result = None  # the device need not hold two
            between()
        start = time.perf_counter()
        result = act()
        found.append(time.perf_counter() - start)
    return found, result


def started() -> None:
    """Tell the driver to watch the memory from here on."""
    print("START", memory_of(os.getpid(), HOST_MEMORY), flush=True)


def save(task: dict[str, Any], path: Path, template: Any) -> dict[str, Any]:
    """Save the tree to the same path, again and again; the last file stays."""
    tree = fill(template)
    system = SYSTEMS[task["system"]]()

    def renew() -> None:
        """Make new arrays: JAX may keep host copies inside the saved ones."""
        nonlocal tree
        remove(path)
        tree = jax.block_until_ready(jax.tree.map(jnp.copy, tree))

    started()
    seconds, _ = rounds(lambda: system.save(tree, path, task["folder"]), renew)
    return {"seconds": seconds}


def load(task: dict[str, Any], path: Path, template: Any) -> dict[str, Any]:
    """Load the tree again and again, from the page cache."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template
    )
    read_through(path)
    system = SYSTEMS[task["system"]]()
    started()
    seconds, loaded = rounds(lambda: jax.block_until_ready(system.load(path, placed)))
    print("END", flush=True)
    return {"seconds": seconds, "same": same(loaded, template)}


def read_through(path: Path) -> None:
    """Bring files into the page cache."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    with ThreadPoolExecutor(READERS) as pool:
        for name in files:
            with name.open("rb", buffering=0) as file:
                read_piece = partial(os.pread, file.fileno(), PIECE)
                deque(pool.map(read_piece, range(0, name.stat().st_size, PIECE)), maxlen=0)


def limits(_task: dict[str, Any], path: Path, _template: Any) -> dict[str, Any]:
    """Measure what bounds every load and save of this machine."""
    pinned, memory = pinned_memory(BLOCK)
    device, host = jax.sharding.SingleDeviceSharding(jax.devices()[0]), in_pinned_memory()
    on_device = jax.block_until_ready(jax.device_put(np.zeros(BLOCK, np.uint8), device))
    blocks = LIMIT_BYTES // BLOCK if jax.devices()[0].platform != "cpu" else 4
    started()

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, blocks * BLOCK)
            for _ in range(blocks):
                file.write(memory)

    writes, _ = rounds(write, lambda: remove(path))
    with path.open("rb") as file, ThreadPoolExecutor(READERS) as pool:
        staging = np.zeros(4 * BLOCK, np.uint8)

        def read_all() -> None:
            for start in range(0, blocks * BLOCK, len(staging)):
                read(pool, file.fileno(), staging, start)

        reads, _ = rounds(read_all)

    def up() -> None:
        jax.block_until_ready([jax.device_put(pinned, device) for _ in range(blocks)])

    def down() -> None:
        for _ in range(blocks // 4):
            jax.block_until_ready([jax.device_put(on_device, host) for _ in range(4)])

    seconds = {
        "to the device": rounds(up)[0],
        "from the device": rounds(down)[0],
        "reads": reads,
        "writes": writes,
    }
    return {"seconds": seconds, "bytes": blocks * BLOCK}


def background(_task: dict[str, Any], path: Path, template: Any) -> dict[str, Any]:
    """Save in the background, twice, while steps run that use the device; the second time donate at once."""
    import pytree2safetensors

    tree = fill(template)
    rows = STEP if jax.devices()[0].platform != "cpu" else STEP // 16
    weights = jnp.full((rows, rows), 1 / rows, jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ weights @ weights)
    donate = jax.jit(lambda x: x * 0, donate_argnums=0)

    def step() -> float:
        start = time.perf_counter()
        jax.block_until_ready(multiply(weights))
        return time.perf_counter() - start

    alone = [step() for _ in range(STEPS)][STEPS // 10 :]
    started()
    saves = []
    for last in (False, True):
        remove(path)
        start = time.perf_counter()
        future = pytree2safetensors.save_pytree_async(tree, path, durable=False)
        call = time.perf_counter() - start
        if last:
            tree = jax.tree.map(donate, tree)
        during = [step()]
        while not future.done():
            during.append(step())
        future.result()
        total = time.perf_counter() - start
        saves.append({"call": call, "total": total, "step": median(during), "slowest": max(during)})
    print("END", flush=True)
    loaded = pytree2safetensors.load_pytree(path)
    steps = {"step": median(alone), "slowest": max(alone)}
    return {"saves": saves, "same": same(loaded, template)} | steps


def main() -> None:
    """Do one task."""
    task = json.loads(sys.argv[1])
    path = Path(task["path"])
    # The first use of a device costs seconds and gigabytes of its own.
    jax.block_until_ready(jnp.zeros(1) + 1)
    nbytes = task["bytes"] // 2 if task["op"] == "background" else task["bytes"]
    template = small(task["leaves"]) if task["workload"] == "small" else model(nbytes)
    acts = {"save": save, "load": load, "limits": limits, "background": background}
    answer = {"bytes": size_of(template)} | acts[task["op"]](task, path, template)
    print("RESULT", json.dumps(answer), flush=True)
    os._exit(0)  # no library's farewell may keep the driver waiting


if __name__ == "__main__":
    main()

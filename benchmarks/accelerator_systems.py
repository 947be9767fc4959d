"""How each library saves a tree that is on an accelerator, and loads it onto one.

A template is a tree of `jax.ShapeDtypeStruct`. `by hand` is what a careful programmer would write for one known file:
it knows neither trees nor folders, checks nothing, and shows what can be reached.
"""

import ctypes
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

SHARD = "5GB"
READERS = min(16, os.cpu_count() or 1)
PIECE = 4 << 20
STAGING = 256 << 20  # bytes: each of two buffers to load through, and what a save has in flight


def names_of(tree: Any) -> list[str]:
    """Name the leaves in order, as keys of a flat dict."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


class Ours:
    """This library."""

    def __init__(self) -> None:
        from pytree2safetensors import load_pytree, save_pytree

        self.load_pytree, self.save_pytree = load_pytree, save_pytree

    def save(self, tree: Any, path: Path, folder: bool) -> None:
        self.save_pytree(tree, path, durable=False, max_shard_size=SHARD if folder else None)

    def load(self, path: Path, _template: Any) -> Any:
        return self.load_pytree(path)


class Flax:
    """safetensors.flax, whose arrays are handed to the device."""

    def __init__(self) -> None:
        from safetensors.flax import load_file, save_file

        self.load_file, self.save_file = load_file, save_file

    def save(self, tree: Any, path: Path, _folder: bool) -> None:
        self.save_file(dict(zip(names_of(tree), jax.tree.leaves(tree), strict=True)), path)

    def load(self, path: Path, template: Any) -> Any:
        found = jax.device_put(self.load_file(path), jax.devices()[0])
        leaves = [found[name] for name in names_of(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)


class Orbax:
    """orbax.checkpoint.StandardCheckpointer, waited for; it writes folders."""

    def __init__(self) -> None:
        from orbax.checkpoint import StandardCheckpointer

        self.checkpointer = StandardCheckpointer

    def save(self, tree: Any, path: Path, _folder: bool) -> None:
        with self.checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)

    def load(self, path: Path, template: Any) -> Any:
        with self.checkpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), template)


class ByHand:
    """Two pinned buffers that threads fill while the other one travels; pinned copies to write from."""

    def save(self, tree: Any, path: Path, _folder: bool) -> None:
        leaves = jax.tree.leaves(tree)
        header, offset = {}, 0
        for name, leaf in zip(names_of(tree), leaves, strict=True):
            shape, stop = list(leaf.shape), offset + leaf.nbytes
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
            file.write(len(text).to_bytes(8, "little") + text)
            for leaf in _through_pinned(leaves):
                data = memoryview(np.asarray(leaf).reshape(-1).view(np.uint8))
                while data:
                    data = data[file.write(data) :]

    def load(self, path: Path, template: Any) -> Any:
        device, found = jax.devices()[0], {}
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(READERS) as pool:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            buffers = [pinned_memory(STAGING) for _ in range(2)]
            busy: list[Any] = [None, None]
            for turn, batch in enumerate(_batches(header)):
                _, memory = buffers[turn % 2]
                jax.block_until_ready(busy[turn % 2])
                start = header[batch[0]]["data_offsets"][0]
                stop = header[batch[-1]]["data_offsets"][1]
                read(pool, file.fileno(), memory[: stop - start], 8 + size + start)
                views = [_view(memory, header[name], start) for name in batch]
                busy[turn % 2] = jax.device_put(views, device)
                found.update(zip(batch, busy[turn % 2], strict=True))
        return jax.tree.unflatten(
            jax.tree.structure(template), [found[name] for name in names_of(template)]
        )


def _batches(header: dict[str, Any]) -> Iterator[list[str]]:
    """Divide the tensors, in the order of their data, into batches that fit a buffer."""
    batch: list[str] = []
    first = 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        start, stop = header[name]["data_offsets"]
        if batch and stop - first > STAGING:
            yield batch
            batch = []
        first = first if batch else start
        batch.append(name)
    yield batch


def _view(memory: Any, entry: dict[str, Any], start: int) -> Any:
    dtype = np.dtype({"BF16": jax.numpy.bfloat16, "F32": np.float32}[entry["dtype"]])
    part = memory[entry["data_offsets"][0] - start : entry["data_offsets"][1] - start]
    view = part.view(dtype).reshape(entry["shape"])
    return view if jax.devices()[0].platform != "cpu" else view.copy()  # a CPU would share it


def _through_pinned(arrays: list[Any]) -> Iterator[Any]:
    """Yield each array in pinned host memory, with the next ones on their way."""
    pinned = in_pinned_memory()
    queue: deque[Any] = deque()
    flying = 0
    for array in arrays:
        while queue and flying + array.nbytes > STAGING:
            flying -= queue[0].nbytes
            yield queue.popleft()
        queue.append(jax.device_put(array, pinned))
        flying += array.nbytes
    while queue:
        yield queue.popleft()


def in_pinned_memory() -> jax.sharding.Sharding:
    """Say where memory is that the device reads and writes by itself."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def pinned_memory(size: int) -> tuple[Any, Any]:
    """Allocate pinned memory; return the array of JAX that keeps it, and the same as NumPy's, to be written."""
    array = jax.block_until_ready(jax.device_put(np.zeros(size, np.uint8), in_pinned_memory()))
    address = np.asarray(array).ctypes.data
    return array, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def read(pool: ThreadPoolExecutor, descriptor: int, memory: Any, offset: int) -> None:
    """Fill memory from a file, with all threads."""
    view = memoryview(memory)

    def piece(start: int) -> None:
        stop = min(start + PIECE, len(view))
        while start < stop:
            start += os.preadv(descriptor, [view[start:stop]], offset + start)

    list(pool.map(piece, range(0, len(view), PIECE)))


SYSTEMS: dict[str, Any] = {  # a system imports its library when it is made
    "pytree2safetensors": Ours,
    "safetensors.flax": Flax,
    "orbax": Orbax,
    "by hand": ByHand,
}

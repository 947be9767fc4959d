"""What is measured: how each library saves a tree and loads it again.

`prepare` and `template` are what a caller has at hand before he saves or loads, so they are not measured. A system that
needs no template gets none. All loads end in JAX arrays, since that is what their callers want; `leaves` puts them
in the order of the tree, for the check.
"""

import mmap
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

TREES = ("large", "model", "many", "state")
SHARDED = ("rows", "columns")


class System:
    """One way to save a tree and load it again."""

    saves = True
    loads = True
    workloads = TREES
    written_by = ""
    warm_up = 0.0  # the scale of the tree before, where it is not the workload's own
    environment = "here"

    def prepare(self, tree: Any) -> Any:
        """Return what `save` gets for a tree."""
        return tree

    def save(self, prepared: Any, path: Path) -> None:
        """Write the file, or the folder, at `path`."""
        raise NotImplementedError

    def template(self, skeleton: Any) -> Any:
        """Return what `load` gets beside the path."""
        return skeleton

    def load(self, path: Path, template: Any) -> Any:
        """Read what `save` wrote."""
        raise NotImplementedError

    def leaves(self, loaded: Any, _skeleton: Any) -> list[Any]:
        """Return the loaded arrays in the order of the skeleton's leaves."""
        return jax.tree.leaves(loaded)


class Ours(System):
    """This library; the template is given where the tree has namedtuples."""

    def __init__(self, template: bool | None = None, **options: Any) -> None:
        self.with_template = template
        self.options = options

    def save(self, prepared: Any, path: Path) -> None:
        import pytree2safetensors

        pytree2safetensors.save_pytree(prepared, path, durable=False)

    def template(self, skeleton: Any) -> Any:
        plain = all(type(node) in (dict, list) for node in _nodes(skeleton))
        wanted = not plain if self.with_template is None else self.with_template
        return skeleton if wanted else None

    def load(self, path: Path, template: Any) -> Any:
        import pytree2safetensors

        if template is None:
            return pytree2safetensors.load_pytree(path, **self.options)
        return pytree2safetensors.load_into_pytree(template, path, **self.options)

    def leaves(self, loaded: Any, skeleton: Any) -> list[Any]:
        found = dict(zip(_names(loaded), jax.tree.leaves(loaded), strict=True))
        return [found[name] for name in _names(skeleton)]


def _nodes(tree: Any) -> list[Any]:
    """Return the nodes of a tree of dicts, lists and tuples that are not leaves."""
    if isinstance(tree, dict):
        return [tree, *(node for child in tree.values() for node in _nodes(child))]
    if isinstance(tree, list | tuple):
        return [tree, *(node for child in tree for node in _nodes(child))]
    return []


class OursDurable(Ours):
    """This library with its default of flushing to the disk."""

    loads = False

    def save(self, prepared: Any, path: Path) -> None:
        import pytree2safetensors

        pytree2safetensors.save_pytree(prepared, path)


class OursAgain(Ours):
    """A tree that was saved before."""

    loads = False
    workloads = ("many", "state")

    def prepare(self, tree: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            self.save(tree, Path(folder) / "before")
        return tree


class OursReading(Ours):
    """A way to load what `written_by` wrote."""

    saves = False

    def __init__(
        self,
        written_by: str,
        workloads: tuple[str, ...],
        template: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(template, **options)
        self.written_by = written_by
        self.workloads = workloads


class OursFirst(OursReading):
    """The first load of a shape in a process: the tree before is too small to compile for."""

    warm_up = 1 / 200


class Original(Ours):
    """pytree2safetensors 0.1.4, in an environment of its own."""

    environment = "original"

    def save(self, prepared: Any, path: Path) -> None:
        import pytree2safetensors

        pytree2safetensors.save_pytree(prepared, str(path))

    def load(self, path: Path, template: Any) -> Any:
        return super().load(str(path), template)  # type: ignore[arg-type]  # 0.1.4 takes str


class Safetensors(System):
    """safetensors.flax, which has no trees: the flat dict is made and used by the caller."""

    def prepare(self, tree: Any) -> dict[str, Any]:
        return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))

    def save(self, prepared: Any, path: Path) -> None:
        import safetensors.flax

        safetensors.flax.save_file(prepared, path)

    def load(self, path: Path, _template: Any) -> Any:
        import safetensors.flax

        return safetensors.flax.load_file(path)

    def leaves(self, loaded: Any, skeleton: Any) -> list[Any]:
        return [loaded[name] for name in _names(skeleton)]


def _names(tree: Any) -> list[str]:
    """Spell the key paths as the library does, so that each can read the other's files."""
    marks = {
        jax.tree_util.DictKey: "@{.key}",
        jax.tree_util.SequenceKey: "#{.idx}",
        jax.tree_util.GetAttrKey: ".{.name}",
    }
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [
        "".join(marks[type(key)].format(key) for key in path).removeprefix(".") for path in paths
    ]


class Equinox(System):
    """equinox.tree_serialise_leaves."""

    def save(self, prepared: Any, path: Path) -> None:
        import equinox

        with path.open("wb") as file:  # a path without a suffix would get one
            equinox.tree_serialise_leaves(file, prepared)

    def load(self, path: Path, template: Any) -> Any:
        import equinox

        with path.open("rb") as file:
            return equinox.tree_deserialise_leaves(file, template)


class Orbax(System):
    """orbax.checkpoint.StandardCheckpointer, waited for."""

    workloads = TREES + SHARDED

    def save(self, prepared: Any, path: Path) -> None:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), prepared)

    def load(self, path: Path, template: Any) -> Any:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), template)


class Flax(System):
    """flax.serialization, msgpack; it returns NumPy arrays, which are handed to JAX."""

    def save(self, prepared: Any, path: Path) -> None:
        import flax.serialization

        path.write_bytes(flax.serialization.to_bytes(prepared))

    def load(self, path: Path, template: Any) -> Any:
        import flax.serialization

        return jax.device_put(flax.serialization.from_bytes(template, path.read_bytes()))


class Jaxon(System):
    """jaxon, HDF5; it knows no namedtuples."""

    workloads = ("large", "model", "many")

    def save(self, prepared: Any, path: Path) -> None:
        import jaxon

        jaxon.save(path, prepared)

    def load(self, path: Path, _template: Any) -> Any:
        import jaxon

        return jaxon.load(path)


class Savez(System):
    """numpy.savez of the leaves in order; bfloat16 comes back as raw bytes and is viewed as what it was."""

    def save(self, prepared: Any, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(prepared)))

    def load(self, path: Path, template: Any) -> Any:
        specs, treedef = jax.tree.flatten(template)
        with path.open("rb") as file, np.load(file) as arrays:
            leaves = [arrays[f"arr_{i}"].view(leaf.dtype) for i, leaf in enumerate(specs)]
        return jax.device_put(jax.tree.unflatten(treedef, leaves))


class Pickle(System):
    """pickle of the tree of JAX arrays, newest protocol."""

    def save(self, prepared: Any, path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(prepared, file, pickle.HIGHEST_PROTOCOL)

    def load(self, path: Path, _template: Any) -> Any:
        with path.open("rb") as file:
            return pickle.load(file)


PIECE = 64 << 20
READ_PIECE = 8 << 20
HUGE_PAGE = 2 << 20


class Baseline(System):
    """The bytes alone: preallocate and write; read with two threads into fresh memory."""

    def __init__(self, allocate: bool = True, flush: bool = False, loads: bool = True) -> None:
        self.allocate = allocate
        self.flush = flush
        self.loads = loads
        self.workloads = TREES + SHARDED if loads else TREES

    def prepare(self, tree: Any) -> memoryview:
        buffer = _fresh(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        offset = 0
        for leaf in jax.tree.leaves(tree):
            data = np.asarray(leaf).reshape(-1).view(np.uint8)
            buffer[offset : offset + data.nbytes] = data.tobytes()
            offset += data.nbytes
        return memoryview(buffer)[:offset]

    def save(self, prepared: Any, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if self.allocate:
            os.posix_fallocate(descriptor, 0, len(prepared))
        for start in range(0, len(prepared), PIECE):
            _write(descriptor, prepared[start : start + PIECE])
        if self.flush:
            os.fsync(descriptor)
        os.close(descriptor)

    def load(self, path: Path, _template: Any) -> Any:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        buffer = _fresh(size)
        view = memoryview(buffer)[:size]
        middle = size // 2 // READ_PIECE * READ_PIECE
        halves = [(0, middle), (middle, size)]
        threads = [
            threading.Thread(target=_read, args=(descriptor, view, *half)) for half in halves
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(descriptor)
        return view

    def leaves(self, loaded: Any, skeleton: Any) -> list[Any]:
        specs = jax.tree.leaves(skeleton)
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in specs]
        ends = np.cumsum(sizes)
        return [
            np.frombuffer(loaded[end - size : end], leaf.dtype).reshape(leaf.shape)
            for leaf, size, end in zip(specs, sizes, ends, strict=True)
        ]


def _fresh(size: int) -> mmap.mmap:
    """Allocate memory in huge pages, so that few faults fill it."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    buffer = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor: int, buffer: memoryview, start: int, stop: int) -> None:
    while start < stop:
        start += os.preadv(descriptor, [buffer[start : min(start + READ_PIECE, stop)]], start)


class Sharded(System):
    """A way to load a file of safetensors into the shards of the template."""

    saves = False
    workloads = SHARDED
    written_by = "safetensors"

    def __init__(self, read: Callable[[Path, Any], Any]) -> None:
        self.read = read

    def load(self, path: Path, template: Any) -> Any:
        return self.read(path, template)


def read_slices(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Read each device's slice with `get_slice`, through `jax.make_array_from_callback`."""
    import safetensors

    with safetensors.safe_open(path, framework="numpy") as file:
        return {
            name: jax.make_array_from_callback(
                spec.shape, spec.sharding, file.get_slice(keyed).__getitem__
            )
            for (name, spec), keyed in zip(template.items(), _names(template), strict=True)
        }


def read_whole(path: Path, template: dict[str, Any], framework: str) -> dict[str, Any]:
    """Read all arrays whole, then divide them with `jax.device_put`."""
    import safetensors.flax
    import safetensors.numpy

    load = safetensors.numpy.load_file if framework == "numpy" else safetensors.flax.load_file
    arrays = load(path)
    return {
        name: jax.device_put(arrays.pop(keyed), spec.sharding)
        for (name, spec), keyed in zip(template.items(), _names(template), strict=True)
    }


SYSTEMS: dict[str, System] = {
    "pytree2safetensors": Ours(),
    "pytree2safetensors, flushed": OursDurable(),
    "pytree2safetensors, saved again": OursAgain(),
    "pytree2safetensors, no template": OursReading(
        "pytree2safetensors", ("state",), template=False
    ),
    "pytree2safetensors, first load": OursFirst("pytree2safetensors", ("many", "state")),
    "pytree2safetensors, file of safetensors": OursReading(
        "safetensors", ("large", "model"), template=True
    ),
    "pytree2safetensors, mmap": OursReading("pytree2safetensors", ("large", "model"), mmap=True),
    "pytree2safetensors, shards": OursReading("pytree2safetensors", SHARDED, template=True),
    "pytree2safetensors, shards, mmap": OursReading(
        "pytree2safetensors", SHARDED, template=True, mmap=True
    ),
    "original 0.1.4": Original(),
    "safetensors": Safetensors(),
    "equinox": Equinox(),
    "orbax": Orbax(),
    "flax msgpack": Flax(),
    "jaxon": Jaxon(),
    "numpy.savez": Savez(),
    "pickle": Pickle(),
    "get_slice, make_array_from_callback": Sharded(read_slices),
    "safetensors.numpy, device_put": Sharded(partial(read_whole, framework="numpy")),
    "safetensors.flax, device_put": Sharded(partial(read_whole, framework="flax")),
    "baseline": Baseline(),
    "baseline, flushed": Baseline(flush=True, loads=False),
    "write, flushed": Baseline(allocate=False, flush=True, loads=False),
}

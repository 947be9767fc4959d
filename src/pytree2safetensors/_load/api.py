"""Loading: the tree in a file, without a template.

Specification: *Loading*.
"""

import sys
import warnings
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import (
    KeyPathError,
    WeightsMismatchError,
    errors_of,
    nearest,
    shorten,
)
from pytree2safetensors._format.digests import check_digest, hash_blocks
from pytree2safetensors._format.tensor import WEAK, TensorInfo
from pytree2safetensors._leaves.decode import from_bytes, python_value
from pytree2safetensors._leaves.spec import abstract, holds, noted_value
from pytree2safetensors._leaves.to_jax import TAKEN_OVER, to_jax, weaken, wrap_key
from pytree2safetensors._load.checkpoint import OpenCheckpoint, open_checkpoint
from pytree2safetensors._storage.byte_source import (
    ByteSource,
    PathLike,
    Read,
    Readable,
    read_ranges,
)
from pytree2safetensors._storage.progress import Progress, ProgressOption, Report, reporter
from pytree2safetensors._tree.flatten import PyTree
from pytree2safetensors._tree.keypath import join, split, string2keypath
from pytree2safetensors._tree.paths import strip_prefix
from pytree2safetensors._tree.unflatten import build
from pytree2safetensors._types import Kind

_SLAB: Final = 64 << 20  # bytes: what one leaf that lives on can keep in memory, at most
_COMPARED: Final = 2000  # names among which the prefix that was meant is looked for
_ALIGNMENT: Final = 64  # what JAX needs to take memory over


@jaxtyped(typechecker=beartype)
def load_pytree(
    path: PathLike | Readable,
    *,
    prefix: str = "",
    mmap: bool = False,
    progress: ProgressOption = False,
) -> PyTree:
    """Load the tree in a safetensors file, without a template.

    Args:
        path: A file, a binary file object, a folder of shards or its index.
        prefix: A spelled key path: load the subtree there, and read no more.
        mmap: Map the file instead of reading it; nothing may change the file afterwards.
        progress: True for a bar, or a function of (done_bytes, total_bytes).

    Returns:
        The tree that was saved. Attributes of other node types come back in `PyTreeContainer`s.
        Arrays are uncommitted JAX arrays; NumPy arrays, with one warning, where JAX cannot hold
        their dtype here.

    Raises:
        FileFormatError: The file is damaged, or no safetensors file.
        KeyPathError: A name in the file spells no key path; load such files into a template.
        TreeStructureError: The names make no tree.
        WeightsMismatchError: There is nothing at `prefix`.
        ValueError: `mmap` of a file object.
        OSError: The file cannot be read.

    Specification: *Loading*.

    >>> save_pytree({"w": 1.5, "steps": (1, 2)}, "model.safetensors")
    >>> load_pytree("model.safetensors")
    {'steps': (1, 2), 'w': 1.5}
    """
    with collector_paused(), open_checkpoint(path, mmap) as store:
        names = names_below(store, prefix)
        leaves = take(store, names.values(), mmap, reporter(progress, "loading", jax.process_index))
        kinds = nodes_below(store, prefix)
        found = {name: leaves[stored] for name, stored in names.items()}
        where = f"{store.label} below {shorten(prefix)}" if prefix else store.label
        return build(found, kinds, where)


@jaxtyped(typechecker=beartype)
def load_abstract(path: PathLike | Readable, *, flat: bool = False) -> PyTree:
    """Load the tree in a file with a `jax.ShapeDtypeStruct` for each array; none of these is read.

    Args:
        path: A file, a binary file object, a folder of shards or its index.
        flat: Return a dict from the names in the file to their leaves, even if the names make no
            tree.

    Returns:
        The tree of `load_pytree`; Python scalars and strs are there as themselves (the values of
        the former are read, too).

    Raises:
        FileFormatError: The file is damaged, or no safetensors file.
        KeyPathError: A name in the file spells no key path, and `flat` is False.
        TreeStructureError: The names make no tree, and `flat` is False.
        OSError: The file cannot be read.

    Specification: *Loading*.

    >>> save_pytree({"w": np.zeros((2, 3), np.float32)}, "model.safetensors")
    >>> load_abstract("model.safetensors")
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    with collector_paused(), open_checkpoint(path) as store:
        names = sorted(store.infos)
        found = {name: store.spec_of(name) for name in names}
        scalars = [name for name in names if found[name].kind not in {"array", "key"}]
        values = take(store, scalars, False, None)
        leaves = {name: values[name] if name in values else abstract(found[name]) for name in names}
        return leaves if flat else build(leaves, store.note.nodes, store.label)


@jaxtyped(typechecker=beartype)
def load_metadata(path: PathLike | Readable) -> dict[str, str]:
    """Load the metadata that the caller of `save_pytree` passed.

    Args:
        path: A file, a binary file object, a folder of shards or its index.

    Returns:
        The metadata, without the entries that this package writes itself; one of these is a
        `format` that is "flax".

    Raises:
        FileFormatError: The file is damaged, or no safetensors file.
        OSError: The file cannot be read.

    Specification: *Files*.

    >>> save_pytree({"w": 1.5}, "model.safetensors", metadata={"run": "17"})
    >>> load_metadata("model.safetensors")
    {'run': '17'}
    """
    with collector_paused(), open_checkpoint(path) as store:
        own = store.own_metadata()
        if own.get("format") == "flax":  # what save_pytree writes where the caller says nothing
            del own["format"]
        return own


def names_below(store: OpenCheckpoint, prefix: str, wanted: Iterable[str] = ()) -> dict[str, str]:
    """The names below `prefix`, as seen from there, to the names in the file.

    `wanted` are the key paths that are missing if there is nothing.
    """
    if not prefix:
        return {name: name for name in sorted(store.infos)}
    string2keypath(prefix)
    found = {}
    for name in sorted(store.infos):
        rest = strip_prefix(prefix, name)
        if rest is not None:
            found[rest] = name
    if not found and not nodes_below(store, prefix):
        raise WeightsMismatchError(
            f"{store.label} has nothing at the prefix {shorten(prefix)}{_nearest_node(store, prefix)}; "
            f"its names begin with "
            f"{', '.join(map(shorten, sorted(store.infos)[:5])) or 'nothing, for it is empty'}",
            missing=tuple(wanted),
        )
    return found


def _nearest_node(store: OpenCheckpoint, prefix: str) -> str:
    """Which prefix of as many keys may have been meant."""
    count = len(split(prefix))
    nodes: dict[str, None] = {}
    for name in islice(store.infos, _COMPARED):
        with suppress(KeyPathError):  # a foreign name has no prefix
            nodes[join("", *split(name)[:count])] = None
    return nearest(prefix, list(nodes))


def nodes_below(store: OpenCheckpoint, prefix: str) -> Mapping[str, Kind]:
    """What the note says of the nodes below `prefix`, as seen from there."""
    if not prefix:
        return store.note.nodes
    found = ((strip_prefix(prefix, path), kind) for path, kind in store.note.nodes.items())
    return {path: kind for path, kind in found if path is not None}


def take(
    store: OpenCheckpoint, names: Iterable[str], mmap: bool, progress: Progress | None
) -> dict[str, Any]:
    """Read leaves, as the file alone describes them."""
    found: dict[str, Any] = {}
    arrays: list[str] = []
    special: list[str] = []  # arrays that are more than their values
    scalars: list[str] = []
    foreign: dict[str, None] = {}  # what JAX cannot hold here, in order
    held: dict[int, bool] = {}  # by form: most tensors share theirs with others
    for name in names:
        info = store.infos[name]
        if not info.dtype:
            found[name] = noted_value(info)
            continue
        fits = held.get(id(info))
        if fits is None:
            dtype = store.spec_of(name).dtype
            fits = held[id(info)] = dtype is None or holds(dtype)
        if not fits:
            foreign[name] = None
        elif info.kind is None:
            arrays.append(name)
        elif _is_scalar(info):
            scalars.append(name)
        else:
            arrays.append(name)
            special.append(name)
    values = read(store, [*arrays, *scalars, *foreign], mmap, progress, apart=foreign)
    found.update((name, values[name]) for name in foreign)
    found.update((name, python_value(values[name], store.infos[name])) for name in scalars)
    found.update(zip(arrays, to_jax([values[name] for name in arrays]), strict=True))
    for name in special:
        kind = store.infos[name].kind
        if kind in WEAK:
            found[name] = weaken(found[name])
        elif isinstance(kind, list):
            found[name] = wrap_key(found[name], kind[1])
    if foreign:
        warn_foreign(store, list(foreign))
    return found


def _is_scalar(info: TensorInfo) -> bool:
    return isinstance(info.kind, str) and info.kind in {"int", "float", "bool", "complex"}


def warn_foreign(store: OpenCheckpoint, names: list[str]) -> None:
    """Say once which leaves are NumPy arrays, and why."""
    shown = ", ".join(f"{shorten(name)} ({store.spec_of(name).dtype})" for name in names[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    warnings.warn(
        f"JAX cannot hold the dtypes of {len(names)} leaves of {store.label} here, so they are "
        f"NumPy arrays: {shown}{more}. Enable jax_enable_x64 for dtypes of 64 bits.",
        stacklevel=caller_level(),
    )


def caller_level() -> int:
    """How far up the stack the code stands that called this package."""
    level = 1
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - how CPython shows callers
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"pytree2safetensors", "jaxtyping", "beartype"}


def read(
    store: OpenCheckpoint,
    names: Iterable[str],
    mmap: bool,
    progress: Progress | None,
    apart: Container[str] = (),
) -> dict[str, NDArray[Any]]:
    """Read tensors into memory that their arrays will own, `apart` each into its own."""
    names = set(names)
    wanted = [name for name in store.places if name in names]  # in the order of the data
    if mmap:
        slabs = _map(store, wanted, apart)
        Report(progress, sum(store.infos[name].nbytes for name in wanted)).finish()
    else:
        slabs = _allocate(store, wanted, apart)
        read_ranges((part for slab in slabs for part in slab.reads), progress)
    values: dict[str, NDArray[Any]] = {}
    plain: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}  # shape and dtype by form
    for memory, parts, _ in slabs:
        for name, offset in parts:
            info = store.infos[name]
            if store.digests is not None:
                raw = memory[offset : offset + info.nbytes]
                check_digest(name, info, hash_blocks([raw]), store.digests, store.label)
            if id(info) in plain:
                shape, dtype = plain[id(info)]
                values[name] = np.ndarray(shape, dtype, memory, offset)
                continue
            with errors_of(store.label):
                value = values[name] = from_bytes(memory, info, name, offset)
            if info.kind is None and info.dtype != "BOOL":
                plain[id(info)] = value.shape, value.dtype
    return values


class _Slab(NamedTuple):
    """Memory of several tensors: which are where, and what is read into it."""

    memory: NDArray[np.uint8]
    parts: list[tuple[str, int]]
    reads: list[Read]


def _map(store: OpenCheckpoint, names: list[str], apart: Container[str]) -> list[_Slab]:
    maps: dict[int, _Slab] = {}
    copies: list[_Slab] = []
    for name in names:
        source, offset = store.places[name]
        if id(source) not in maps:
            maps[id(source)] = _Slab(source.map(), [], [])
        slab = maps[id(source)]
        if name in apart:
            copy = slab.memory[offset : offset + store.infos[name].nbytes].copy()
            copies.append(_Slab(copy, [(name, 0)], []))
        else:
            slab.parts.append((name, offset))
    return [*maps.values(), *copies]


def _allocate(store: OpenCheckpoint, names: list[str], apart: Container[str]) -> list[_Slab]:
    """Give each tensor its place in memory, in slabs of bounded size."""
    slabs: list[_Slab] = []
    parts: list[tuple[str, int]] = []  # of the slab to come
    runs: list[_Run] = []
    run = None
    size = 0
    full = False
    for name in names:
        nbytes = store.infos[name].nbytes
        source, offset = store.places[name]
        # What is copied anyway needs no alignment.
        place = size if nbytes < TAKEN_OVER else -(-size // _ALIGNMENT) * _ALIGNMENT
        alone = name in apart
        if parts and (place + nbytes > _SLAB or alone or full):
            slabs.append(_slab(parts, runs, size))
            parts, runs, run, place = [], [], None, 0
        shift = offset - place
        if run is None or run.source is not source or run.shift != shift or run.stop != place:
            run = _Run(source, shift, place)
            runs.append(run)
        parts.append((name, place))
        run.stop = size = place + nbytes
        full = alone
    if parts:
        slabs.append(_slab(parts, runs, size))
    return slabs


class _Run:
    """Neighbours in the file and in memory, `shift` bytes apart: they are read at once."""

    __slots__ = ("shift", "source", "start", "stop")

    def __init__(self, source: ByteSource, shift: int, start: int) -> None:
        self.source, self.shift, self.start, self.stop = source, shift, start, start


def _slab(parts: list[tuple[str, int]], runs: list[_Run], size: int) -> _Slab:
    memory = aligned(size)
    view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
    reads = [Read(run.source, run.start + run.shift, view[run.start : run.stop]) for run in runs]
    return _Slab(memory, parts, reads)


def aligned(size: int) -> NDArray[np.uint8]:
    """Fresh memory that JAX can take over."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size]

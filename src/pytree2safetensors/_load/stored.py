"""Leaves as their file describes them, and the names below a prefix.

Specification: *Loading*.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import Any, Final

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import KeyPathError, WeightsMismatchError
from pytree2safetensors._leaves.spec import LeafSpec, holds, noted_value
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.reading import read_leaves
from pytree2safetensors._load.slots import Wanted
from pytree2safetensors._load.template import PYTHON_NUMBERS, TemplateLeaf
from pytree2safetensors._messages import joined, nearest, shorten
from pytree2safetensors._storage.progress import Progress
from pytree2safetensors._tree.keypath import split, string2keypath
from pytree2safetensors._tree.paths import strip_prefix
from pytree2safetensors._tree.separated import names_with
from pytree2safetensors._tree.spelling import join
from pytree2safetensors._types import Kind

_COMPARED: Final = 2000  # names to search for a similar prefix


def names_below(
    checkpoint: OpenCheckpoint, prefix: str, wanted: Iterable[str] = (), separator: str = ""
) -> dict[str, str]:
    """Map the names relative to `prefix` to the names in the file.

    `wanted` are the key paths to report as missing if there is nothing. With a separator, names and
    prefix are not key paths.
    """
    if not prefix:
        return {name: name for name in sorted(checkpoint.infos)}
    found = {}
    if separator:
        found = names_with(prefix, separator, sorted(checkpoint.infos))
    else:
        string2keypath(prefix)
        for name in sorted(checkpoint.infos):
            rest = strip_prefix(prefix, name)
            if rest is not None:
                found[rest] = name
    if not found and (separator or not nodes_below(checkpoint, prefix)):
        near = "" if separator else _nearest_node(checkpoint, prefix)
        raise WeightsMismatchError(
            f"{checkpoint.label} has nothing at the prefix {shorten(prefix)}{near}; "
            f"its names begin with "
            f"{', '.join(map(shorten, sorted(checkpoint.infos)[:5])) or 'nothing, because it is empty'}",
            missing=tuple(wanted),
        )
    return found


def _nearest_node(checkpoint: OpenCheckpoint, prefix: str) -> str:
    """Return a hint with the prefix that the caller may have meant."""
    count = len(split(prefix))
    nodes: dict[str, None] = {}
    for name in islice(checkpoint.infos, _COMPARED):
        with suppress(KeyPathError):  # a foreign name has no prefix
            nodes[join("", *split(name)[:count])] = None
    return nearest(prefix, list(nodes))


def nodes_below(checkpoint: OpenCheckpoint, prefix: str) -> Mapping[str, Kind]:
    """Return the noted kinds of the nodes below `prefix`, by path relative to it."""
    if not prefix:
        return checkpoint.note.nodes
    found = ((strip_prefix(prefix, path), kind) for path, kind in checkpoint.note.nodes.items())
    return {path: kind for path, kind in found if path is not None}


def load_stored(
    checkpoint: OpenCheckpoint, names: Iterable[str], *, mmap: bool, progress: Progress | None
) -> list[Any]:
    """Load leaves as their file describes them."""
    noted: dict[int, Any] = {}  # by position: leaves without a tensor
    wanted: list[Wanted] = []
    leaves: dict[int, TemplateLeaf] = {}  # by info, which most tensors share with others
    with collector_paused():
        for position, name in enumerate(names):
            info = checkpoint.infos[name]
            leaf = leaves.get(id(info))
            if leaf is None:
                if not info.dtype:
                    noted[position] = noted_value(info)
                    continue
                leaf = leaves[id(info)] = leaf_as_stored(checkpoint.spec_of(name))
            wanted.append(Wanted(name, leaf))
    found = read_leaves(checkpoint, wanted, mmap=mmap, progress=progress)
    if noted:
        read = iter(found)
        found = [
            noted[position] if position in noted else next(read)
            for position in range(len(noted) + len(wanted))
        ]
    if any(leaf.target == "foreign" for leaf in leaves.values()):
        warn_foreign(checkpoint, [want for want in wanted if want.leaf.target == "foreign"])
    return found


def scalar_reader(checkpoint: OpenCheckpoint) -> Callable[[Iterable[str]], Mapping[str, Any]]:
    """Return a function that reads Python scalars and strs by name, each of them once."""
    known: dict[str, Any] = {}

    def read(names: Iterable[str]) -> Mapping[str, Any]:
        new = [name for name in names if name not in known]
        known.update(zip(new, load_stored(checkpoint, new, mmap=False, progress=None), strict=True))
        return known

    return read


def leaf_as_stored(spec: LeafSpec) -> TemplateLeaf:
    """Describe a leaf as it is stored: a JAX array if JAX supports its dtype."""
    if spec.kind in PYTHON_NUMBERS:
        return TemplateLeaf(spec, "python")
    foreign = spec.dtype is not None and not holds(spec.dtype)
    return TemplateLeaf(spec, "foreign" if foreign else "jax")


def warn_foreign(checkpoint: OpenCheckpoint, wanted: Iterable[Wanted]) -> None:
    """Warn once which leaves are NumPy arrays, and why."""
    shown = joined([f"{shorten(want.name)} ({want.leaf.spec.dtype})" for want in wanted])
    warn(
        "JAX does not support the dtypes of some leaves here, so they are NumPy arrays without a "
        f"sharding. In {checkpoint.label}: {shown}. Enable jax_enable_x64 for dtypes of 64 bits."
    )


def warn(message: str) -> None:
    """Warn the caller of this package."""
    level = 1  # how far up the stack the caller of this package is
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - how CPython shows callers
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"pytree2safetensors", "jaxtyping", "beartype"}

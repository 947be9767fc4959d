"""Leaves as their file describes them.

Specification: *Loading*.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.spec import LeafSpec, jax_holds, noted_value
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.reading import read_leaves
from pytree2safetensors._load.slots import Wanted
from pytree2safetensors._load.template import PYTHON_NUMBERS, TemplateLeaf
from pytree2safetensors._messages import joined, shorten
from pytree2safetensors._storage.progress import Progress


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
                leaf = leaves[id(info)] = _leaf_as_stored(checkpoint.spec_of(name))
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


def _leaf_as_stored(spec: LeafSpec) -> TemplateLeaf:
    """Describe a leaf as it is stored: a JAX array if JAX supports its dtype."""
    if spec.kind in PYTHON_NUMBERS:
        return TemplateLeaf(spec, "python")
    foreign = spec.dtype is not None and not jax_holds(spec.dtype)
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

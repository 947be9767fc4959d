"""The terms of a save: what all processes must agree on.

Specification: *Saving*.
"""

import os
from functools import lru_cache
from typing import Any, Final, NamedTuple, SupportsIndex

from pytree2safetensors._format.note import NOTE, read_note
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled
from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.ownership import is_global, ownership
from pytree2safetensors._leaves.regions import Shape, region_of, shape_of
from pytree2safetensors._messages import joined
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.plan import SavePlan
from pytree2safetensors._save.target import LocalTarget
from pytree2safetensors._save.words import LAYOUT, Terms
from pytree2safetensors._types import Kind

_SCALARS: Final = PYTHON_SCALARS.keys() - {str}  # whose values must agree
_LISTED: Final = 16  # devices of an array that an error lists
_KNOWN: Final = 4096  # remembered shardings and shapes, as for their owners


class SaveOptions(NamedTuple):
    """The options that all processes must give."""

    durable: bool
    checksum: bool
    max_shard_size: SupportsIndex | str | None


def terms_of(
    contents: Contents, plan: SavePlan, target: LocalTarget, options: SaveOptions
) -> Terms:
    """Return what the processes must agree on: the target, the options, the contents, and the owners.

    The values of arrays are not included, because no process has all of them.
    """
    # The folders above may be mounted elsewhere.
    name = os.path.basename(target.path.rstrip(os.sep))
    terms = {"the name of the file": repr(name)}
    size = None if target.folder is None else target.limit  # not as it is spelled
    values = options._replace(max_shard_size=size)._asdict()
    terms |= {f"the option {name}=": repr(value) for name, value in values.items()}
    note = read_note(contents.metadata.get(NOTE), "this tree")
    terms |= {f"the node {name!r}": _kind(kind) for name, kind in note.nodes.items()}
    terms |= {repr(name): _kind(kind) for name, kind in note.leaves.items()}
    for name, leaf in contents.leaves.items():
        terms[repr(name)] = _leaf(leaf, contents.infos[name])
    if plan.index_name:  # in a single file, process 0 decides where the data start
        terms[LAYOUT] = ", ".join(
            f"{file.name} ({len(file.head)} bytes of {file.size})" for file in plan.files
        )
    return terms


def _kind(kind: Kind) -> str:
    """Return a kind of a node or leaf in words."""
    match kind:
        case ["str", text]:
            return repr(text)
        case [word, value]:
            return f"{word} {value}"
    return str(kind)


def _leaf(leaf: Any, info: TensorInfo) -> str:
    """Return what the processes must agree on about a leaf: in words, its devices, and its rule."""
    if type(leaf) in _SCALARS:
        return repr(leaf)
    members = leaf.members if isinstance(leaf, Assembled) else []
    leaves = [member.leaf for member in members] or [leaf]
    shards = [_shards(one.sharding, one.shape) if is_global(one) else ("", "") for one in leaves]
    kind = f" {_kind(info.kind)}" if info.kind else ""
    words = " and".join(filter(None, dict.fromkeys(words for words, _ in shards)))
    views = [(number, *view[1:]) for view, number, _ in members]
    digests = " ".join(digest for _, digest in shards)
    return f"{info.dtype}{list(info.shape)}{kind}{words}\n{digests}\n{views}"


@lru_cache(_KNOWN)
def _shards(sharding: Any, shape: Shape) -> tuple[str, str]:
    """Return in words and as a digest which devices have which shards of an array."""
    devices = sharding.devices_indices_map(shape).items()
    held = sorted((region_of(index, shape), device.id) for device, index in devices)
    numbers = joined([str(number) for _, number in held], _LISTED)
    words = f" in shards of {list(shape_of(held[0][0]))} (devices {numbers})"
    return words, ownership(sharding, shape).digest[:32]

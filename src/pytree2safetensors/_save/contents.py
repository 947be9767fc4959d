"""The contents of a save: tensors, leaves and metadata, checked before anything is written.

Specification: *Leaves*, *The note*, *Saving*.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pytree2safetensors._format.layout import check_metadata
from pytree2safetensors._format.note import FORMAT, NOTE, Note, write_note
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._save.renamed import place, tensors_of
from pytree2safetensors._save.unsupported import check_unsupported, lose_data
from pytree2safetensors._tree.flatten import Flat, flatten
from pytree2safetensors._tree.keypath import split
from pytree2safetensors._tree.paths import above, cut
from pytree2safetensors._tree.spelling import INDEX, ITEM


class Contents(NamedTuple):
    """What to write: the info of each tensor, its leaf, and the metadata."""

    infos: dict[str, TensorInfo]
    leaves: dict[str, Any]
    metadata: dict[str, str]


def collect(
    tree: Any,
    metadata: Mapping[str, str],
    unsupported: Literal["raise", "skip"],
    rename: Rename | None = None,
) -> Contents:
    """Check a whole tree before anything is written."""
    check_metadata(metadata)
    flat = flatten(tree)
    if rename is not None:
        return _collect_renamed(flat, metadata, unsupported, rename)
    found = describe(flat.leaves)
    unstorable = [(flat.names[n], flat.leaves[n]) for n, info in enumerate(found) if info is None]
    if unstorable:
        check_unsupported(unstorable, skip=unsupported == "skip")
        _leave_out([name for name, _ in unstorable], flat)
    infos = dict(zip(flat.names, filter(None, found), strict=True))
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    kinds = {name: info.kind for name, info in infos.items() if info.kind is not None}
    for name in kinds:
        if not infos[name].dtype:  # the note contains the whole leaf
            del infos[name], leaves[name]
    if flat.kinds.get("") == "dict":
        del flat.kinds[""]  # a file without names and note is an empty dict
    note = write_note(Note(flat.kinds, kinds))
    whole = {**FORMAT, **metadata}
    if note is not None:
        whole[NOTE] = note
    return Contents(infos, leaves, whole)


def _collect_renamed(
    flat: Flat, metadata: Mapping[str, str], unsupported: Literal["raise", "skip"], rename: Rename
) -> Contents:
    """Check a tree for a file with other names, which has no note."""
    infos = describe(flat.leaves)
    found = [*zip(flat.names, flat.leaves, infos, strict=True)]
    if unsupported == "skip":
        losses = lose_data([leaf if info is None else None for _, leaf, info in found])
        found = [item for item, loses in zip(found, losses, strict=True) if loses or item[2]]
    placed, unstorable = place(rename, found)
    if unstorable:
        check_unsupported(unstorable, skip=False)
    tensors, leaves = tensors_of(placed)
    return Contents(tensors, leaves, {**FORMAT, **metadata})


def _leave_out(names: Iterable[str], flat: Flat) -> None:
    """Remove leaves from a flattened tree, so that the rest is still a tree.

    Numbered children are replaced with `None`. Other children are removed with their names.
    """
    left_out = set(names)
    kept = [name for name in flat.names if name not in left_out]
    parents = _ancestors([*kept, *flat.kinds])
    removed: dict[str, set[str]] = {}  # the segments that are removed from OrderedDicts
    for name in sorted(left_out, key=lambda name: len(split(name)), reverse=True):
        if not name:
            flat.kinds[name] = "None"
            continue
        parent, segment = cut(name)
        if segment[0] == INDEX:
            flat.kinds[name] = "None"
            parents |= _ancestors([name])
            continue
        kind = flat.kinds.get(parent)
        if isinstance(kind, list):
            removed.setdefault(parent, set()).add(segment)
        elif parent not in parents and kind != "dict":  # a dict key decides
            flat.kinds[parent] = "dict" if segment[0] == ITEM else "PyTreeContainer"
            parents |= _ancestors([parent])
    for parent, gone in removed.items():
        kind = flat.kinds[parent]
        flat.kinds[parent] = [kind[0], [segment for segment in kind[1] if segment not in gone]]
    remaining = [
        (n, leaf) for n, leaf in zip(flat.names, flat.leaves, strict=True) if n not in left_out
    ]
    flat.names[:] = [name for name, _ in remaining]
    flat.leaves[:] = [leaf for _, leaf in remaining]


def _ancestors(names: Iterable[str]) -> set[str]:
    """Return the paths of all nodes above these names."""
    found: set[str] = set()
    for name in names:
        for path, _ in above(name):
            if path in found:
                break
            found.add(path)
    return found

"""Verdicts: whether a file is sound, from all of it."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._cli.diff import items
from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    shorten,
)
from pytree2safetensors._format.digests import digest_tensor, hash_blocks
from pytree2safetensors._leaves.keys import UnknownHere
from pytree2safetensors._leaves.spec import spec_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint, open_checkpoint
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._tree.unflatten import build_tree


class Verdict(NamedTuple):
    """Whether a file is sound.

    Attributes:
        opened: Whether the header is sound, so that the data could be read.
        tensors: How many tensors were read.
        nbytes: How many bytes these have.
        digests: Whether each had a digest to match.
        problems: What is broken.
        remarks: What is not, and good to know.
    """

    opened: bool
    tensors: int
    nbytes: int
    digests: bool
    problems: list[str]
    remarks: list[str]


def verify_file(path: PathLike) -> Verdict:
    """Check the structure of a file, and read all of it.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        store = open_checkpoint(path)
    except Pytree2SafetensorsError as error:
        return Verdict(False, 0, 0, False, [str(error)], [])
    with store:
        problems: list[str] = []
        remarks = [*_tree_remarks(store)]
        for name in store.places:
            problems.extend(_tensor_problems(store, name, remarks))
        nbytes = sum(store.infos[name].nbytes for name in store.places)
        digests = store.digests is not None
        return Verdict(True, len(store.places), nbytes, digests, problems, remarks)


def _tree_remarks(store: OpenCheckpoint) -> Iterable[str]:
    """Say whether names and note make no tree, which is no damage."""
    leaves = dict.fromkeys(store.infos, 0)
    try:
        build_tree(leaves, store.note.nodes)
    except (KeyPathError, TreeStructureError) as error:
        yield f"it loads only into a template: {error}"


def _tensor_problems(store: OpenCheckpoint, name: str, remarks: list[str]) -> Iterable[str]:
    info = store.infos[name]
    try:
        spec_of(info, "")
    except FileFormatError:
        try:
            spec_of(info, name)  # again, for its message names the tensor
        except UnknownHere as error:
            remarks.append(str(error))
        except FileFormatError as error:
            yield str(error)
    try:
        pieces = _checked_pieces(store, name)
        if store.digests is None:
            for _ in pieces:
                pass
        elif digest_tensor(name, info, hash_blocks(pieces)) != store.digests[name]:
            yield f"{shorten(name)} does not match its digest: its data are damaged"
    except FileFormatError as error:
        yield str(error)


def _checked_pieces(store: OpenCheckpoint, name: str) -> Iterator[NDArray[np.uint8]]:
    info = store.infos[name]
    for piece in store.pieces(name):
        items(name, info, piece)  # refuses values beyond a dtype of less than a byte
        yield piece


def verdict_json(file: str, verdict: Verdict) -> dict[str, Any]:
    """What `verify --json` prints."""
    return {"file": file, "sound": not verdict.problems, **verdict._asdict()}

"""`verify`: whether a file is sound. This reads all of its bytes."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._cli.answer import MOST_LINES, Answer, left_out
from pytree2safetensors._cli.comparison import items
from pytree2safetensors._cli.contents import Pieces, contents
from pytree2safetensors._cli.terminal import labelled, line, plain, size
from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    UnknownHere,
    may_be_sound,
)
from pytree2safetensors._format.digests import digest_tensor, hash_blocks
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.spec import spec_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.locate import locate, locate_remotely
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._messages import plural, shorten
from pytree2safetensors._storage.locations import PathLike, resolve
from pytree2safetensors._storage.remote_path import RemotePath, shown_url
from pytree2safetensors._tree.unflatten import build_tree


class Verdict(NamedTuple):
    """Whether a file is sound.

    Attributes:
        opened: Whether the header is sound, so that the data could be read.
        tensors: How many tensors were read.
        nbytes: How many bytes they have.
        digests: Whether each tensor has a digest.
        problems: What is damaged.
        remarks: What is good to know, but not damage.
    """

    opened: bool
    tensors: int
    nbytes: int
    digests: bool
    problems: list[str]
    remarks: list[str]


def verify(file: str, *, everything: bool) -> Answer:
    """Check a file and list its problems."""
    verdict = verify_file(file)
    count = len(verdict.problems)
    complaint = f"{plain(shown_url(file))} is damaged: "
    complaint += verdict.problems[0] if count == 1 else f"{count:,} problems"
    return Answer(
        lambda: _lines(file, verdict, everything),
        lambda: {"file": shown_url(file), "sound": not verdict.problems, **verdict._asdict()},
        complaint if count else "",
    )


def _lines(file: str, verdict: Verdict, everything: bool) -> Iterator[str]:
    yield line(
        f"{plain(shown_url(file))}: {'damaged' if verdict.problems else 'sound'}",
        "red" if verdict.problems else "green",
    )
    if verdict.opened:
        tensors = plural(verdict.tensors, "tensor", "tensors")
        yield from labelled("read", f"{tensors}, {size(verdict.nbytes)}")
        yield from labelled("digests", _digests_text(verdict))
    for label, texts in (("problem", verdict.problems), ("remark", verdict.remarks)):
        shown = texts if everything else texts[:MOST_LINES]
        for text in shown:
            yield from labelled(label, text)
        if len(shown) < len(texts):
            yield from labelled("", left_out(len(texts) - len(shown)))


def _digests_text(verdict: Verdict) -> str:
    if not verdict.digests:
        return "none, so changed values go unnoticed; checksum=True saves digests"
    return "one for each tensor" if verdict.problems else "one for each tensor; all match"


def verify_file(path: PathLike) -> Verdict:
    """Check the structure of a file, and read all of it.

    Raises:
        FileFormatError: The path is a folder without a checkpoint, or with several; or the file changed,
            or cannot be read here.
        OSError: The file cannot be read.
    """
    try:
        checkpoint = open_checkpoint(path)
    except Pytree2SafetensorsError as error:
        if may_be_sound(error):
            raise
        where = resolve(path)
        if isinstance(where, RemotePath):
            with suppress(PermissionError):  # which may hold for the listing only
                locate_remotely(where)
        else:
            locate(where)
        return Verdict(False, 0, 0, False, [str(error)], [])
    with checkpoint:
        problems: list[str] = []
        remarks = [*_tree_remarks(checkpoint)]
        with contents(checkpoint, checkpoint.places) as tensors:
            for name, pieces in tensors:
                problems.extend(_tensor_problems(checkpoint, name, pieces, remarks))
        nbytes = sum(checkpoint.infos[name].nbytes for name in checkpoint.places)
        digests = checkpoint.digests is not None
        return Verdict(True, len(checkpoint.places), nbytes, digests, problems, remarks)


def _tree_remarks(checkpoint: OpenCheckpoint) -> Iterable[str]:
    """Yield a remark if names and note do not form a tree. This is not damage."""
    leaves = dict.fromkeys(checkpoint.infos, 0)
    try:
        build_tree(leaves, checkpoint.note.nodes)
    except (KeyPathError, TreeStructureError) as error:
        yield f"loads only into a template, because {error}"


def _tensor_problems(
    checkpoint: OpenCheckpoint, name: str, pieces: Pieces, remarks: list[str]
) -> list[str]:
    info = checkpoint.infos[name]
    problems: list[str] = []
    try:
        spec_of(info, name)
    except UnknownHere as error:
        remarks.append(str(error))
    except FileFormatError as error:
        problems.append(str(error))
    impossible: list[str] = []
    checked = _checked(name, info, pieces, impossible)
    if checkpoint.digests is None:
        deque(checked, maxlen=0)
    elif digest_tensor(name, info, hash_blocks(checked)) != checkpoint.digests[name]:
        shard = checkpoint.places[name][0].label
        where = "" if shard == checkpoint.label else f" in {shard}"
        found = f"{shorten(name)}{where} does not match its digest: its data is damaged"
        return [*problems, *(impossible or [found])]
    return [*problems, *impossible]


def _checked(
    name: str, info: TensorInfo, pieces: Pieces, impossible: list[str]
) -> Iterator[NDArray[np.uint8]]:
    """Yield pieces. Note that values are beyond a dtype of less than a byte, once."""
    for piece in pieces:
        try:
            items(name, info, piece)
        except FileFormatError as error:
            impossible[:] = [str(error)]
        yield piece

"""The share that one process has in a save: the bytes that it writes, and the blocks that it hashes.

Specification: *Saving*, *Digests*.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeAlias

from pytree2safetensors._format.digests import block_bounds, digest_tensor
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled, Member, whole_leaves, with_leaves
from pytree2safetensors._leaves.host_copies import copied_ahead, snapshot
from pytree2safetensors._leaves.ownership import is_global
from pytree2safetensors._leaves.spread import Owned, owned
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.parts import arrays_of, chunks_of, parts_of, with_arrays
from pytree2safetensors._save.plan import FilePlan, SavePlan
from pytree2safetensors._types import Chunk

_SMALL: Final = 1 << 16  # bytes: smaller chunks are written together
_JOINED: Final = 4 << 20  # bytes to write together
_LARGEST: Final = 32 << 20  # bytes of one write, so that interrupts and progress are seen often
_EACH: Final = 4096  # bytes that could be hashed in the time that reading one more block takes

# What a process saves: its shards of global arrays and, on process 0, all other leaves.
Share: TypeAlias = Mapping[str, Any]


def share_of(contents: Contents, process: int, *, copied: bool) -> Share:
    """Return what a process saves. If it is copied, donation and changes do not affect it."""
    parts: dict[int, Any] = {}  # by leaf: rules may make several tensors of one
    for leaf in whole_leaves(contents.leaves.values()):
        if process == 0 or is_global(leaf):
            parts[id(leaf)] = leaf
    shapes = {id(leaf): contents.infos[name].shape for name, leaf in contents.leaves.items()}
    for key, leaf in parts.items():
        if is_global(leaf):
            parts[key] = owned(leaf, shapes.get(key, leaf.shape))
    if copied:
        copies = iter(snapshot(arrays_of(parts.values())))
        parts = {key: with_arrays(part, copies) for key, part in parts.items()}
    return with_leaves(contents.leaves, parts)


def size_of(share: Share, infos: Mapping[str, TensorInfo]) -> int:
    """Return how many bytes of tensors a share has, for progress."""
    return sum(_size_of(part, infos[name]) for name, part in share.items())


def _size_of(part: Any, info: TensorInfo) -> int:
    if isinstance(part, Owned):
        return part.nbytes(info)
    if isinstance(part, Assembled):
        return sum(_size_of_member(member, info) for member in part.members)
    return info.nbytes


def _size_of_member(member: Member, info: TensorInfo) -> int:
    """Return the size of a leaf's part of a tensor, as if each of its tensors had equally much."""
    view = member.view
    whole = math.prod(view.shape) * info.itemsize
    return _size_of(member.leaf, info._replace(nbytes=whole)) // len(view.names)


def own_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], share: Share, start: int
) -> Iterator[Chunk]:
    """Yield the bytes of a share that belong to a file whose data start at `start`."""
    return _arranged(_own_chunks(file, infos, share, start - len(file.head)))


def _own_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], share: Share, shift: int
) -> Iterator[Chunk]:
    parts = [
        (begin + shift, infos[name], part)
        for name, begin in zip(file.tensors, file.starts(infos), strict=True)
        if name in share
        for part in parts_of(share[name], infos[name])
    ]
    copies = copied_ahead(arrays_of(part for _, _, part in parts))
    for start, info, part in parts:
        # No name here keeps a copy, so that it is freed before the next one is made.
        chunks = chunks_of(with_arrays(part, copies), info)
        yield from ((start + offset, piece) for offset, piece in chunks)


def _arranged(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield the same bytes in chunks of a good size: join small neighbors, and split large chunks."""
    waiting = bytearray()
    start = 0
    for offset, piece in chunks:
        follows = offset == start + len(waiting)
        if waiting and not (follows and len(piece) < _SMALL and len(waiting) < _JOINED):
            yield start, memoryview(waiting)
            waiting = bytearray()
        if len(piece) < _SMALL:
            start = start if waiting else offset
            waiting += piece
        else:
            for cut in range(0, len(piece), _LARGEST):
                yield offset + cut, piece[cut : cut + _LARGEST]
        del piece  # the next one may need the memory
    if waiting:
        yield start, memoryview(waiting)


# --- blocks to hash ---------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of a tensor: its file, and where it is in that, in bytes."""

    file: int
    name: str
    start: int
    stop: int


def blocks_of(plan: SavePlan, starts: Sequence[int]) -> list[Block]:
    """List the blocks of all tensors, with the data of each file at its start."""
    found = []
    for number, (file, start) in enumerate(zip(plan.files, starts, strict=True)):
        shift = start - len(file.head)
        for name, begin in zip(file.tensors, file.starts(plan.infos), strict=True):
            origin = begin + shift
            bounds = block_bounds(plan.infos[name].nbytes)
            found += [Block(number, name, origin + first, origin + last) for first, last in bounds]
    return found


def split_blocks(blocks: Sequence[Block], count: int) -> list[Sequence[Block]]:
    """Divide blocks among processes, in runs of about equal size."""
    ends = list(accumulate(block.stop - block.start + _EACH for block in blocks))
    total = ends[-1] if ends else 0
    shares: list[list[Block]] = [[] for _ in range(count)]
    for block, end in zip(blocks, ends, strict=True):
        shares[(end - 1) * count // total].append(block)
    return list(shares)


def digests_of(plan: SavePlan, blocks: Iterable[Block], hashes: Iterable[bytes]) -> dict[str, str]:
    """Return the digest of each tensor from the hashes of all blocks."""
    of_tensor: dict[str, list[bytes]] = {name: [] for name in plan.infos}
    for block, found in zip(blocks, hashes, strict=True):
        of_tensor[block.name].append(found)
    return {name: digest_tensor(name, info, of_tensor[name]) for name, info in plan.infos.items()}

"""The share that one process has in a save: the bytes that it writes, and the blocks that it hashes.

Specification: *Saving*, *Digests*.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

from pytree2safetensors._format.digests import block_bounds, digest_tensor
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled
from pytree2safetensors._leaves.encode import host_array
from pytree2safetensors._leaves.ownership import is_global
from pytree2safetensors._leaves.spread import Owned, owned, owned_chunks, tensor_chunks
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.plan import FilePlan, SavePlan
from pytree2safetensors._types import Chunk

_SMALL: Final = 1 << 16  # bytes: smaller chunks are written together
_JOINED: Final = 4 << 20  # bytes that are written together
_LARGEST: Final = 32 << 20  # bytes of one write, so that interrupts and progress are seen often
_EACH: Final = 4096  # bytes that could be hashed in the time that reading one more block takes

# The leaves of which a process saves something: its shards of global arrays, and on process 0 all
# other leaves.
Share = Mapping[str, Any]


def share_of(contents: Contents, process: int, *, copied: bool) -> Share:
    """Return what a process saves; copied, it is safe from donation and changes."""
    share: dict[str, Any] = {}
    copies: dict[int, Any] = {}  # rules may make several tensors of one leaf

    def part_of(leaf: Any, info: TensorInfo) -> Any:
        part = owned(leaf, info) if is_global(leaf) else leaf
        if not copied:
            return part
        if id(leaf) not in copies:
            copies[id(leaf)] = part.copied() if isinstance(part, Owned) else host_array(leaf).copy()
        return copies[id(leaf)]

    for name, leaf in contents.leaves.items():
        if isinstance(leaf, Assembled):
            members = [
                member._replace(leaf=part_of(member.leaf, _info_of(member.leaf)))
                for member in leaf.members
                if process == 0 or is_global(member.leaf)
            ]
            if members:
                share[name] = leaf._replace(members=members)
        elif process == 0 or is_global(leaf):
            share[name] = part_of(leaf, contents.infos[name])
    return share


def _info_of(leaf: Any) -> TensorInfo:
    """Return what regions of a leaf need that is not stored as it is."""
    return TensorInfo("", getattr(leaf, "shape", ()), 0)


def size_of(share: Share, infos: Mapping[str, TensorInfo]) -> int:
    """Return how many bytes of tensors a share has, for progress."""
    return sum(_size_of(part, infos[name]) for name, part in share.items())


def _size_of(part: Any, info: TensorInfo) -> int:
    if isinstance(part, Owned):
        return part.nbytes(info)
    if isinstance(part, Assembled) and any(isinstance(m.leaf, Owned) for m in part.members):
        return sum(m.leaf.nbytes(info) // len(m.view.names) for m in part.members)
    return info.nbytes


def own_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], share: Share, start: int
) -> Iterator[Chunk]:
    """Give the bytes of a share that belong to a file whose data begin at `start`."""
    return _arranged(_own_chunks(file, infos, share, start - len(file.head)))


def _own_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], share: Share, shift: int
) -> Iterator[Chunk]:
    for name, begin in zip(file.tensors, file.starts(infos), strict=True):
        if name in share:
            part, info = share[name], infos[name]
            is_owned = isinstance(part, Owned)
            chunks = owned_chunks(part, info) if is_owned else tensor_chunks(part, info)
            for offset, piece in chunks:
                yield begin + shift + offset, piece


def _arranged(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Give the same bytes in chunks of a good size: small neighbours together, large ones cut."""
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

"""The bytes of a file in chunks: large tensors one by one, small ones joined.

Specification: *Saving*.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled
from pytree2safetensors._leaves.encode import joined_bytes
from pytree2safetensors._leaves.host_copies import copied_ahead
from pytree2safetensors._leaves.spread import tensor_chunks
from pytree2safetensors._save.plan import FilePlan
from pytree2safetensors._types import Chunk

_SMALL: Final = 1 << 16  # bytes: smaller tensors are joined
_JOINED: Final = 4 << 20  # bytes to write together


def data_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], leaves: Mapping[str, Any]
) -> Iterator[Chunk]:
    """Yield the data of a file in order, each chunk with its offset from the start of the file."""
    start = len(file.head)
    found = [leaves[name] for name in file.tensors]
    of_file = [infos[name] for name in file.tensors]
    are_small = [
        info.nbytes < _SMALL and type(leaf) is not Assembled
        for info, leaf in zip(of_file, found, strict=True)
    ]
    copies = copied_ahead(found)
    for first, stop in _groups(of_file, are_small):
        group, of_group = [*islice(copies, stop - first)], of_file[first:stop]
        if are_small[first]:
            yield start, memoryview(joined_bytes(group, of_group))
        else:
            # No name here keeps the leaf, so that a copy is freed before the next one is made.
            chunks = tensor_chunks(group.pop(), of_group[0])
            yield from ((start + offset, piece) for offset, piece in chunks)
        start += sum(info.nbytes for info in of_group)


def _groups(infos: Sequence[TensorInfo], are_small: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the start and the stop of small tensors to join, and of each other one."""
    first = size = 0
    for position, is_small in enumerate(are_small):
        if is_small:
            size += infos[position].nbytes
            if size < _JOINED:
                continue
        elif first < position:
            yield first, position
            first = position
        yield first, position + 1
        first, size = position + 1, 0
    if first < len(infos):
        yield first, len(infos)

"""The bytes of a file in chunks: large tensors one by one, small ones joined.

Specification: *Saving*.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled
from pytree2safetensors._leaves.encode import joined_bytes
from pytree2safetensors._leaves.host_copies import copied_ahead
from pytree2safetensors._leaves.spread import Owned
from pytree2safetensors._save.parts import arrays_of, chunks_of, parts_of, with_arrays
from pytree2safetensors._save.plan import FilePlan
from pytree2safetensors._types import Chunk

_SMALL: Final = 1 << 16  # bytes: smaller tensors are joined
_JOINED: Final = 4 << 20  # bytes to write together
_IN_PARTS: Final = frozenset({Assembled, Owned})  # what is not one array


def data_chunks(
    file: FilePlan, infos: Mapping[str, TensorInfo], leaves: Mapping[str, Any]
) -> Iterator[Chunk]:
    """Yield the data of a file in order, each chunk with its offset from the start of the file."""
    start = len(file.head)
    infos_of = [infos[name] for name in file.tensors]
    given = [leaves[name] for name in file.tensors]
    groups = [*_groups(infos_of, given)]
    parts = [
        given[first:stop] if are_small else parts_of(given[first], infos_of[first])
        for first, stop, are_small in groups
    ]
    copies = copied_ahead(arrays_of(chain.from_iterable(parts)))
    for (first, stop, are_small), group in zip(groups, parts, strict=True):
        info = infos_of[first]
        if are_small:
            joined = joined_bytes([*islice(copies, stop - first)], infos_of[first:stop])
            yield start, memoryview(joined)
            start += len(joined)
            continue
        for part in group:
            # No name here keeps a copy, so that it is freed before the next one is made.
            chunks = chunks_of(with_arrays(part, copies), info)
            yield from ((start + offset, piece) for offset, piece in chunks)
        start += info.nbytes


def _groups(infos: Sequence[TensorInfo], leaves: Sequence[Any]) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and the stop of each group, and whether its tensors are small, to be joined."""
    first = size = 0
    for position, (info, leaf) in enumerate(zip(infos, leaves, strict=True)):
        if info.nbytes < _SMALL and type(leaf) not in _IN_PARTS:
            size += info.nbytes
            if size < _JOINED:
                continue
            yield first, position + 1, True
        else:
            if first < position:
                yield first, position, True
            yield position, position + 1, False
        first, size = position + 1, 0
    if first < len(infos):
        yield first, len(infos), True

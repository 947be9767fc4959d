"""The bytes of a file in chunks: large tensors one by one, small ones joined.

Specification: *Saving*.
"""

from collections.abc import Iterator, Mapping
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
    small: list[Any] = []  # leaves to be joined,
    of_small: list[TensorInfo] = []  # and their infos
    size = 0
    copies = copied_ahead([leaves[name] for name in file.tensors])
    for name, leaf in zip(file.tensors, copies, strict=True):
        info = infos[name]
        is_small = info.nbytes < _SMALL and not isinstance(leaf, Assembled)
        if is_small:
            small.append(leaf)
            of_small.append(info)
            size += info.nbytes
            if size < _JOINED:
                continue
        if small:
            yield start, memoryview(joined_bytes(small, of_small))
            start += size
            small, of_small, size = [], [], 0
        if not is_small:
            for offset, piece in tensor_chunks(leaf, info):
                yield start + offset, piece
            start += info.nbytes
    if small:
        yield start, memoryview(joined_bytes(small, of_small))

"""The bytes of a file in order."""

from collections.abc import Iterator
from typing import Final

from pytree2safetensors._format.header import Plan
from pytree2safetensors._leaves.encode import joined_bytes
from pytree2safetensors._leaves.spread import tensor_pieces
from pytree2safetensors._save.contents import Contents

_SMALL: Final = 1 << 16  # bytes: smaller tensors are written together


_JOINED: Final = 4 << 20  # bytes that are written together


def pieces(planned: Plan, contents: Contents) -> Iterator[memoryview]:
    """The bytes of a file in order: large tensors as they are, small ones joined."""
    yield memoryview(planned.head)
    infos, leaves, _ = contents
    small: list[str] = []
    size = 0
    for name in planned.order:
        nbytes = infos[name].nbytes
        if nbytes < _SMALL:
            small.append(name)
            size += nbytes
            if size < _JOINED:
                continue
        if small:
            yield _joined(small, contents)
            small, size = [], 0
        if nbytes >= _SMALL:
            for _, piece in tensor_pieces(leaves[name], infos[name]):
                yield piece
    if small:
        yield _joined(small, contents)


def _joined(names: list[str], contents: Contents) -> memoryview:
    """The bytes of small tensors, one after the other."""
    infos, leaves, _ = contents
    return memoryview(
        joined_bytes([leaves[name] for name in names], [infos[name] for name in names])
    )

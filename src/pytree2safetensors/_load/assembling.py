"""Leaves that rules make of several regions of tensors: their memory, until all are there.

Specification: *Rules*.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import errors_of
from pytree2safetensors._format.tensor import BITS
from pytree2safetensors._leaves.decode import from_bytes
from pytree2safetensors._leaves.extents import shape_of, within
from pytree2safetensors._leaves.staging import aligned
from pytree2safetensors._leaves.views import to_leaf
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.plan import Assembly, Piece


class Assembler:
    """Has the memory of leaves that are not complete yet."""

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._memory: dict[int, list[NDArray[np.uint8]]] = {}  # of each box of an assembly
        self._missing: dict[int, int] = {}  # how many regions an assembly still lacks

    def memory_for(self, piece: Piece, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        """Return the memory of a piece's box, and where the piece of so many bytes begins in it."""
        number, view, _, boxes, *_ = piece.assembly
        if number not in self._memory:
            itemsize = BITS[self.checkpoint.infos[view.names[0]].dtype] // 8
            self._memory[number] = [aligned(math.prod(box.shape) * itemsize) for box in boxes]
        position = 0
        *indices, _ = piece.place
        for index, size in zip(indices, boxes[piece.box].shape, strict=False):
            position = position * size + index
        return self._memory[number][piece.box], position * nbytes

    def found(self, piece: Piece, values: NDArray[Any]) -> NDArray[Any] | None:
        """Say that a piece has been read; return what its assembly holds if it was the last one.

        Returns:
            The values in the order of the file; in that of the leaf, if the leaf has several boxes.
        """
        number, view, region, boxes, _, count = piece.assembly
        if count == 1:
            return values.reshape(boxes[0].shape)
        self._missing[number] = self._missing.get(number, count) - 1
        if self._missing[number]:
            return None
        parts = [
            self._values(piece.assembly, memory, box.shape)
            for memory, box in zip(self._memory.pop(number), boxes, strict=True)
        ]
        if len(boxes) == 1:
            return parts[0]
        leaf = np.empty(shape_of(region), parts[0].dtype)
        for part, box in zip(parts, boxes, strict=True):
            leaf[within(box.region, region)] = to_leaf(view, box, part)
        return leaf

    def _values(
        self, assembly: Assembly, memory: NDArray[np.uint8], shape: tuple[int, ...]
    ) -> NDArray[Any]:
        name = assembly.view.names[0]
        info = self.checkpoint.infos[name]._replace(shape=shape, nbytes=len(memory))
        with errors_of(self.checkpoint.label):
            return from_bytes(memory, info, name)


def rearranged(assembly: Assembly, values: Any) -> Any:
    """Show what an assembly holds, an array of NumPy or JAX, as the region of the leaf."""
    if len(assembly.boxes) > 1:
        return values
    return to_leaf(assembly.view, assembly.boxes[0], values)

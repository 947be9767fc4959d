"""Leaves that rules make of several regions of tensors: their memory, until all are there.

Specification: *Rules*.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import errors_of
from pytree2safetensors._leaves.as_bits import moved_as_bits
from pytree2safetensors._leaves.cast import cast_array
from pytree2safetensors._leaves.decode import from_bytes
from pytree2safetensors._leaves.regions import shape_of, within
from pytree2safetensors._leaves.staging import aligned
from pytree2safetensors._leaves.to_jax import own_programs
from pytree2safetensors._leaves.views import tiled, to_leaf
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.slots import Assembly, Piece


class Assembler:
    """Holds the memory of leaves that are not complete yet."""

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._memory: dict[int, list[NDArray[np.uint8]]] = {}  # of each box of an assembly
        self._converted: dict[int, list[NDArray[Any]]] = {}  # for tensors of several dtypes
        self._missing: dict[int, int] = {}  # how many regions an assembly still lacks
        # By assembly and use.
        self._arrays: dict[tuple[int, int], list[tuple[Piece, jax.Array]]] = {}

    def memory_for(self, piece: Piece, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        """Return the memory of the box of a piece, and the offset of the piece in it."""
        number, view, _, boxes, *_ = piece.assembly
        if number not in self._memory:
            itemsize = self.checkpoint.infos[view.names[0]].itemsize
            self._memory[number] = [aligned(math.prod(box.shape) * itemsize) for box in boxes]
        position = 0
        *indices, _ = piece.place
        for index, size in zip(indices, boxes[piece.box].shape, strict=False):
            position = position * size + index
        return self._memory[number][piece.box], position * nbytes

    def found(self, piece: Piece, values: NDArray[Any]) -> NDArray[Any] | None:
        """Record that a piece has been read; return the values of its assembly if it was the last.

        Returns:
            The values in the order of the file, or in the order of the leaf if it has several boxes.
        """
        number, view, region, boxes, _, count, _, dtype = piece.assembly
        if count == 1:
            return values.reshape(boxes[0].shape)
        if dtype is not None:
            if number not in self._converted:
                self._converted[number] = [_empty(box.shape, dtype) for box in boxes]
            self._converted[number][piece.box][piece.place] = cast_array(values, dtype)
        self._missing[number] = self._missing.get(number, count) - 1
        if self._missing[number]:
            return None
        parts = self._converted.pop(number, None) or [
            self._values(piece.assembly, memory, box.shape)
            for memory, box in zip(self._memory.pop(number), boxes, strict=True)
        ]
        if len(boxes) == 1:
            return parts[0]
        leaf = np.empty(shape_of(region), parts[0].dtype)
        for part, box in zip(parts, boxes, strict=True):
            leaf[within(box.region, region)] = to_leaf(view, box, part)
        return leaf

    def joined(
        self, piece: Piece, use: int, shape: tuple[int, ...] | None, array: jax.Array
    ) -> jax.Array | None:
        """Record the array of a piece on a device; return the region of the leaf if it was the last.

        Args:
            piece: The piece.
            use: Which of the uses of its assembly this is.
            shape: The shape to give the region, if it is not its own.
            array: The piece, on the device of the use.
        """
        number, view, _, boxes, *_ = piece.assembly
        key = number, use
        found = self._arrays.setdefault(key, [])
        found.append((piece, array))
        if len(found) < piece.assembly.pieces:
            return None
        del self._arrays[key]
        found.sort(key=lambda part: (part[0].box, part[0].place[:-1]))
        with own_programs():
            parts = []
            for index, box in enumerate(boxes):
                mine = [part for other, part in found if other.box == index]
                made = _join(mine, box.shape, view.order, shape_of(box.region))
                parts.append((box.region, made))
            regions, arrays = zip(*parts, strict=True)
            leaf: jax.Array = moved_as_bits(
                lambda found: tiled([*zip(regions, found, strict=True)]), arrays
            )
            return leaf if shape is None else leaf.reshape(shape)

    def _values(
        self, assembly: Assembly, memory: NDArray[np.uint8], shape: tuple[int, ...]
    ) -> NDArray[Any]:
        name = assembly.view.names[0]
        info = self.checkpoint.infos[name]._replace(shape=shape, nbytes=len(memory))
        with errors_of(self.checkpoint.label):
            return from_bytes(memory, info, name)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make an array whose memory JAX can use."""
    found: NDArray[Any] = np.ndarray(shape, dtype, aligned(math.prod(shape) * dtype.itemsize))
    return found


@partial(jax.jit, static_argnums=(1, 2, 3))
def _join(
    parts: list[jax.Array], shape: tuple[int, ...], order: tuple[int, ...], final: tuple[int, ...]
) -> jax.Array:
    """Stack parts, and view them as a region of a leaf, in one program."""
    stacked: jax.Array = moved_as_bits(jnp.stack, parts)
    return stacked.reshape(shape).transpose(order).reshape(final)


def rearranged(assembly: Assembly, values: Any) -> Any:
    """View the values of an assembly, a NumPy or JAX array, as the region of the leaf."""
    if len(assembly.boxes) > 1:
        return values
    return to_leaf(assembly.view, assembly.boxes[0], values)

"""What a plan of a load consists of: leaves that are wanted, regions of tensors, and batches of these.

Specification: *Loading*, *Loading into a template*.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.regions import Region, runs_in, shape_of
from pytree2safetensors._leaves.views import Box, View
from pytree2safetensors._load.template import TemplateLeaf

_LONG: Final = 1 << 16  # bytes: longer runs get a read of their own


class Wanted(NamedTuple):
    """A leaf to load: its tensors in the file, and what it becomes. Its sharding is concrete."""

    source: str | View  # its tensor, or the view that it is made of
    leaf: TemplateLeaf

    @property
    def name(self) -> str:
        """Return the name of its tensor, or of the first of its tensors."""
        if isinstance(self.source, str):
            return self.source
        return next(iter(self.source.names), "a stack of no tensors")


class Use(NamedTuple):
    """The use of a region: a leaf, by its position, on one device or as JAX places it.

    Attributes:
        position: The position of the leaf among the wanted leaves.
        sharding: Where JAX puts the values; None for its default device, or for the host.
        device: The device, if the values are only a part of the leaf.
    """

    position: int
    sharding: Sharding | None
    device: jax.Device | None


class Assembly(NamedTuple):
    """A region of a leaf that is made of regions of tensors.

    Attributes:
        number: The number that identifies it.
        view: What the leaf is made of.
        region: Of the leaf.
        boxes: What the region consists of, each with memory in the order of the file.
        uses: The uses of the region.
        pieces: How many regions of tensors make it.
        is_far: Whether the regions become arrays on their devices first, and are put together there.
        dtype: What the regions are converted to before they are put together; None if they have one
            dtype.
    """

    number: int
    view: View
    region: Region
    boxes: list[Box]
    uses: list[Use]
    pieces: int
    is_far: bool
    dtype: np.dtype[Any] | None


class Piece(NamedTuple):
    """Where a region of a tensor belongs in an assembly."""

    assembly: Assembly
    box: int
    place: tuple[Any, ...]  # the index that selects its memory from that of the box


class Rows:
    """Equal tensors at equal distances in the memory of a group.

    Attributes:
        info: How each of them is stored.
        start: Where the first is, in bytes from the start of the group.
        step: The bytes from the start of each to the start of the next.
        positions: The positions of their leaves among the wanted leaves.
    """

    __slots__ = ("info", "positions", "start", "step")

    def __init__(self, info: TensorInfo, start: int) -> None:
        self.info, self.start, self.step = info, start, 0
        self.positions: list[int] = []


class Slot(NamedTuple):
    """A region of a tensor, and where in a batch's memory to read it."""

    name: str
    info: TensorInfo  # of the tensor; by a rule, its shape is that of the view's fine axes
    region: Region | None  # None for the whole tensor
    offset: int  # in the batch's memory, or -1 for its own memory
    nbytes: int
    uses: list[Use]
    piece: Piece | None = None  # its part of a leaf, by a rule
    rows: Sequence[Rows] = ()  # the tensors of a group; name and info are those of the first
    is_kept: bool = False  # whether a leaf may keep the batch's memory


class Batch(NamedTuple):
    """Regions to read together, in the order of the file."""

    slots: list[Slot]
    size: int  # bytes of their shared memory


def is_direct(region: Region | None, info: TensorInfo) -> bool:
    """Return whether the runs of a region are few, or long enough to read one by one."""
    if region is None:
        return True
    number, length = runs_in(region, info.shape, info.itemsize)
    return number <= 1 or length >= _LONG


def nbytes_of(region: Region | None, info: TensorInfo) -> int:
    """Return the bytes of a region of a tensor."""
    if region is None:
        return info.nbytes
    return math.prod(shape_of(region)) * info.itemsize

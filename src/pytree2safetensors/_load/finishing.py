"""From the bytes of regions to leaves: one way for every kind of leaf.

Specification: *Loading*, *Loading into a template*.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import errors_of
from pytree2safetensors._leaves.cast import cast_array
from pytree2safetensors._leaves.decode import from_bytes, python_value, rows_of
from pytree2safetensors._leaves.regions import shape_of
from pytree2safetensors._leaves.spec import abstract
from pytree2safetensors._leaves.staging import aligned
from pytree2safetensors._leaves.to_jax import many_to_jax, to_jax, wrap_key
from pytree2safetensors._load.assembling import Assembler, rearranged
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.ranges import Place
from pytree2safetensors._load.shardings import (
    is_elsewhere,
    other_memory,
    weakened,
    without_shards,
)
from pytree2safetensors._load.slots import Piece, Slot, Use, Wanted
from pytree2safetensors._load.template import to_python

_AT_ONCE: Final = 8 << 20  # bytes of assembled leaves that become arrays of JAX together


class _Pending(NamedTuple):
    """Values that will become a JAX array, and what to do with it afterwards."""

    use: Use
    host: NDArray[Any]
    rearrange: Callable[[Any], Any] | None  # returns None if the leaf is not complete yet


class Finisher:
    """Makes leaves from batches of bytes."""

    def __init__(self, checkpoint: OpenCheckpoint, wanted: Sequence[Wanted]) -> None:
        self.checkpoint, self.wanted = checkpoint, wanted
        self.leaves: list[Any] = [None] * len(wanted)
        self._parts: dict[int, dict[jax.Device, jax.Array]] = {}  # of leaves in several regions
        self._assembled = Assembler(self.checkpoint)

    def memory_for(self, slot: Slot) -> tuple[NDArray[np.uint8], int]:
        """Return the memory of a region that does not share memory, and its offset in it."""
        piece = slot.piece
        if piece is None or piece.assembly.pieces == 1 or piece.assembly.dtype is not None:
            return aligned(slot.nbytes), 0
        return self._assembled.memory_for(piece, slot.nbytes)

    def finish(self, places: Sequence[Place], *, is_staged: bool) -> list[jax.Array]:
        """Make leaves from a batch; return the arrays that use its memory."""
        with collector_paused():
            grouped = [place for place in places if place.slot.rows]
            others = [place for place in places if not place.slot.rows]
            return self._finish_groups(grouped, is_staged) + self._finish(others, is_staged)

    def _finish_groups(self, places: Sequence[Place], is_staged: bool) -> list[jax.Array]:
        """Make leaves of groups of tensors."""
        kinds: dict[Any, tuple[list[int], list[Iterator[NDArray[Any]]]]] = {}
        for slot, memory, offset in places:
            for equal in slot.rows:
                want, count = self.wanted[equal.positions[0]], len(equal.positions)
                start = offset + equal.start
                with errors_of(self.checkpoint.label):
                    stored = rows_of(memory, equal.info, want.name, start, equal.step, count)
                rows = cast_array(stored, want.leaf.spec.dtype)
                kind = kinds.setdefault((rows.dtype, rows.shape[1:]), ([], []))
                kind[0].extend(equal.positions)
                kind[1].append(_arrays_in(rows))
        arrays: list[jax.Array] = []
        done: list[int] = []  # the positions of these
        others: list[int] = []
        hosts: list[NDArray[Any]] = []
        for (dtype, _), (positions, parts) in kinds.items():
            values = chain.from_iterable(parts)
            made = many_to_jax(values, len(positions), dtype, keeps_memory=not is_staged)
            arrays += made
            done += positions[: len(made)]
            others += positions[len(made) :]
            hosts += values  # those that are left
        arrays += to_jax(hosts, keeps_memory=not is_staged)
        for position, array in zip(done + others, arrays, strict=True):
            self.leaves[position] = array
        return arrays

    def _finish(self, places: Sequence[Place], is_staged: bool) -> list[jax.Array]:
        made: list[jax.Array] = []
        pending: list[_Pending] = []
        size = 0
        for place in places:
            piece = place.slot.piece
            if piece is None:
                values, uses = self._values(place), place.slot.uses
            elif piece.assembly.is_far and piece.assembly.pieces > 1:
                pending += self._for_joining(piece, self._values(place))
                continue
            else:
                found = self._assembled.found(piece, self._values(place))
                if found is None:
                    continue
                values, uses = found, piece.assembly.uses
            for use in uses:
                if self.wanted[use.position].leaf.target == "jax":
                    pending.append(self._for_jax(values, use, place))
                else:
                    self.leaves[use.position] = self._on_host(values, use.position, place)
            if piece is not None and (size := size + values.nbytes) > _AT_ONCE:
                made += self._to_jax(pending, is_staged)
                pending, size = [], 0
        return made + self._to_jax(pending, is_staged)

    def finish_unread(self) -> None:
        """Make the leaves that need no data: empty ones, and those of other processes."""
        for position, leaf in enumerate(self.leaves):
            if leaf is None:
                self.leaves[position] = self._unread(self.wanted[position])

    def _unread(self, want: Wanted) -> Any:
        spec, target, sharding, *_ = want.leaf
        if target == "jax" and sharding is not None and is_elsewhere(sharding):
            return self._weak(want, without_shards(abstract(spec), sharding), sharding)
        host = np.array([], spec.dtype).reshape(spec.shape)  # which fails if there are elements
        if target != "jax":
            return host
        if sharding is None:
            return to_jax([host])[0]
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def _to_jax(self, pending: Sequence[_Pending], is_staged: bool) -> list[jax.Array]:
        shardings = [use.sharding for use, *_ in pending]
        hosts = [
            # A backend might make such an array of the memory itself, which is used again.
            host.copy() if is_staged and other_memory(use.sharding) == "unpinned_host" else host
            for use, host, _ in pending
        ]
        arrays = to_jax(hosts, shardings, keeps_memory=not is_staged)
        for (use, _, rearrange), array in zip(pending, arrays, strict=True):
            made = array if rearrange is None else rearrange(array)
            if made is not None:
                self._place(use, made)
        return arrays

    def _values(self, place: Place) -> NDArray[Any]:
        """View the bytes of a region as values of the stored dtype."""
        slot = place.slot
        info = slot.info
        if slot.region is not None:
            info = info._replace(shape=shape_of(slot.region), nbytes=slot.nbytes)
        with errors_of(self.checkpoint.label):
            return from_bytes(place.memory, info, slot.name, place.offset)

    def _for_jax(self, values: NDArray[Any], use: Use, place: Place) -> _Pending:
        leaf = self.wanted[use.position].leaf
        values = cast_array(values, leaf.spec.dtype)
        piece = place.slot.piece
        shape = self._shard_shape(use)
        if shape is not None and leaf.spec.kind == "key":
            shape = (*shape, *place.slot.info.shape[len(leaf.spec.shape) :])

        def rearrange(array: Any) -> Any:
            if piece is not None:
                array = rearranged(piece.assembly, array)
            return array if shape is None else array.reshape(shape)

        if piece is None or not piece.assembly.is_far:
            return _Pending(use, rearrange(values), None)
        return _Pending(use, values, rearrange)  # the device does this faster

    def _for_joining(self, piece: Piece, values: NDArray[Any]) -> Iterator[_Pending]:
        for number, use in enumerate(piece.assembly.uses):
            leaf = self.wanted[use.position].leaf
            join = partial(self._assembled.joined, piece, number, self._shard_shape(use))
            yield _Pending(use, cast_array(values, leaf.spec.dtype), join)

    def _shard_shape(self, use: Use) -> tuple[int, ...] | None:
        """Return the shape of a part of a leaf. The shards of pmap lack an axis."""
        leaf = self.wanted[use.position].leaf
        if use.device is None or leaf.sharding is None:
            return None
        shape: tuple[int, ...] = leaf.sharding.shard_shape(leaf.spec.shape)
        return shape

    def _on_host(self, values: NDArray[Any], position: int, place: Place) -> Any:
        """Make a leaf that is not a JAX array."""
        piece, leaf = place.slot.piece, self.wanted[position].leaf
        if piece is not None:
            values = rearranged(piece.assembly, values)
            values = values if values.flags.c_contiguous else values.copy()
        if leaf.target == "python":
            return to_python(python_value(values, place.slot.info), leaf.spec)
        values = cast_array(values, leaf.spec.dtype)
        return values[()].copy() if leaf.target == "scalar" else values

    def _place(self, use: Use, array: jax.Array) -> None:
        """Make a leaf, or a part of one, from the JAX array of a region."""
        want = self.wanted[use.position]
        spec, sharding = want.leaf.spec, want.leaf.sharding
        if spec.kind == "key":
            array = wrap_key(array, spec.impl)
        if use.device is not None and sharding is not None:
            parts = self._parts.setdefault(use.position, {})
            parts[use.device] = array
            devices = sharding.addressable_devices_indices_map(spec.shape)
            if len(parts) < len(devices):
                return
            ordered = [parts[device] for device in devices]
            del self._parts[use.position]
            array = jax.make_array_from_single_device_arrays(spec.shape, sharding, ordered)
        array = self._weak(want, array, sharding)
        if want.leaf.format is not None and array.size:  # JAX makes wrong shards of no values
            array = jax.device_put(array, want.leaf.format)
        self.leaves[use.position] = array

    def _weak(self, want: Wanted, array: jax.Array, sharding: Sharding | None) -> jax.Array:
        """Make an array weakly typed if it was stored so and was not cast."""
        if not isinstance(want.source, str) or want.source not in self.checkpoint.note.leaves:
            return array
        stored = self.checkpoint.spec_of(want.source)
        if not stored.weak or array.dtype != stored.dtype:
            return array
        return weakened(array, sharding)


def _arrays_in(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Return the rows of an array one by one, which are arrays even if they have no axis."""
    return iter(rows) if rows.ndim > 1 else (rows[n, ...] for n in range(len(rows)))

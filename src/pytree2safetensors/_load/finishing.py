"""From the bytes of regions to leaves: one way for every leaf, whatever it becomes.

Specification: *Loading*, *Loading into a template*.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from pytree2safetensors._errors import errors_of
from pytree2safetensors._leaves.decode import cast_array, from_bytes, python_value
from pytree2safetensors._leaves.extents import shape_of
from pytree2safetensors._leaves.to_jax import to_jax, weaken, wrap_key
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.plan import Use, Wanted
from pytree2safetensors._load.ranges import Place
from pytree2safetensors._load.template import to_python


class Finisher:
    """Makes leaves of what was read, batch by batch."""

    def __init__(self, checkpoint: OpenCheckpoint, wanted: Sequence[Wanted]) -> None:
        self.checkpoint, self.wanted = checkpoint, wanted
        self.leaves: list[Any] = [None] * len(wanted)
        self._parts: dict[int, dict[jax.Device, jax.Array]] = {}  # of leaves in several regions
        # Most tensors share their shape and dtype with others.
        self._plain: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def finish(self, places: Sequence[Place], *, is_staged: bool) -> list[jax.Array]:
        """Make leaves of what a batch holds; return the arrays that are made of its memory."""
        uses: list[Use] = []
        hosts: list[NDArray[Any]] = []
        for place in places:
            values = self._values(place)
            for use in place.slot.uses:
                want = self.wanted[use.position]
                if want.leaf.target == "jax":
                    uses.append(use)
                    hosts.append(self._for_jax(values, use, place))
                else:
                    self.leaves[use.position] = self._on_host(values, want, place)
        # A sharding of keys is not one of their data.
        shardings = [None if self._is_key(use) else use.sharding for use in uses]
        arrays = to_jax(hosts, shardings, keeps_memory=not is_staged)
        for use, array in zip(uses, arrays, strict=True):
            self._place(use, array)
        return arrays

    def _values(self, place: Place) -> NDArray[Any]:
        """View the bytes of a region as its values, in their own dtype."""
        slot = place.slot
        info = slot.info
        if slot.region is None:
            plain = self._plain.get(id(info))
            if plain is not None:
                found: NDArray[Any] = np.ndarray(*plain, place.memory, place.offset)
                return found
        else:
            info = info._replace(shape=shape_of(slot.region), nbytes=slot.nbytes)
        with errors_of(self.checkpoint.label):
            values = from_bytes(place.memory, info, slot.name, place.offset)
        if slot.region is None and info.kind is None and info.dtype != "BOOL":
            self._plain[id(info)] = values.shape, values.dtype
        return values

    def _for_jax(self, values: NDArray[Any], use: Use, place: Place) -> NDArray[Any]:
        leaf = self.wanted[use.position].leaf
        values = cast_array(values, leaf.leaf.dtype)
        if use.device is None or leaf.sharding is None:
            return values
        shape = leaf.leaf.shape
        beyond = place.slot.info.shape[len(shape) :] if leaf.leaf.kind == "key" else ()
        return values.reshape((*leaf.sharding.shard_shape(shape), *beyond))

    def _is_key(self, use: Use) -> bool:
        return use.device is None and self.wanted[use.position].leaf.leaf.kind == "key"

    def _on_host(self, values: NDArray[Any], want: Wanted, place: Place) -> Any:
        leaf = want.leaf
        if leaf.target == "python":
            value = python_value(values, place.slot.info)
            return to_python(value, leaf.leaf)
        values = cast_array(values, leaf.leaf.dtype)
        return values[()].copy() if leaf.target == "scalar" else values

    def _place(self, use: Use, array: jax.Array) -> None:
        """Make what JAX has of a region a leaf, or a part of one."""
        want = self.wanted[use.position]
        spec, sharding = want.leaf.leaf, want.leaf.sharding
        if spec.kind == "key":
            array = wrap_key(array, spec.impl)
            if use.device is None and sharding is not None:
                array = jax.device_put(array, sharding)
        if use.device is not None and sharding is not None:
            parts = self._parts.setdefault(use.position, {})
            parts[use.device] = array
            devices = sharding.addressable_devices_indices_map(spec.shape)
            if len(parts) < len(devices):
                return
            ordered = [parts[device] for device in devices]
            del self._parts[use.position]
            array = jax.make_array_from_single_device_arrays(spec.shape, sharding, ordered)
        self.leaves[use.position] = self._weak(want, array, sharding)

    def _weak(self, want: Wanted, array: jax.Array, sharding: Sharding | None) -> jax.Array:
        """Make an array weakly typed if the stored one was, and was not cast."""
        if want.name not in self.checkpoint.note.leaves:
            return array
        stored = self.checkpoint.spec_of(want.name)
        if not stored.weak or array.dtype != stored.dtype:
            return array
        weak = weaken(array)
        if sharding is None or weak.sharding == sharding:
            return weak
        placed: jax.Array = jax.device_put(weak, sharding)
        return placed

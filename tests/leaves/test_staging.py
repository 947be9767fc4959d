"""Memory to read into: a ring that is used again, and memory that a device can read directly."""

from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors._leaves import jax_versions, staging
from pytree2safetensors._leaves.staging import Ring


class Late:
    """An array whose zeros arrive when it is waited for."""

    def __init__(self, memory: Any) -> None:
        self.memory, self.size = memory, memory.size

    def block_until_ready(self) -> "Late":
        self.memory[:] = 0
        return self

    def unsafe_buffer_pointer(self) -> int:
        address: int = self.memory.ctypes.data
        return address


@pytest.mark.skipif(
    jax_versions.pinned_sharding(jax.sharding.SingleDeviceSharding(jax.devices()[0])) is None,
    reason="the CPU devices of this JAX have no pinned memory",
)
def test_pinned_memory_is_handed_out_after_its_zeros_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = np.ones(64, np.uint8)
    monkeypatch.setattr(jax, "device_put", lambda *_: Late(memory))
    started = staging.StartedMemory(jax.devices()[0], 64)
    assert memory.all()  # nothing waits for it yet
    found = started.get()
    assert not found.any()
    found[:] = 5
    assert (memory == 5).all()


def test_a_device_without_pinned_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("UNIMPLEMENTED")  # as some backends do

    monkeypatch.setattr(jax, "device_put", refuse)
    assert staging._start_pinning(jax.devices()[0], 64) is None
    assert staging.StartedMemory(jax.devices()[0], 64).get().size == 64


def test_other_memory_takes_the_place_of_pinned_memory_that_never_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failed(Late):
        def block_until_ready(self) -> "Late":
            raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "device_put", lambda *_: Failed(np.ones(64, np.uint8)))
    found = staging.StartedMemory(jax.devices()[0], 64).get()
    found[:] = 5
    assert found.size == 64


def test_a_sharding_of_a_device_without_pinned_memory_has_no_pinned_form() -> None:
    class Sharding:
        def with_memory_kind(self, kind: str) -> "Sharding":
            raise ValueError(f"Could not find memory addressable by device; {kind} is unknown")

    assert jax_versions.pinned_sharding(Sharding()) is None


def test_the_ring_takes_less_than_512_mebibytes() -> None:
    # JAX rounds each piece up to a power of two, and needs some room for small arrays of its own.
    taken = [1 << size.bit_length() for size in staging.RING]
    assert sum(taken) <= 448 << 20
    assert all(size <= whole - (1 << 20) for size, whole in zip(staging.RING, taken, strict=True))


def test_an_empty_batch_does_not_make_a_full_piece_look_free() -> None:
    """Hypothesis found it: a later batch had the memory of one that was still on its way."""
    ring = Ring(jax.devices()[0], (1024,))
    for size in (512, 512):
        assert ring.take(size) is not None
        ring.transferred([])
    ring.release()
    assert ring.take(512) is not None
    assert ring.take(0) is None
    assert ring.take(256) is None


# Batches may be without bytes, if their tensors have memory of their own; some fill a piece exactly.
SIZES = st.integers(0, 5000) | st.sampled_from([0, 256, 2048, 4096])


@given(st.lists(SIZES, max_size=60), st.randoms(use_true_random=False))
def test_batches_in_a_ring_never_overlap(sizes: list[int], random: Any) -> None:
    pieces = (4096, 8192)
    ring = Ring(jax.devices()[0], pieces)
    live: list[tuple[int, int]] = []  # taken, the oldest first
    waiting = 0  # of these, how many are not being transferred yet
    for size in sizes:
        while waiting and random.random() < 0.4:
            ring.transferred([])
            waiting -= 1
        while (memory := ring.take(size)) is None and ring.moving:
            ring.release()
            live.pop(0)
        assert waiting + len(ring.moving) == len(live)
        assert len(ring.taken) == len(live) + (memory is not None)
        if memory is None:
            assert waiting  # or there would be room, as no batch is larger than a piece
            continue
        waiting += 1
        live.append((memory.ctypes.data, len(memory)))
        assert len(memory) >= size
        spans = sorted(live)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        whole = [(piece.memory.ctypes.data, len(piece.memory)) for piece in ring.pieces]
        assert {size for _, size in whole} <= {*pieces}
        for start, length in spans:
            assert any(at <= start and start + length <= at + size for at, size in whole)

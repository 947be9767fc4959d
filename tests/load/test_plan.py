"""Plans of loads: which regions of tensors are read together."""

import math
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from placed import P
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load import plan
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.ranges import _SHORT, Place, in_file_order, plan_reads
from pytree2safetensors._load.slots import Batch, Slot, Wanted
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._storage.byte_source import ByteSource, Read
from pytree2safetensors._storage.file_source import FileSource
from pytree2safetensors._storage.read_pool import ReadPool

FILE = object.__new__(FileSource)
ROWS = 8


def checkpoint_of(widths: list[int], digested: bool) -> OpenCheckpoint:
    """Tensors of eight rows, one after the other."""
    checkpoint = OpenCheckpoint("the file", [])
    checkpoint.digests = {} if digested else None
    sizes = [4 * ROWS * width for width in widths]
    checkpoint.infos = {
        f"{n}": TensorInfo("F32", (ROWS, width), size)
        for n, (width, size) in enumerate(zip(widths, sizes, strict=True))
    }
    checkpoint.places = {f"{n}": (FILE, sum(sizes[:n])) for n in range(len(sizes))}
    return checkpoint


def leaf_of(*shape: int, sharding: Any = None) -> TemplateLeaf:
    return TemplateLeaf(LeafSpec("array", np.dtype(np.float32), shape), "jax", sharding)


def stacked(names: list[str], width: int) -> Wanted:
    whole = ((0, ROWS), (0, width))
    axes = ((0,), (1,), (2,))
    view = View((*names,), (ROWS, width), (len(names),), (ROWS, width), whole, axes)
    return Wanted(view, leaf_of(len(names), ROWS, width))


def batches_of(checkpoint: OpenCheckpoint, wanted: list[Wanted], limit: int) -> list[Batch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_CUT_BY_JAX", 0)
        return [*plan.plan_batches(checkpoint, wanted, limit, lambda _: False, lambda _: False)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["whole", "rows", "stacked"]), st.integers(128, 400)),
        max_size=8,
    ),
    st.integers(TAKEN_OVER, 20 * TAKEN_OVER),
    st.booleans(),
)
def test_a_batch_is_as_large_as_it_can_be(
    leaves: list[tuple[str, int]], limit: int, digested: bool
) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    wanted: list[Wanted] = []
    widths: list[int] = []
    for kind, width in leaves:
        names = [f"{len(widths) + n}" for n in range(3 if kind == "stacked" else 1)]
        sharding = NamedSharding(mesh, P("x")) if kind == "rows" else None
        plain = Wanted(names[0], leaf_of(ROWS, width, sharding=sharding))
        wanted.append(stacked(names, width) if kind == "stacked" else plain)
        widths += [width] * len(names)
    checkpoint = checkpoint_of(widths, digested)
    batches = batches_of(checkpoint, wanted, limit)

    def bytes_of(batch: Batch) -> int:
        return batch.size + sum(slot.nbytes for slot in batch.slots if slot.offset < 0)

    read = dict.fromkeys(checkpoint.infos, 0)
    for batch in batches:
        assert bytes_of(batch) <= limit or len({slot.name for slot in batch.slots}) == 1
        assert bytes_of(batch) <= limit or len(batch.slots) == 1 or digested
        stop = 0
        for slot in batch.slots:
            read[slot.name] += slot.nbytes
            if slot.offset >= 0:
                assert stop <= slot.offset < stop + ALIGNMENT
                assert slot.offset % ALIGNMENT == 0 or slot.nbytes < TAKEN_OVER
                stop = slot.offset + slot.nbytes
        assert batch.size == stop
    assert read == {name: info.nbytes for name, info in checkpoint.infos.items()}
    for batch, following in pairwise(batches):
        if not digested:
            assert bytes_of(batch) + ALIGNMENT + following.slots[0].nbytes > limit
        elif batch.slots[-1].region is not None:  # its digest is that of the whole tensor
            assert batch.slots[-1].name != following.slots[0].name


@pytest.mark.parametrize("keeps_memory", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_what_keeps_the_memory_of_the_host_is_put_together_there(
    keeps_memory: bool, far: bool
) -> None:
    checkpoint = checkpoint_of([2, 2], digested=False)
    wanted = [stacked(["0", "1"], 2)]
    [batch] = plan.plan_batches(checkpoint, wanted, 1 << 20, lambda _: keeps_memory, lambda _: far)
    together = far and not keeps_memory  # on the device
    for slot in batch.slots:
        assert slot.piece is not None
        assert slot.piece.assembly.is_far is together
        assert (slot.offset >= 0) is together


def test_regions_are_read_in_the_order_of_the_file() -> None:
    checkpoint = checkpoint_of([1] * 12, digested=True)
    wanted = [Wanted(f"{n}", leaf_of(ROWS, 1)) for n in reversed(range(12)) if n not in {2, 10}]
    [batch] = batches_of(checkpoint, [*wanted, stacked(["2", "10"], 1)], 1 << 20)
    # The tensors of one leaf follow each other.
    assert [slot.name for slot in batch.slots] == [*"012", "10", *"3456789", "11"]


@pytest.mark.parametrize("copies", [[True], [False], [True, False], [False, True], [True, True]])
def test_memory_is_kept_if_any_of_its_leaves_keeps_it(copies: list[bool]) -> None:
    checkpoint = checkpoint_of([TAKEN_OVER], digested=False)
    whole = Wanted("0", leaf_of(ROWS, TAKEN_OVER))
    half = LeafSpec("array", np.dtype(np.float16), (ROWS, TAKEN_OVER))
    cast = Wanted("0", TemplateLeaf(half, "jax", None))
    wanted = [cast if is_copied else whole for is_copied in copies]
    [batch] = batches_of(checkpoint, wanted, 1 << 20)
    [slot] = batch.slots
    assert len(slot.uses) == len(copies)
    assert slot.is_kept is not all(copies)


def test_only_what_leaves_do_not_keep_fills_a_batch() -> None:
    sizes = [128] * 4
    kept = [Wanted(f"{n}", leaf_of(ROWS, 128)) for n in range(4)]
    parts = [stacked(["0", "1"], 128), stacked(["2", "3"], 128)]
    for wanted, counts in (kept, [4]), (parts, [2, 2]):
        checkpoint = checkpoint_of(sizes, digested=False)
        limit = 2 * TAKEN_OVER
        batches = plan.plan_batches(checkpoint, wanted, limit, lambda _: True, lambda _: False)
        assert [len(batch.slots) for batch in batches] == counts


def test_a_leaf_of_one_tensor_shares_the_memory_of_its_batch() -> None:
    checkpoint = checkpoint_of([128, 128], digested=False)
    wanted = [stacked(["0"], 128), stacked(["1"], 128)]
    [batch] = batches_of(checkpoint, wanted, 2 * TAKEN_OVER)
    assert [slot.offset for slot in batch.slots] == [0, TAKEN_OVER]


def test_reads_are_joined_within_a_file() -> None:
    checkpoint = checkpoint_of([2, 2], digested=False)
    (first, start), second = checkpoint.places["1"], object.__new__(FileSource)
    memory = np.empty(2 * start, np.uint8)
    places = [
        Place(Slot(name, info, None, offset, info.nbytes, []), memory, offset)
        for (name, info), offset in zip(checkpoint.infos.items(), (0, start), strict=True)
    ]
    for source, sizes in (first, [2 * start]), (second, [start, start]):
        checkpoint.places["1"] = source, start
        reads, _ = plan_reads(checkpoint, places, lambda _: None)
        assert [len(read.buffer) for read in reads] == sizes
        assert [reads[0].source, reads[-1].source] == [first, source]


def test_short_gaps_of_a_file_are_read() -> None:
    files = [ByteSource(label, 0) for label in ("first", "second")]
    files.sort(key=id)
    memory = memoryview(bytearray(40))
    starts = [0, 10 + _SHORT, 21 + 2 * _SHORT, 31 + 2 * _SHORT]
    reads = [Read(files[0], start, memory[:10]) for start in starts]
    reads.append(Read(files[1], starts[-1] + 11, memory[:10]))
    found = [(read.source, read.offset, len(read.buffer)) for read in in_file_order(reads[::-1])]
    expected = [(read.source, read.offset, 10) for read in reads]
    assert found == [expected[0], (files[0], 10, _SHORT), *expected[1:]]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=20), st.integers(1, 999)
)
def test_only_wanted_bytes_are_reported(runs: list[tuple[int, int]], piece: int) -> None:
    class Zeros(ByteSource):
        def read_into(self, buffers: list[memoryview], offset: int) -> int:
            return sum(map(len, buffers))

    source, reads, offset = Zeros("zeros", 0), list[Read](), 0
    for wanted, gap in runs:
        reads.append(Read(source, offset, memoryview(bytearray(wanted))))
        offset += wanted + gap
    told: list[int] = []
    with ReadPool(1, piece) as pool:
        for task in pool.start(in_file_order(reads), (), told.append):
            task.result()
    assert sum(told) == sum(wanted for wanted, _ in runs)


def test_an_empty_tensor_is_not_read() -> None:
    checkpoint = checkpoint_of([0, 2], digested=False)
    places = [
        Place(Slot(name, info, None, 0, info.nbytes, []), np.empty(info.nbytes, np.uint8), 0)
        for name, info in checkpoint.infos.items()
    ]
    reads, tasks = plan_reads(checkpoint, [*places, places[0]], lambda _: None)
    assert [len(read.buffer) for read in reads] == [math.prod((ROWS, 2, 4))]
    assert not tasks


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, TAKEN_OVER - 1, TAKEN_OVER, 2 * TAKEN_OVER, 3 * TAKEN_OVER]),
            st.sampled_from(["kept", "copied", "own"]),
        ),
        max_size=12,
    )
)
def test_what_leaves_keep_shares_no_memory_with_what_is_copied(
    regions: list[tuple[int, str]],
) -> None:
    slots, size = list[Slot](), 0
    for number, (nbytes, kind) in enumerate(regions):
        info = TensorInfo("U8", (nbytes,), nbytes)
        offset = -1 if kind == "own" else -(-size // ALIGNMENT) * ALIGNMENT
        slots.append(Slot(f"{number}", info, None, offset, nbytes, [], is_kept=kind == "kept"))
        size = size if kind == "own" else offset + nbytes
    before = {
        kind: sum(
            slot.nbytes for slot in slots if shares(slot) and slot.is_kept == (kind == "kept")
        )
        for kind in ("kept", "copied")
    }
    found = plan.separated(Batch(slots, size))
    assert [slot._replace(offset=0) for slot in found.slots] == [
        slot._replace(offset=0) for slot in slots
    ]
    assert found.size == size  # pages that nothing is read into take no memory
    assert all(a.offset in {b.offset, -1} for a, b in zip(found.slots, slots, strict=True))
    assert len({slot.is_kept for slot in found.slots if shares(slot)}) <= 1
    assert sum(slot.nbytes for slot in found.slots if shares(slot)) == max(before.values())
    small = [slot for slot in slots if not shares(slot)]
    assert [slot for slot in found.slots if slot in small] == small


def shares(slot: Slot) -> bool:
    """Whether a region is in the memory of its batch, and large enough that a leaf keeps it."""
    return slot.offset >= 0 and slot.nbytes >= TAKEN_OVER

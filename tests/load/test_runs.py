"""Runs: which small tensors are read as one."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.runs import is_small_plain, plan_runs
from pytree2safetensors._load.slots import Slot, Wanted
from pytree2safetensors._load.template import TemplateLeaf

INFOS = [TensorInfo("U8", (size,), size) for size in (1, 3, 64)]
LEAVES = [TemplateLeaf(LeafSpec("array", np.dtype("u1"), (3,)), "jax") for _ in range(2)]
FILES: Any = ["first", "second"]


def checkpoint_of(tensors: list[tuple[TensorInfo, Any, int]]) -> OpenCheckpoint:
    checkpoint = object.__new__(OpenCheckpoint)
    checkpoint.digests = None
    checkpoint.infos = {f"{n}": info for n, (info, _, _) in enumerate(tensors)}
    checkpoint.places = {f"{n}": (file, offset) for n, (_, file, offset) in enumerate(tensors)}
    return checkpoint


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[TensorInfo, Any, int, TemplateLeaf]]:
    found, offset, file = [], 0, FILES[0]
    for _ in range(draw(st.integers(0, 20))):
        info = draw(st.sampled_from(INFOS))
        if draw(st.integers(0, 5)) == 0:
            offset += draw(st.integers(1, 9))  # of a tensor that nobody wants
        if draw(st.integers(0, 9)) == 0:
            file = draw(st.sampled_from(FILES))
        found.append((info, file, offset, LEAVES[draw(st.integers(0, 9)) == 0]))
        offset += info.nbytes
    return found


@given(tensors(), st.integers(64, 400))
@example([(INFOS[2], FILES[0], 64 * n, LEAVES[0]) for n in range(4)], 128)
@example([(INFOS[1], FILES[0], 3 * n, LEAVES[0]) for n in range(40)], 64)
def test_runs_are_as_long_as_they_can_be(
    tensors: list[tuple[TensorInfo, Any, int, TemplateLeaf]], limit: int
) -> None:
    checkpoint = checkpoint_of([(info, file, offset) for info, file, offset, _ in tensors])
    wanted = [Wanted(f"{n}", leaf) for n, (*_, leaf) in enumerate(tensors)]
    small = [(0, n, f"{n}") for n in range(len(tensors))]
    batches = list(plan_runs(checkpoint, wanted, small, limit))
    assert [n for batch in batches for slot in batch.slots for n in slot.run] == [
        *range(len(tensors))
    ]

    def may_follow(first: int, second: int) -> bool:
        info, file, offset, leaf = tensors[first]
        return tensors[second] == (info, file, offset + info.nbytes, leaf) and (
            tensors[second][3] is leaf
        )

    def check(slot: Slot) -> None:
        info = tensors[slot.run[0]][0]
        assert slot.name == f"{slot.run[0]}"
        assert slot.info == TensorInfo("U8", (len(slot.run), *info.shape), slot.nbytes)
        assert slot.nbytes == info.nbytes * len(slot.run)
        assert all(may_follow(*pair) for pair in pairwise(slot.run))
        assert slot.offset % ALIGNMENT == 0

    for batch in batches:
        for slot in batch.slots:
            check(slot)
        for slot, following in pairwise(batch.slots):
            assert following.offset == -(-(slot.offset + slot.nbytes) // ALIGNMENT) * ALIGNMENT
            room = limit - slot.offset - slot.nbytes
            assert not may_follow(slot.run[-1], following.run[0]) or (
                tensors[following.run[0]][0].nbytes > room
            )
        assert batch.slots[0].offset == 0
        last = batch.slots[-1]
        assert last.offset + last.nbytes <= batch.size <= max(limit, last.offset + ALIGNMENT * 2)
        assert last.offset + last.nbytes <= limit
    for batch, after in pairwise(batches):
        last, info = batch.slots[-1], tensors[after.slots[0].run[0]][0]
        room = limit - last.offset - last.nbytes
        assert not may_follow(last.run[-1], after.slots[0].run[0]) or info.nbytes > room
        start = -(-(last.offset + last.nbytes) // ALIGNMENT) * ALIGNMENT
        assert start + info.nbytes > limit


@pytest.mark.parametrize("nbytes", [0, 1, TAKEN_OVER - 1, TAKEN_OVER])
@pytest.mark.parametrize("kind", ["array", "key"])
@pytest.mark.parametrize("keeps_memory", [False, True])
@pytest.mark.parametrize("target", ["jax", "numpy"])
def test_small_plain_arrays_are_read_in_runs(
    nbytes: int, kind: Any, keeps_memory: bool, target: Any
) -> None:
    checkpoint = checkpoint_of([(TensorInfo("U8", (nbytes,), nbytes), FILES[0], 0)])
    leaf = TemplateLeaf(LeafSpec(kind, None, (nbytes,)), target)
    is_small = is_small_plain(checkpoint, lambda _: keeps_memory)
    expected = (kind, keeps_memory, target) == ("array", False, "jax") and 0 < nbytes < TAKEN_OVER
    assert is_small("0", leaf) is expected
    checkpoint.digests = {}
    assert not is_small_plain(checkpoint, lambda _: False)("0", leaf)

"""Groups: which small tensors are read as one, and which of them are rows of one array."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oracle import assert_same
from pytree2safetensors import UnsupportedLeafError, load_into_pytree, load_pytree, save_pytree
from pytree2safetensors._format.header import MAX_DIMENSIONS
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves import decode, to_jax
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._load import finishing
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.groups import plan_groups
from pytree2safetensors._load.slots import Batch, Slot, Wanted
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._storage.byte_source import ByteSource

INFOS = [TensorInfo("U8", (size,), size) for size in (1, 3, 64)]
LEAVES = [TemplateLeaf(LeafSpec("array", np.dtype("u1"), (3,)), "jax") for _ in range(2)]
FILES = [ByteSource(label, 0) for label in ("first", "second")]
Tensor = tuple[TensorInfo, ByteSource, int]  # with its file and its offset there


def checkpoint_of(tensors: list[Tensor]) -> OpenCheckpoint:
    checkpoint = object.__new__(OpenCheckpoint)
    checkpoint.digests = None
    checkpoint.infos = {f"{n}": info for n, (info, _, _) in enumerate(tensors)}
    checkpoint.places = {f"{n}": (file, offset) for n, (_, file, offset) in enumerate(tensors)}
    return checkpoint


def planned(
    tensors: list[Tensor], leaves: list[TemplateLeaf], order: list[int], limit: int = 1 << 20
) -> list[Batch]:
    """Plan leaves that are wanted in any order; return their batches."""
    wanted = [Wanted(f"{n}", leaves[n]) for n in order]
    batches, others = plan_groups(checkpoint_of(tensors), wanted, lambda _: False, limit)
    assert not others
    return batches


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Tensor], list[TemplateLeaf], list[int]]:
    tensors, leaves = [], []
    offset, file = 0, FILES[0]
    for _ in range(draw(st.integers(0, 20))):
        info = draw(st.sampled_from(INFOS))
        if draw(st.integers(0, 5)) == 0:
            offset += draw(st.integers(1, 9))  # of a tensor that nobody wants
        if file == FILES[0] and draw(st.integers(0, 19)) == 0:
            file, offset = FILES[1], 0
        tensors.append((info, file, offset))
        leaves.append(LEAVES[draw(st.integers(0, 9)) == 0])
        offset += info.nbytes
    twice = draw(st.sets(st.sampled_from(range(len(tensors))))) if tensors else ()
    return tensors, leaves, draw(st.permutations([*range(len(tensors)), *twice]))


@given(layouts(), st.integers(64, 400))
@example(([(INFOS[2], FILES[0], 64 * n) for n in range(4)], LEAVES[:1] * 4, [*range(4)]), 128)
@example(([(INFOS[1], FILES[0], 3 * n) for n in range(40)], LEAVES[:1] * 40, [*range(40)]), 64)
def test_a_group_is_what_follows_each_other_in_a_file(
    layout: tuple[list[Tensor], list[TemplateLeaf], list[int]], limit: int
) -> None:
    tensors, leaves, order = layout
    batches = planned(tensors, leaves, order, limit)
    found: list[int] = []

    def check(slot: Slot) -> None:
        info, file, first = tensors[int(slot.name)]
        assert slot.info is info
        assert slot.offset % ALIGNMENT == 0
        stop = 0
        for rows in slot.rows:
            found.extend(rows.positions)
            for number, position in enumerate(rows.positions):
                tensor, place = order[position], rows.start + number * rows.step
                assert tensors[tensor] == (rows.info, file, first + place)
                assert leaves[tensor] is leaves[order[rows.positions[0]]]
                stop = max(stop, place + rows.info.nbytes)
        assert slot.nbytes == stop <= limit

    def may_be_one(slot: Slot, following: Slot) -> bool:
        _, file, start = tensors[int(slot.name)]
        info, *place = tensors[int(following.name)]
        is_adjacent = place == [file, start + slot.nbytes]
        return is_adjacent and slot.nbytes + info.nbytes <= limit

    slots = [slot for batch in batches for slot in batch.slots]
    for slot in slots:
        check(slot)
    assert sorted(found) == [*range(len(order))]
    assert not any(may_be_one(*pair) for pair in pairwise(slots))
    for batch in batches:
        assert batch.slots[0].offset == 0
        for slot, following in pairwise(batch.slots):
            assert following.offset == -(-(slot.offset + slot.nbytes) // ALIGNMENT) * ALIGNMENT
        last = batch.slots[-1]
        assert last.offset + last.nbytes <= limit
        assert last.offset + last.nbytes <= batch.size < last.offset + last.nbytes + ALIGNMENT
    for batch, after in pairwise(batches):
        last = batch.slots[-1]
        start = -(-(last.offset + last.nbytes) // ALIGNMENT) * ALIGNMENT
        assert start + after.slots[0].nbytes > limit


@given(st.lists(st.sampled_from(INFOS), min_size=1, max_size=4, unique=True), st.integers(1, 5))
def test_equal_tensors_of_repeated_layers_are_rows_of_one_array(
    layer: list[TensorInfo], count: int
) -> None:
    tensors: list[Tensor] = []
    for info in layer * count:
        offset = tensors[-1][2] + tensors[-1][0].nbytes if tensors else 0
        tensors.append((info, FILES[0], offset))
    [batch] = planned(tensors, LEAVES[:1] * len(tensors), [*range(len(tensors))])
    [slot] = batch.slots
    assert [rows.info for rows in slot.rows] == layer
    assert [rows.positions for rows in slot.rows] == [
        [*range(first, len(tensors), len(layer))] for first in range(len(layer))
    ]


def test_groups_of_several_dtypes_and_shapes_come_back(tmp_path: Path) -> None:
    def layer(n: int) -> dict[str, Any]:
        return {
            "bias": jnp.arange(3, dtype=jnp.bfloat16) + n,
            "count": jnp.int32(n),
            "flags": jnp.array([[n % 2 == 0, n % 3 == 0]]),
            "kernel": jnp.full((2, 3), n, jnp.float32),
        }

    tree = [layer(n) if n != 3 else {"kernel": jnp.full((2, 3), n, jnp.float32)} for n in range(9)]
    save_pytree(tree, tmp_path / "file")
    for mmap in (False, True):
        assert_same(load_pytree(tmp_path / "file", mmap=mmap), tree)
        assert_same(load_into_pytree(tree, tmp_path / "file", mmap=mmap), tree)


def test_groups_of_many_equal_tensors_come_back(tmp_path: Path) -> None:
    rows = {f"{n:04}": np.full((), n, np.float32) for n in range(1500)}
    pairs = {f"{n:04}": np.array([n, -n], np.float32) for n in range(1400)}
    tree = jax.tree.map(jax.device_put, {"first": rows, "pairs": pairs, "rest": rows})
    save_pytree(tree, tmp_path / "file")
    for prefix in ("", "first", "pairs"):
        expected = tree[prefix] if prefix else tree
        assert_same(load_pytree(tmp_path / "file", prefix=f"@{prefix}" if prefix else ""), expected)


def arrays(nbytes: int) -> dict[str, Any]:
    return {f"w{n}": jnp.full(nbytes, n, jnp.uint8) for n in range(5)}


def numpy_of(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def placed(tree: Any) -> Any:
    return jax.device_put(tree, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


# Trees, the options of their saves, and whether their arrays are rows of one array.
ROWS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "small": (arrays(1), {}, True),
    "nearly large": (arrays(TAKEN_OVER - 1), {}, True),
    "large": (arrays(TAKEN_OVER), {}, False),
    "empty": (arrays(0), {}, False),
    "with digests": (arrays(1), {"checksum": True}, False),
    "NumPy arrays": (numpy_of(arrays(1)), {}, False),
    "with a sharding": (placed(arrays(1)), {}, False),
    "keys": ({f"k{n}": jax.random.key(n) for n in range(5)}, {}, False),
    "scalars": ({f"s{n}": n for n in range(5)}, {}, False),
}


@pytest.mark.parametrize(("tree", "options", "are_rows"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("is_folder", [False, True])
def test_small_plain_arrays_are_rows_of_one_array(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Any,
    options: dict[str, Any],
    are_rows: bool,
    is_folder: bool,
) -> None:
    size = 3 * (TAKEN_OVER - 1) if is_folder else None  # three of them in one shard
    save_pytree(tree, tmp_path / "m.safetensors", max_shard_size=size, **options)
    alone: list[str] = []

    def from_bytes(raw: Any, info: TensorInfo, name: str, *start: int) -> Any:
        alone.append(name)
        return decode.from_bytes(raw, info, name, *start)

    monkeypatch.setattr(finishing, "from_bytes", from_bytes)
    found = load_into_pytree(tree, tmp_path / "m.safetensors")
    assert_same(found, tree)
    assert sorted(alone) == ([] if are_rows else [f"@{name}" for name in tree])


def test_many_equal_arrays_are_made_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_jax, "_MANY", 4)
    monkeypatch.setattr(to_jax, "_CHUNK", 2)
    tree = [jnp.full(3, n, jnp.float32) for n in range(7)] + [jnp.full(2, 7, jnp.float32)]
    save_pytree(tree, tmp_path / "file")
    assert_same(load_pytree(tmp_path / "file"), tree)


def test_the_reads_of_small_arrays_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = arrays(3)
    save_pytree(tree, tmp_path / "file")
    reads: list[int] = []
    real = ByteSource.fill

    def fill(source: ByteSource, buffers: list[memoryview], offset: int) -> None:
        reads.append(sum(map(len, buffers)))
        real(source, buffers, offset)

    monkeypatch.setattr(ByteSource, "fill", fill)
    assert_same(load_pytree(tmp_path / "file"), tree)
    assert reads[1:] == [15]  # after the header
    del tree["w2"], reads[:]
    assert_same(load_into_pytree(tree, tmp_path / "file", strict=False), tree)
    assert reads[1:] == [6, 6]


@pytest.mark.parametrize("axes", [MAX_DIMENSIONS - 1, MAX_DIMENSIONS])
def test_small_arrays_may_have_as_many_axes_as_numpy_has(axes: int, tmp_path: Path) -> None:
    tree = [np.full((1,) * axes, n, np.float32) for n in range(3)]
    save_pytree(tree, tmp_path / "file")
    assert_same(load_pytree(tmp_path / "file"), [jax.device_put(leaf) for leaf in tree])


def test_a_complex128_array_has_an_axis_less_than_its_tensor(tmp_path: Path) -> None:
    most = MAX_DIMENSIONS - 1
    values = np.ones((1,) * most, np.complex128)
    save_pytree([values], tmp_path / "file")
    assert_same(load_into_pytree([values], tmp_path / "file"), [values])
    text = f"complex128, which needs a .reshape, because its tensor would have more than {MAX_DIMENSIONS} axes"
    with pytest.raises(UnsupportedLeafError, match=text):
        save_pytree([values[None]], tmp_path / "file")

"""The share of one process in a save of several."""

import hashlib
import io
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from placed import P
from pytree2safetensors import FileFormatError, Rule, save_pytree
from pytree2safetensors._format import digests
from pytree2safetensors._format.digests import digest_tensor, hash_blocks
from pytree2safetensors._leaves import host_copies, spread
from pytree2safetensors._leaves.spread import Owned
from pytree2safetensors._save import calls, coordination, share
from pytree2safetensors._save.contents import Contents, collect
from pytree2safetensors._save.plan import plan_file
from pytree2safetensors._save.share import Block
from pytree2safetensors._types import Chunk


def blocks_from(sizes: list[int]) -> list[Block]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [Block(0, str(n), start, stop) for n, (start, stop) in enumerate(pairwise(starts))]


@given(st.lists(st.integers(1, 1 << 24), max_size=300), st.integers(1, 20))
def test_every_block_is_hashed_by_one_process(sizes: list[int], count: int) -> None:
    blocks = blocks_from(sizes)
    shares = share.split_blocks(blocks, count)
    assert len(shares) == count
    assert [block for part in shares for block in part] == blocks


@given(st.integers(1, 12), st.integers(1, 5))
def test_processes_hash_about_equally_much(count: int, size: int) -> None:
    shares = share.split_blocks(blocks_from([size << 20] * 240), count)
    numbers = [len(part) for part in shares]
    assert max(numbers) - min(numbers) <= 1


def test_digests_of_hashes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK", 10)
    contents = collect({"a": np.arange(3.0), "b": np.zeros(0), "c": np.int8(1)}, {}, "raise")
    plan = plan_file(contents, checksum=True)
    start = len(plan.files[0].head) + 7
    blocks = share.blocks_of(plan, [start])
    assert [block.name for block in blocks] == ["@a"] * 3 + ["@c"]
    content = {"@a": np.arange(3.0).tobytes(), "@b": b"", "@c": b"\1"}
    data = bytes(start) + content["@a"] + content["@c"]
    hashes = [hashlib.sha256(data[block.start : block.stop]).digest() for block in blocks]
    assert share.digests_of(plan, blocks, hashes) == {
        name: digest_tensor(name, plan.infos[name], hash_blocks([content[name]]))
        for name in plan.infos
    }


def in_parts(values: Any, *axes: str | None) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    return jax.device_put(values, NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("copied", [False, True])
def test_a_share_is_copied_from_devices_by_one_call(
    monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    values = np.arange(64 * 300, dtype=np.float32).reshape(64, 300)
    rows = in_parts(values, "x")
    columns = in_parts(values[:, :296], None, "x")
    tree = {"rows": rows, "columns": columns, "local": np.arange(3)}
    contents = collect(tree, {}, "raise")
    plan = plan_file(contents, checksum=False)
    calls: list[int] = []

    def start_host_copies(arrays: list[Any]) -> list[Any]:  # as from another device
        calls.append(len(arrays))
        return [np.array(array) for array in arrays]

    monkeypatch.setattr(host_copies, "start_host_copies", start_host_copies)
    monkeypatch.setattr(share, "is_global", lambda leaf: isinstance(leaf, jax.Array))
    part = share.share_of(contents, 1, copied=copied)
    assert calls == [16] * copied
    assert set(part) == {"@rows", "@columns"}
    start = len(plan.files[0].head) + 100
    content = bytearray(plan.files[0].size + 100)
    for offset, piece in share.own_chunks(plan.files[0], plan.infos, part, start):
        content[offset : offset + len(piece)] = piece
    places = dict(zip(plan.files[0].tensors, plan.files[0].starts(plan.infos), strict=True))
    for name, array in ("@rows", values), ("@columns", values[:, :296]):
        begin = places[name] + 100
        assert content[begin : begin + array.nbytes] == array.tobytes()
    size = share.size_of(part, plan.infos)
    assert size == rows.nbytes + columns.nbytes


# --- all shares make the file -----------------------------------------------------------------


def shares_of(
    contents: Contents, count: int, copied: bool, patch: pytest.MonkeyPatch
) -> list[share.Share]:
    """The shares of several processes. Each process has some of the devices."""
    devices = np.array_split(np.array(jax.devices()), count)
    mine: set[Any] = set()

    def owned(leaf: jax.Array, stored: tuple[int, ...]) -> Owned:
        shards: list[Any] = spread.owned(leaf, stored).shards
        return Owned([(region, data) for region, data in shards if data.devices() <= mine])

    patch.setattr(share, "owned", owned)
    patch.setattr(share, "is_global", lambda leaf: isinstance(leaf, jax.Array))
    found = []
    for process in range(count):
        mine |= {*devices[process]}
        found.append(share.share_of(contents, process, copied=copied))
        mine.clear()
    return found


def tree_of_arrays() -> dict[str, Any]:
    return {
        "bits": in_parts(np.arange(16).astype("int4"), "x"),
        "columns": in_parts(np.arange(40, dtype=np.float32).reshape(5, 8), None, "x"),
        "keys": in_parts(jax.random.split(jax.random.key(3), 16), "x"),
        "local": np.arange(5),
        "name": "not a tensor",
        "number": 2.5,
        "replicated": in_parts(np.arange(3, dtype=np.float32)),
        "rows": in_parts(np.arange(80, dtype=np.int16).reshape(16, 5), "x"),
    }


def tree_of_parts() -> dict[str, Any]:
    return {
        "layers": in_parts(np.arange(192, dtype=np.float32).reshape(8, 4, 6), "x"),
        "q": in_parts(np.arange(16, dtype=np.float32).reshape(8, 2), "x"),
        "k": np.arange(100, 116, dtype=np.float32).reshape(8, 2),
        "v": in_parts(np.arange(200, 216, dtype=np.float32).reshape(8, 2), "x"),
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    }


RULES = [
    Rule("h.{l}.weight", "layers", "o i -> l i o"),
    Rule("qkv", "{p:q,k,v}", "(p h) e -> h e"),
    Rule("weight", "w", "o i -> i o"),
]


@pytest.mark.parametrize(("tree_of", "rename"), [(tree_of_arrays, None), (tree_of_parts, RULES)])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_write_every_byte_of_a_file_once(
    tree_of: Any, rename: Any, copied: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, file = tree_of(), io.BytesIO()
    save_pytree(tree, file, rename=rename)
    contents = collect(tree, {}, "raise", rename)
    plan = plan_file(contents, checksum=False)
    [planned] = plan.files
    start = len(planned.head) + 100  # the data may be further back than in the plan
    data = bytearray(planned.size - len(planned.head))
    times = np.zeros(len(data), np.uint8)
    for part in shares_of(contents, count, copied, monkeypatch):
        written = 0
        for offset, piece in share.own_chunks(planned, plan.infos, part, start):
            where = slice(offset - start, offset - start + len(piece))
            data[where] = piece
            times[where] += 1
            written += len(piece)
        assert written == share.size_of(part, plan.infos)
    assert planned.head + data == file.getvalue()
    assert np.all(times == 1)


@given(st.lists(st.tuples(st.sampled_from([0, 0, 0, 5]), st.integers(1, 40)), max_size=20))
@example([(0, 3), (0, 4), (0, 40), (0, 3), (0, 3)])
@example([(0, 3), (5, 3), (0, 7), (0, 3)])
def test_chunks_of_a_share_have_a_good_size(gaps_and_sizes: list[tuple[int, int]]) -> None:
    content = bytes(range(256)) * 4
    chunks: list[Chunk] = []
    stop = 0
    for gap, size in gaps_and_sizes:
        chunks.append((stop + gap, memoryview(content)[stop + gap : stop + gap + size]))
        stop += gap + size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share, "_SMALL", 4)
        patch.setattr(share, "_JOINED", 8)
        patch.setattr(share, "_LARGEST", 16)
        found = [(offset, bytes(piece)) for offset, piece in share._arranged(chunks)]
    bytes_before = [offset + n for offset, piece in chunks for n in range(len(piece))]
    assert [offset + n for offset, piece in found for n in range(len(piece))] == bytes_before
    assert all(piece == content[offset : offset + len(piece)] for offset, piece in found)
    assert all(len(piece) <= 16 for _, piece in found)
    small = {offset for offset, piece in chunks if len(piece) < 4}
    for (offset, piece), (following, _) in pairwise(found):
        if offset in small and following in small and offset + len(piece) == following:
            assert len(piece) >= 8


def test_without_jax_distributed_the_error_says_to_initialize_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "coordination_client", lambda: None)
    with pytest.raises(FileFormatError) as caught:
        calls.current_processes()
    assert str(caught.value) == (
        "an array of this tree is spread over several processes, which need jax.distributed to "
        "save it together; call jax.distributed.initialize() first"
    )


class Client:
    """A client of the coordination service that has one key, and fails for others."""

    def key_value_set(self, key: str, value: str) -> None:
        raise RuntimeError(f"ALREADY_EXISTS: {key}" if key.endswith("known") else "UNAVAILABLE")

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key.endswith("known"):
            return "value"
        raise RuntimeError("UNAVAILABLE" if key.endswith("broken") else "DEADLINE_EXCEEDED: no")


def test_keys_that_a_client_sets_twice_or_cannot_reach() -> None:
    keys = coordination.CoordinationKeys(Client())
    keys.set("known", "value")
    with pytest.raises(RuntimeError, match="ALREADY_EXISTS"):
        keys.set("known", "other")
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        keys.set("broken", "value")
    assert keys.wait("nothing", 0.0) is None
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        keys.wait("broken", 0.0)

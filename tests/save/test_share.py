"""The share of one process in a save of several."""

import hashlib
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pytree2safetensors import FileFormatError
from pytree2safetensors._format.digests import digest_tensor, hash_blocks
from pytree2safetensors._leaves import host_copies, jax_versions
from pytree2safetensors._save import calls, share
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.plan import plan_file
from pytree2safetensors._save.share import Block


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


def test_digests_of_hashes_in_order() -> None:
    contents = collect({"a": np.arange(3.0), "b": np.zeros(0), "c": np.int8(1)}, {}, "raise")
    plan = plan_file(contents, checksum=True)
    blocks = share.blocks_of(plan, [len(plan.files[0].head)])
    assert [block.name for block in blocks] == ["@a", "@c"]
    content = {"@a": np.arange(3.0).tobytes(), "@b": b"", "@c": b"\1"}
    hashes = [hashlib.sha256(content[block.name]).digest() for block in blocks]
    assert share.digests_of(plan, blocks, hashes) == {
        name: digest_tensor(name, plan.infos[name], hash_blocks([content[name]]))
        for name in plan.infos
    }


@pytest.mark.parametrize("copied", [False, True])
def test_a_share_is_copied_from_devices_by_one_call(
    monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spec: Any = PartitionSpec
    values = np.arange(64 * 300, dtype=np.float32).reshape(64, 300)
    rows = jax.device_put(values, NamedSharding(mesh, spec("x")))
    columns = jax.device_put(values[:, :296], NamedSharding(mesh, spec(None, "x")))
    tree = {"rows": rows, "columns": columns, "local": np.arange(3)}
    contents = collect(tree, {}, "raise")
    plan = plan_file(contents, checksum=False)
    calls: list[int] = []

    def to_host(arrays: list[Any]) -> list[Any]:  # as from another device
        calls.append(len(arrays))
        return [np.array(array) for array in arrays]

    monkeypatch.setattr(host_copies, "to_host", to_host)
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


def test_without_jax_distributed_there_is_one_thing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "coordination_client", lambda: None)
    with pytest.raises(FileFormatError) as caught:
        calls.present()
    assert str(caught.value) == (
        "an array of this tree is spread over several processes, which need jax.distributed to "
        "save it together; call jax.distributed.initialize() first"
    )


class Client:
    """A client of the coordination service that knows one key, and breaks down at others."""

    def key_value_set(self, key: str, value: str) -> None:
        raise RuntimeError(f"ALREADY_EXISTS: {key}" if key.endswith("known") else "UNAVAILABLE")

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key.endswith("known"):
            return "value"
        raise RuntimeError("UNAVAILABLE" if key.endswith("broken") else "DEADLINE_EXCEEDED: no")


def test_keys_that_a_client_sets_twice_or_cannot_reach() -> None:
    keys = jax_versions.CoordinationKeys(Client())
    keys.set("known", "value")
    with pytest.raises(RuntimeError, match="ALREADY_EXISTS"):
        keys.set("known", "other")
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        keys.set("broken", "value")
    assert keys.wait("nothing", 0.0) is None
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        keys.wait("broken", 0.0)

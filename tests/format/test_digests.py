"""Digests: blocks, and headers whose digests are not known yet."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors import FileFormatError, save_pytree
from pytree2safetensors._format import digests, layout
from pytree2safetensors._format.tensor import TensorInfo

BLOCK = 16 * 1024 * 1024


def digest_of(name: str, dtype: str, shape: list[int], data: bytes, block: int = BLOCK) -> str:
    """The digest as the specification words it."""
    hashes = [
        hashlib.sha256(data[start : start + block]).digest() for start in range(0, len(data), block)
    ]
    head = json.dumps([name, dtype, shape], separators=(",", ":")).encode()
    return hashlib.sha256(head + b"".join(hashes)).hexdigest()[:32]


@given(st.integers(0, 5 * BLOCK))
def test_blocks_cover_a_tensor(nbytes: int) -> None:
    bounds = digests.block_bounds(nbytes)
    assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert all(stop - start == BLOCK for start, stop in bounds[:-1])
    assert sum(stop - start for start, stop in bounds) == nbytes
    assert all(start < stop for start, stop in bounds)


@given(st.lists(st.binary(max_size=40), max_size=10), st.integers(1, 20))
def test_hashes_of_blocks_do_not_depend_on_pieces(pieces: list[bytes], block: int) -> None:
    data = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "BLOCK", block)
        bounds = digests.block_bounds(len(data))
        expected = [digests.hash_block(data[start:stop]) for start, stop in bounds]
        assert digests.hash_blocks(pieces) == expected


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_the_digest_in_a_file_is_that_of_its_blocks(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file.safetensors"
    values = np.arange(size, dtype=np.uint32).astype(np.uint8)
    save_pytree({"é": values}, path, checksum=True, durable=False)
    with path.open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = json.loads(content["__metadata__"]["pytree2safetensors.sha256"])
    assert found == {"@é": digest_of("@é", "U8", [size], values.tobytes())}


def test_the_digests_are_compact_json_with_sorted_names() -> None:
    metadata = digests.add_digests({}, {"b": "1", "a": "2"})
    assert metadata[digests.DIGESTS] == '{"a":"2","b":"1"}'


@pytest.mark.parametrize("entry", ["[]", '{"a":1}', "1", "null"])
def test_malformed_digests_are_refused(entry: str) -> None:
    metadata = {digests.DIGESTS: entry}
    metadata[digests.METADATA_DIGEST] = digests.digest_metadata(metadata)
    with pytest.raises(FileFormatError, match="the digests of x do not map names to digests"):
        digests.read_digests(metadata, ["a"], "x")


def test_digests_that_name_a_tensor_twice_are_refused() -> None:
    metadata = {digests.DIGESTS: '{"a":"1","a":"2"}'}
    metadata[digests.METADATA_DIGEST] = digests.digest_metadata(metadata)
    with pytest.raises(FileFormatError, match=r"^the table of digests of x has 'a' twice"):
        digests.read_digests(metadata, ["a"], "x")


VECTORS = [
    ("@w", "U8", [0], "81ab5a336114976310eda419ba689144"),
    ("@w", "F32", [2, 3], "9ea16bfa2db40567ffa47a8d5f0a94a4"),
    ("a.b", "I64", [], "a6ecca406e49eedd327118ba9f48ff49"),
    ("@é\\.x", "U8", [3, 5], "b259f72b8a0990c94059a4811dd750f7"),
    ("@big", "U8", [16_777_216], "de875d494355bf31e49a79d9d5a20473"),
    ("@big", "U8", [16_777_217], "e4102e2e8f842eeccc8dcc97f08e8c09"),
    ("@big", "F32", [3, 4_000_000], "d11ee4917352250ef1998441ad1de195"),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "digest"), VECTORS)
def test_the_digest_of_a_vector(name: str, dtype: str, shape: list[int], digest: str) -> None:
    size = int(np.prod(shape)) * {"U8": 1, "F32": 4, "I64": 8}[dtype]
    data = bytes(i % 251 for i in range(251)) * (size // 251 + 1)
    assert digest_of(name, dtype, shape, data[:size]) == digest
    hashes = digests.hash_blocks([data[:size]])
    assert digests.digest_tensor(name, TensorInfo(dtype, tuple(shape), size), hashes) == digest


@given(st.lists(st.text(), unique=True), st.data())
def test_a_header_is_as_long_before_the_digests_are_known(names: list[str], data: Any) -> None:
    infos = {name: TensorInfo("U8", (9,), 9) for name in names}
    found = {
        name: digests.digest_tensor(name, info, digests.hash_blocks([data.draw(st.binary())]))
        for name, info in infos.items()
    }
    before = digests.add_digests({"a": "b"}, digests.blank_digests(names))
    after = digests.add_digests({"a": "b"}, found)
    assert len(layout.lay_out(infos, before).head) == len(layout.lay_out(infos, after).head)

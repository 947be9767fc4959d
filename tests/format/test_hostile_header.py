"""Wrong lengths and headers, each with the message of the error."""

import inspect
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hostile import (
    DIGESTS,
    attempt,
    bounded_memory,
    byte,
    file,
    no_hang,
    noted,
    refused,
    seeds,
    split,
    tensor,
)
from pytree2safetensors import FileFormatError, load_into_pytree, load_metadata, load_pytree
from pytree2safetensors._format import strict_json
from pytree2safetensors._format.header import MAX_DIMENSIONS, MAX_HEADER

FLOAT = tensor("F32", [2], 0, 8)
WHOLE = file({"@a": FLOAT}, bytes(8))
MORE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":?}'


@pytest.fixture(autouse=True)
def _unchecked_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime type check of each of a million integers would take a minute."""
    for name in ("_integer", "_number"):
        monkeypatch.setattr(strict_json, name, inspect.unwrap(getattr(strict_json, name)))


@pytest.mark.parametrize("content", seeds(), ids=range(len(seeds())))
def test_a_file_cut_anywhere_is_refused(content: bytes) -> None:
    for size in range(len(content)):
        with pytest.raises(FileFormatError, match=r"is truncated|not a safetensors file"):
            load_pytree(io.BytesIO(content[:size]))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_a_file_on_disk_cut_anywhere_is_refused(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    for size in range(len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(FileFormatError, match=r"is truncated|not a safetensors file"):
            load_pytree(path, mmap=mmap)


@pytest.mark.parametrize("more", [b"\0", b"x" * 4096, WHOLE, b"extra bytes of another format"])
def test_bytes_after_the_data_are_refused(more: bytes) -> None:
    refused(WHOLE + more, FileFormatError, "has bytes after its data: its header describes 8 bytes")


def shapes_of_equal_hashes(number: int) -> list[list[int]]:
    """Shapes of empty tensors. CPython gives their tuples the same hash, which it does not randomize."""
    sizes = np.random.default_rng(0).integers(0, 2, (20 * number, 31), np.uint64)
    sizes[:, 0] = 0
    factor, other = np.uint64(14029467366897019727), np.uint64(11400714785074694791)
    state = np.full(len(sizes), np.uint64(2870177450012600261))
    for column in sizes.T:
        state += column * factor
        state = (state << np.uint64(31) | state >> np.uint64(33)) * other
    last = -state * np.uint64(pow(int(factor), -1, 2**64))  # so that the last sum is 0
    return np.column_stack([sizes, last])[last < 2**60][:number].tolist()  # type: ignore[no-any-return] # NumPy gives `tolist` no type


def test_shapes_of_equal_hashes_cost_no_more_than_others() -> None:
    shapes = shapes_of_equal_hashes(30_000)
    if sys.implementation.name == "cpython" and sys.maxsize > 2**32:
        assert len({hash(tuple(shape)) for shape in shapes}) == 1
    header = {f"@{n}": tensor("U8", shape, 0, 0) for n, shape in enumerate(shapes)}
    content = file(json.dumps(header).encode())  # with spaces, so that it is not the usual form
    with no_hang(15):
        assert load_metadata(io.BytesIO(content)) == {}


@pytest.mark.parametrize("length", range(1, len(WHOLE)))
def test_a_header_of_another_length_is_refused(length: int) -> None:
    header, data = split(WHOLE)
    if length != len(header):
        found = attempt(load_pytree, file(header, data, length))
        assert isinstance(found, FileFormatError)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_beyond_the_limit_is_refused_unread(length: int) -> None:
    refused(file(b"{}", b"", length), FileFormatError, "and the format allows 100,000,000")


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found


def test_a_huge_header_is_refused_from_its_first_bytes() -> None:
    source = Counting(file(b"{}" + b" " * (1 << 20), b"", MAX_HEADER + 1))
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        load_pytree(source)
    assert source.count <= 1 << 16


def test_a_header_as_long_as_the_format_allows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with path.open("wb") as opened:
        opened.write(MAX_HEADER.to_bytes(8, "little") + b"{}")
        for _ in range(100):
            opened.write(b" " * (MAX_HEADER // 100))
        opened.truncate(8 + MAX_HEADER)
    with no_hang(), bounded_memory(MAX_HEADER, 8):
        assert load_pytree(path) == {}
        assert load_metadata(path) == {}


def test_a_header_of_one_huge_string_is_read() -> None:
    content = file({"__metadata__": {"a": "x" * (MAX_HEADER - 30)}})
    with no_hang(), bounded_memory(len(content), 8):
        assert len(load_metadata(io.BytesIO(content))["a"]) == MAX_HEADER - 30


@pytest.mark.parametrize("piece", ['\\"', '"', '",', '"":"",', "{", '"a":{},', "}"])
def test_metadata_of_many_small_things_take_memory_in_proportion(piece: str) -> None:
    repeated = piece * (2_000_000 // len(piece))
    for header in f'{{"__metadata__":{{"a":"{repeated}"}}}}', f'{{"__metadata__":{{{repeated}':
        content = file(header.encode())
        with no_hang(), bounded_memory(len(content)):
            attempt(load_metadata, content)


@pytest.mark.parametrize("inner", ["[]", "{}", "0", '""', '{"":0}', "[[]]", '"\\u0000"'])
def test_a_header_of_many_small_things_takes_memory_in_proportion(inner: str) -> None:
    count = 2_000_000 // (len(inner) + 1)
    content = file(f'{{"a":[{",".join([inner] * count)}]}}'.encode())
    with no_hang(), bounded_memory(len(content)):
        attempt(load_pytree, content)


HEADERS: list[tuple[bytes, str]] = [
    (file(b""), "its header does not begin with {"),
    (file(b"[]"), "its header does not begin with {"),
    (file(b" {}"), "its header does not begin with {"),
    (file(b"\xef\xbb\xbf{}"), "its header does not begin with {"),
    (file(b"{"), "is not valid JSON"),
    (file(b"{} {}"), "is not valid JSON"),
    (file(b"{}\0"), "is not valid JSON"),
    (file(b'{"\xff":1}'), "is not valid UTF-8"),
    (file(b'{"\xed\xa0\x80":1}'), "is not valid UTF-8"),
    (file(b'{"a\nb":1}'), "is not valid JSON"),
    (file(b'{"a":NaN}'), "is not valid JSON"),
    (file(b'{"a":Infinity}'), "is not valid JSON"),
    (file(b'{"a":1}'), "describes 'a' without a proper"),
    (file(b'{"a":null}'), "describes 'a' without a proper"),
    (file(b'{"a":[]}'), "describes 'a' without a proper"),
    (file(b'{"a":{}}'), "describes 'a' without a proper"),
    (file({"a": {"dtype": "U8", "shape": []}}), "describes 'a' without a proper"),
    (file({"a": tensor("U8", None, 0, 1)}, b"\0"), "describes 'a' without a proper"),
    (file({"a": tensor("U8", "1", 0, 1)}, b"\0"), "describes 'a' without a proper"),
    (file({"a": tensor(8, [1], 0, 1)}, b"\0"), "describes 'a' without a proper"),
    (file({"a": {**byte(), "data_offsets": [0]}}, b"\0"), "describes 'a' without a proper"),
    (file({"a": {**byte(), "data_offsets": [0, 1, 1]}}, b"\0"), "describes 'a' without a proper"),
    (file({"a": {**byte(), "data_offsets": {"0": 1}}}, b"\0"), "describes 'a' without a proper"),
    (file({"a": tensor("F128", [1], 0, 16)}, bytes(16)), "gives 'a' the unknown dtype 'F128'"),
    (file({"a": tensor("f32", [1], 0, 4)}, bytes(4)), "gives 'a' the unknown dtype 'f32'"),
    (file({"a": tensor("U8", [1], 0.0, 1.0)}, b"\0"), "describes 'a' without a proper"),
    (file({"a": tensor("U8", [1.0], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (
        file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"\0"),
        "describes 'a' without a proper",
    ),
    (
        file(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "a shape that is not a list of sizes",
    ),
    (file({"a": tensor("U8", [True], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [[1]], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [-1], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [-1, -1], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [2**64], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [10**4000], 0, 1)}, b"\0"), "a shape that is not a list of sizes"),
    (file({"a": tensor("U8", [1], False, True)}, b"\0"), "offsets that are not a range"),
    (file({"a": tensor("U8", [1], -1, 0)}, b"\0"), "offsets that are not a range"),
    (file({"a": tensor("U8", [1], 1, 0)}, b"\0"), "offsets that are not a range"),
    (file({"a": tensor("U8", [1], 0, 2**64)}, b"\0"), "offsets that are not a range"),
    (file({"a": tensor("U8", [1], 2**64, 2**64 + 1)}, b"\0"), "offsets that are not a range"),
    (file({"a": tensor("U8", [1], 0, 2**63)}, b"\0"), "its dtype U8 and shape [1] take another"),
    (file({"a": tensor("U8", [2], 0, 1)}, b"\0"), "1 bytes, but its dtype U8 and shape [2]"),
    (file({"a": tensor("U8", [], 0, 0)}), "0 bytes, but its dtype U8 and shape []"),
    (file({"a": tensor("U8", [0], 0, 1)}, b"\0"), "1 bytes, but its dtype U8 and shape [0]"),
    (
        file({"a": tensor("F4", [3], 0, 1)}, b"\0"),
        "but its dtype F4 and shape [3] take another size",
    ),
    (
        file({"a": tensor("F4", [3], 0, 2)}, b"\0"),
        "but its dtype F4 and shape [3] take another size",
    ),
    # Products beyond 64 bits, which are small if they wrap around.
    (file({"a": tensor("U8", [2**32, 2**32], 0, 0)}), "take another size"),
    (file({"a": tensor("U8", [2**63, 2], 0, 0)}), "take another size"),
    (file({"a": tensor("F32", [2**62], 0, 0)}), "take another size"),
    (file({"a": tensor("F32", [2**62 + 1], 0, 4)}, bytes(4)), "take another size"),
    (file({"a": tensor("U8", [2, 2**63 + 1], 0, 2)}, bytes(2)), "take another size"),
    # Empty tensors, in shapes that no array can have.
    (file({"a": tensor("F32", [0, 2**63], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("F32", [2**62, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [2**63, 2**63, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [2**40, 2**40, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [1] * (MAX_DIMENSIONS + 1), 0, 1)}, b"\0"), "dimensions, and NumPy"),
    (file({"a": tensor("U8", [1] * 100_000, 0, 1)}, b"\0"), "100,000 dimensions, and NumPy"),
    (file({"a": byte(0), "b": byte(0)}, b"\0"), "has an overlap at the data of 'b'"),
    (file({"a": tensor("U8", [2], 0, 2), "b": byte(1)}, b"\0\0"), "an overlap at the data of 'b'"),
    (
        file({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [0], 2, 2)}, bytes(4)),
        "an overlap at the data of 'b'",
    ),
    (file({"a": byte(0), "b": byte(2)}, bytes(3)), "has a gap before the data of 'b'"),
    (file({"a": byte(1)}, bytes(2)), "has a gap before the data of 'a'"),
    (
        file({"a": byte(0), "b": byte(1)}, b"\0"),
        "is truncated: its header describes 2 bytes of data, and 1 follow it; copy or download it again",
    ),
    (file({"a": byte(0)}, b""), "is truncated: its header describes 1 bytes of data, and 0 follow"),
    (file({}, b"\0"), "has bytes after its data: its header describes 0 bytes"),
    (file({"__metadata__": []}), "the metadata of the BytesIO does not map names to strings"),
    (file({"__metadata__": "a"}), "the metadata of the BytesIO does not map names to strings"),
    (file({"__metadata__": {"a": 1}}), "the metadata of the BytesIO does not map names to strings"),
    (file({"__metadata__": {"a": None}}), "does not map names to strings"),
    (file({"__metadata__": {"a": {}}}), "does not map names to strings"),
    (file({"__metadata__": {"a": "\ud800"}}), "the metadata of the BytesIO holds a lone surrogate"),
    (file({"__metadata__": {"\udfff": "a"}}), "the metadata of the BytesIO holds a lone surrogate"),
    (file({"\ud800": byte()}, b"\0"), "has the name '\\ud800', which holds a lone surrogate"),
    (file({"@\udc00\ud800": byte()}, b"\0"), "which holds a lone surrogate"),
    # Names that occur twice.
    (file(b'{"a":1,"a":1}'), "the header of the BytesIO has 'a' twice"),
    (file(b'{"a":1,"\\u0061":1}'), "the header of the BytesIO has 'a' twice"),
    (file(b'{"__metadata__":{},"__metadata__":{}}'), "has '__metadata__' twice"),
    (file(b'{"__metadata__":{"a":"1","a":"2"}}'), "has 'a' twice"),
    (
        file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"\0"),
        "'dtype' tw",
    ),
    (file(b'{"@a":' + MORE.replace(b"?", b'{"b":1,"b":1}') + b"}", b"\7"), "has 'b' twice"),
    (
        file(b'{"@a":' + MORE.replace(b"?", b'[0,{"x":[{"b":1,"b":1}]}]') + b"}", b"\7"),
        "has 'b' twice",
    ),
    (noted('{"version":1,"version":1}'), "the note of the BytesIO has 'version' twice"),
    (noted('{"version":1,"nodes":{"@a":"list","@a":"dict"}}'), "the BytesIO has '@a' twice"),
    (file({"__metadata__": {DIGESTS: "{}"}}), "the metadata of the BytesIO does not match"),
    (file({"__metadata__": {DIGESTS + ".metadata": ""}}), "the metadata of the BytesIO does not"),
]


@pytest.mark.parametrize(("content", "text"), HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_breaks_the_format_is_refused(content: bytes, text: str) -> None:
    with bounded_memory(len(content)):
        refused(content, FileFormatError, text)


@pytest.mark.parametrize("dimensions", [32, MAX_DIMENSIONS - 1, MAX_DIMENSIONS])
def test_as_many_dimensions_as_numpy_has_are_read(dimensions: int) -> None:
    content = file({"@a": tensor("F64", [1] * dimensions, 0, 8)}, bytes(8))
    found = load_into_pytree({"a": np.ones((1,) * dimensions)}, io.BytesIO(content))
    assert found["a"].shape == (1,) * dimensions
    assert found["a"].item() == 0


def test_numpy_2_has_64_dimensions() -> None:
    expected = 64 if int(np.__version__.partition(".")[0]) >= 2 else 32
    assert expected == MAX_DIMENSIONS


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_a_file_with_a_packed_dtype_opens(dtype: str, size: int) -> None:
    tensors = {"@a": tensor(dtype, [2, 4], 0, size), "@b": byte(size)}
    content = file(tensors, bytes(size + 1))
    assert load_metadata(io.BytesIO(content)) == {}
    assert load_pytree(io.BytesIO(content), prefix="@b").tolist() == [0]
    refused(content, FileFormatError, dtype, by_all=False)
    tensors["@a"] = tensor(dtype, [2, 4], 0, size - 1)
    refused(file(tensors, bytes(size + 1)), FileFormatError, "take another size")


def test_a_number_of_many_digits_is_refused() -> None:
    for digits in (4300, 4301, 100_000):
        header = b'{"a":{"dtype":"U8","shape":[' + b"9" * digits + b'],"data_offsets":[0,1]}}'
        refused(file(header, b"\0"), FileFormatError, "")


@pytest.mark.parametrize(
    "more",
    ['{"deep":[1,null]}', "1.5", "-0", "1e999", "9" * 10_000, "null", '"\\ud800"', '{"a":1,"b":2}'],
    ids=lambda more: more[:12],
)
def test_an_entry_may_have_unknown_members(more: str) -> None:
    entry = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
    for text in (f'{{"@a":{{{entry},"more":{more}}}}}', f'{{"@a":{{"more":{more},{entry}}}}}'):
        assert load_pytree(io.BytesIO(file(text.encode(), b"\7")))["a"].tolist() == [7]


def test_null_metadata_are_empty() -> None:
    content = file({"__metadata__": None, "@a": byte()}, b"\7")
    assert load_metadata(io.BytesIO(content)) == {}
    assert load_pytree(io.BytesIO(content))["a"].tolist() == [7]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("place", ["header", "note", "digests", "kind", "inside a tensor"])
def test_deep_json_is_refused(opening: str, place: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    limit = sys.getrecursionlimit()
    for depth in [*range(limit // 2, limit + 20, 9), *range(limit - 60, limit, 2), 100_000]:
        deep = opening * depth + "1" + closing * depth
        if place == "header":
            content = file(f'{{"a":{deep}}}'.encode())
        elif place == "inside a tensor":
            content = file(f'{{"a":{{"dtype":{deep},"shape":[],"data_offsets":[0,0]}}}}'.encode())
        elif place == "note":
            content = noted(deep)
        elif place == "kind":
            content = noted(f'{{"version":1,"nodes":{{"":{deep}}}}}')
        else:
            content = file({"__metadata__": {DIGESTS: deep, DIGESTS + ".metadata": ""}})
        with no_hang():
            assert isinstance(attempt(load_metadata, content), FileFormatError)

"""Files that lie, each with what loading them says."""

import copy
import inspect
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hostile import (
    DIGESTS,
    NOTE,
    attempt,
    bounded_memory,
    byte,
    check_file,
    check_message,
    file,
    leaves,
    names,
    no_hang,
    nodes,
    noted,
    seeds,
    split,
    tensor,
)
from oracle import assert_loaded, assert_same
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    PyTreeContainer,
    TreeStructureError,
    dict2pytree,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
    save_pytree,
    string2keypath,
)
from pytree2safetensors._format import strict_json
from pytree2safetensors._format.header import MAX_DIMENSIONS, MAX_HEADER

FLOAT = tensor("F32", [2], 0, 8)
WHOLE = file({"@a": FLOAT}, bytes(8))


@pytest.fixture(autouse=True)
def _unchecked_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime type check of each of a million integers would take a minute."""
    monkeypatch.setattr(strict_json, "_integer", inspect.unwrap(strict_json._integer))


def refused(
    content: bytes, error: type[Pytree2SafetensorsError], text: str, *, by_all: bool = True
) -> None:
    """Assert that loading a file in any way is this error; or that its tree is, if not by all."""
    loaders: list[Callable[[Any], Any]] = [load_pytree, load_abstract]
    if by_all:
        loaders += [load_metadata, lambda source: load_into_pytree({"a": 0}, source)]
    for load in loaders:
        with no_hang(), pytest.raises(error) as caught:
            load(io.BytesIO(content))
        assert text in str(caught.value)
        check_message(caught.value)
        assert type(caught.value) is error


# --- lengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", seeds(), ids=range(len(seeds())))
def test_a_file_cut_anywhere_is_refused(content: bytes) -> None:
    for size in range(len(content)):
        with pytest.raises(FileFormatError, match=r"cut short|no safetensors file"):
            load_pytree(io.BytesIO(content[:size]))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_a_file_on_disk_cut_anywhere_is_refused(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    for size in range(len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(FileFormatError, match=r"cut short|no safetensors file"):
            load_pytree(path, mmap=mmap)


@pytest.mark.parametrize("more", [b"\0", b"x" * 4096, WHOLE, b"extra bytes of another format"])
def test_bytes_after_the_data_are_refused(more: bytes) -> None:
    refused(WHOLE + more, FileFormatError, "has bytes after its data: its header describes 8 bytes")


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
    with pytest.raises(FileFormatError, match="no safetensors file"):
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


# --- the header -------------------------------------------------------------------------------

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
    (file(b'{"a":1}'), "describes 'a' otherwise than by"),
    (file(b'{"a":null}'), "describes 'a' otherwise than by"),
    (file(b'{"a":[]}'), "describes 'a' otherwise than by"),
    (file(b'{"a":{}}'), "describes 'a' otherwise than by"),
    (file({"a": {"dtype": "U8", "shape": []}}), "describes 'a' otherwise than by"),
    (file({"a": tensor("U8", None, 0, 1)}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": tensor("U8", "1", 0, 1)}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": tensor(8, [1], 0, 1)}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": {**byte(), "data_offsets": [0]}}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": {**byte(), "data_offsets": [0, 1, 1]}}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": {**byte(), "data_offsets": {"0": 1}}}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": tensor("F128", [1], 0, 16)}, bytes(16)), "gives 'a' the unknown dtype 'F128'"),
    (file({"a": tensor("f32", [1], 0, 4)}, bytes(4)), "gives 'a' the unknown dtype 'f32'"),
    (file({"a": tensor("U8", [1], 0.0, 1.0)}, b"\0"), "describes 'a' otherwise than by"),
    (file({"a": tensor("U8", [1.0], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (
        file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"\0"),
        "describes 'a' otherwise than by",
    ),
    (
        file(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "a shape that is no list of sizes",
    ),
    (file({"a": tensor("U8", [True], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [[1]], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [-1], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [-1, -1], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [2**64], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [10**4000], 0, 1)}, b"\0"), "a shape that is no list of sizes"),
    (file({"a": tensor("U8", [1], False, True)}, b"\0"), "offsets that are no range"),
    (file({"a": tensor("U8", [1], -1, 0)}, b"\0"), "offsets that are no range"),
    (file({"a": tensor("U8", [1], 1, 0)}, b"\0"), "offsets that are no range"),
    (file({"a": tensor("U8", [1], 0, 2**64)}, b"\0"), "offsets that are no range"),
    (file({"a": tensor("U8", [1], 0, 2**63)}, b"\0"), "its dtype U8 with its shape [1] another"),
    (file({"a": tensor("U8", [2], 0, 1)}, b"\0"), "1 bytes, and its dtype U8 with its shape [2]"),
    (file({"a": tensor("U8", [], 0, 0)}), "0 bytes, and its dtype U8 with its shape []"),
    (file({"a": tensor("U8", [0], 0, 1)}, b"\0"), "1 bytes, and its dtype U8 with its shape [0]"),
    (file({"a": tensor("F4", [3], 0, 1)}, b"\0"), "its dtype F4 with its shape [3] another size"),
    (file({"a": tensor("F4", [3], 0, 2)}, b"\0"), "its dtype F4 with its shape [3] another size"),
    # Products beyond 64 bits, which come back as something small where they wrap around.
    (file({"a": tensor("U8", [2**32, 2**32], 0, 0)}), "another size"),
    (file({"a": tensor("U8", [2**63, 2], 0, 0)}), "another size"),
    (file({"a": tensor("F32", [2**62], 0, 0)}), "another size"),
    (file({"a": tensor("F32", [2**62 + 1], 0, 4)}, bytes(4)), "another size"),
    (file({"a": tensor("U8", [2, 2**63 + 1], 0, 2)}, bytes(2)), "another size"),
    # Nothing, in shapes that no array has.
    (file({"a": tensor("F32", [0, 2**63], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("F32", [2**62, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [2**63, 2**63, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [2**40, 2**40, 0], 0, 0)}), "beyond what memory can address"),
    (file({"a": tensor("U8", [1] * (MAX_DIMENSIONS + 1), 0, 1)}, b"\0"), "dimensions, and NumPy"),
    (file({"a": tensor("U8", [1] * 100_000, 0, 1)}, b"\0"), "100,000 dimensions, and NumPy"),
    (file({"a": byte(0), "b": byte(0)}, b"\0"), "has an overlap at the data of 'b'"),
    (file({"a": tensor("U8", [2], 0, 2), "b": byte(1)}, b"\0\0"), "an overlap at the data of 'b'"),
    (file({"a": byte(0), "b": byte(2)}, bytes(3)), "has a hole before the data of 'b'"),
    (file({"a": byte(1)}, bytes(2)), "has a hole before the data of 'a'"),
    (file({"a": byte(0), "b": byte(1)}, b"\0"), "is cut short: its header describes 2 bytes"),
    (file({"a": byte(0)}, b""), "is cut short: its header describes 1 bytes of data, and 0 follow"),
    (file({}, b"\0"), "has bytes after its data: its header describes 0 bytes"),
    (file({"__metadata__": []}), "the metadata of the BytesIO do not map names to strings"),
    (file({"__metadata__": "a"}), "the metadata of the BytesIO do not map names to strings"),
    (file({"__metadata__": {"a": 1}}), "the metadata of the BytesIO do not map names to strings"),
    (file({"__metadata__": {"a": None}}), "do not map names to strings"),
    (file({"__metadata__": {"a": {}}}), "do not map names to strings"),
    (file({"__metadata__": {"a": "\ud800"}}), "the metadata of the BytesIO hold a lone surrogate"),
    (file({"__metadata__": {"\udfff": "a"}}), "the metadata of the BytesIO hold a lone surrogate"),
    (file({"\ud800": byte()}, b"\0"), "has the name '\\ud800', which holds a lone surrogate"),
    (file({"@\udc00\ud800": byte()}, b"\0"), "which holds a lone surrogate"),
    # What stands twice.
    (file(b'{"a":1,"a":1}'), "the header of the BytesIO has 'a' twice"),
    (file(b'{"a":1,"\\u0061":1}'), "the header of the BytesIO has 'a' twice"),
    (file(b'{"__metadata__":{},"__metadata__":{}}'), "has '__metadata__' twice"),
    (file(b'{"__metadata__":{"a":"1","a":"2"}}'), "has 'a' twice"),
    (
        file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"\0"),
        "'dtype' tw",
    ),
    (noted('{"version":1,"version":1}'), "the note of the BytesIO has 'version' twice"),
    (noted('{"version":1,"nodes":{"@a":"list","@a":"dict"}}'), "the BytesIO has '@a' twice"),
    (file({"__metadata__": {DIGESTS: "{}"}}), "the metadata of the BytesIO do not match"),
    (file({"__metadata__": {DIGESTS + ".metadata": ""}}), "the metadata of the BytesIO do not"),
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
    refused(file(tensors, bytes(size + 1)), FileFormatError, "another size")


def test_a_number_of_many_digits_is_refused() -> None:
    for digits in (4300, 4301, 100_000):
        header = b'{"a":{"dtype":"U8","shape":[' + b"9" * digits + b'],"data_offsets":[0,1]}}'
        refused(file(header, b"\0"), FileFormatError, "")


@pytest.mark.parametrize(
    "more",
    ['{"deep":[1,null]}', "1.5", "-0", "1e999", "9" * 10_000, "null", '"\\ud800"', '{"a":1,"a":2}'],
    ids=lambda more: more[:12],
)
def test_a_header_may_say_more_than_it_must(more: str) -> None:
    entry = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
    for text in (f'{{"@a":{{{entry},"more":{more}}}}}', f'{{"@a":{{"more":{more},{entry}}}}}'):
        assert load_pytree(io.BytesIO(file(text.encode(), b"\7")))["a"].tolist() == [7]


def test_metadata_that_are_null_are_none() -> None:
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


# --- the note ---------------------------------------------------------------------------------

U32 = tensor("U32", [2], 0, 8)

NOTES: list[tuple[bytes, str]] = [
    (noted(""), "the note of the BytesIO is not valid JSON"),
    (noted("null"), "the note of the BytesIO has no version; it is damaged"),
    (noted([]), "the note of the BytesIO has no version; it is damaged"),
    (noted({}), "the note of the BytesIO has no version; it is damaged"),
    (noted({"version": "1"}), "the note of the BytesIO has no version; it is damaged"),
    (noted({"version": True}), "the note of the BytesIO has no version; it is damaged"),
    (noted({"version": 0}), "the note of the BytesIO has no version; it is damaged"),
    (noted({"version": 1.0}), "the note of the BytesIO"),
    (noted({"version": 2}), "is of version 2, and this is a reader of version 1; install a newer"),
    (noted({"version": 10**4000}), "is of version 1000000000, and this is a reader of version 1"),
    (noted({"version": 1, "code": ""}), "the note of the BytesIO has an unknown entry 'code'"),
    (noted({"version": 1, "nodes": []}), "lists its node kinds in no object"),
    (noted({"version": 1, "leaves": None}), "lists its leaf kinds in no object"),
    (nodes({"": "set"}), "gives '' the unknown or malformed node kind 'set'"),
    (nodes({"": 1}), "gives '' the unknown or malformed node kind of type int"),
    (nodes({"": []}), "gives '' the unknown or malformed node kind of type list"),
    (nodes({"": "OrderedDict"}), "the unknown or malformed node kind 'OrderedDict'"),
    (nodes({"": ["OrderedDict"]}), "the unknown or malformed node kind 'OrderedDict'"),
    (nodes({"": ["OrderedDict", "@a"]}), "the unknown or malformed node kind 'OrderedDict'"),
    (nodes({"": ["OrderedDict", [1]]}), "the unknown or malformed node kind 'OrderedDict'"),
    (nodes({"": ["OrderedDict", [], []]}), "the unknown or malformed node kind 'OrderedDict'"),
    (nodes({"": ["tuple", []]}), "the unknown or malformed node kind 'tuple'"),
    (nodes({"": "x" * 100_000}), "the unknown or malformed node kind 'xxxx"),
    (leaves({"@a": "os.system"}), "gives '@a' the unknown or malformed leaf kind 'os.system'"),
    (leaves({"@a": "float128"}), "the unknown or malformed leaf kind 'float128'"),
    (leaves({"@a": ["int", "7"]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "0x7fffffffffffffff"]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "0x0" + "f" * 20]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "0x" + "F" * 20]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "__import__('os')"]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["str", 1]}), "the unknown or malformed leaf kind 'str'"),
    (leaves({"@a": "str"}), "the unknown or malformed leaf kind 'str'"),
    (leaves({"@a": "key"}), "the unknown or malformed leaf kind 'key'"),
    (leaves({"@a": ["str", "x"]}, **{"@a": byte()}), "a tensor '@a', and a note that it has none"),
    (leaves({"@a": "int"}), "the note of the BytesIO speaks of '@a', which is no tensor"),
    (leaves({"@a": "int"}, **{"@a": byte()}), "'@a' is noted as int and stored as U8 of shape [1]"),
    (leaves({"@a": "int"}, **{"@a": tensor("I64", [1], 0, 8)}), "stored as I64 of shape [1]"),
    (leaves({"@a": "bool"}, **{"@a": tensor("U8", [], 0, 1)}), "stored as U8 of shape []"),
    (leaves({"@a": "complex"}, **{"@a": tensor("F64", [], 0, 8)}), "stored as F64 of shape []"),
    (leaves({"@a": "weak"}, **{"@a": byte()}), "stored as U8 of shape [1]"),
    (leaves({"@a": "complex128"}, **{"@a": tensor("F64", [1], 0, 8)}), "which contradict each"),
    (leaves({"@a": "int4"}, **{"@a": byte()}), "'@a' is noted as int4 and stored as U8"),
    (leaves({"@a": ["key", "rbg"]}, **{"@a": byte()}), "'@a' is noted as key and stored as U8"),
]

TREE_NOTES: list[tuple[bytes, str]] = [
    (leaves({"@a": ["key", "os"]}, **{"@a": U32}), "a key of the PRNG implementation 'os', which"),
    (leaves({"@a": ["key", "rbg"]}, **{"@a": U32}), "noted as a key of rbg, whose data end in"),
    (leaves({"@a": "int4"}, **{"@a": tensor("I8", [1], 0, 1)})[:-1] + b"\x10", "beyond int4"),
]


CLAIMS: list[tuple[bytes, str]] = [
    (nodes({"#01": "list"}), "'#01' spells no key path"),
    (nodes({"@\ud800": "list"}), "a lone surrogate has no UTF-8 spelling"),
    (nodes({"@a": "list"}, "@a"), "contradicts its tensors: '@a' and '@a' name a leaf and a node"),
    (nodes({"": "list"}, "@a"), "contradicts its tensors: '' is noted as list, and its children"),
    (nodes({"": "tuple"}, "@a"), "contradicts its tensors: '' is noted as tuple, and its children"),
    (nodes({"": "None"}, "@a"), "contradicts its tensors: '' is noted as None, and its children"),
    (nodes({"": ["OrderedDict", ["@b"]]}, "@a"), "are not those of its children"),
    (nodes({"": ["OrderedDict", ["@a", "@a"]]}, "@a"), "are not those of its children"),
    (nodes({"": ["OrderedDict", ["@a", "@b"]]}, "@a"), "are not those of its children"),
    (nodes({"": ["OrderedDict", ["@a@b"]]}, r"@a\@b"), "are not those of its children"),
    (nodes({"": ["OrderedDict", [r"@\(True)"]]}, r"@\(1)"), "are not those of its children"),
    (nodes({"": ["OrderedDict", ["@a"]]}), "the noted keys of '' have no leaves"),
    (nodes({"": ["OrderedDict", ["a"]]}, "a"), "'' is noted as OrderedDict, and its children"),
    (nodes({"": ["OrderedDict", ["#0"]]}, "#0"), "'' is noted as OrderedDict, and its children"),
    (nodes({"a": ["OrderedDict", ["@b@c"]]}, "a@b@c"), "are not those of its children"),
    (nodes({"a": ["OrderedDict", [".b"]]}), "the noted keys of 'a' have no leaves"),
    (nodes({"a.b.c": "list"}, "a"), "'a' and 'a.b.c' name a leaf and a node at one place"),
    (nodes({"a": "list"}, ""), "'' and 'a' name a leaf and a node at one place"),
    (nodes({"a": "None", "a#0": "None"}), "'a' is noted as None, and its children differ"),
    (nodes({"a": "tuple"}, r"a#\(0)"), "'a' is noted as tuple, and its children differ"),
    (nodes({"a": "tuple"}, "a#0", "a@b"), "'a' is noted as tuple, and its children differ"),
    (nodes({"": "tuple"}, "#0", "b"), "'' is noted as tuple, and its children differ"),
]


@pytest.mark.parametrize(("content", "text"), CLAIMS, ids=range(len(CLAIMS)))
def test_a_note_that_contradicts_the_names_is_refused_however_the_file_is_opened(
    content: bytes, text: str
) -> None:
    refused(content, FileFormatError, text)
    loaders: tuple[Callable[[Any], Any], ...] = (
        lambda source: load_pytree(source, prefix="@nothing"),
        lambda source: load_into_pytree({"b": 1}, source, prefix="@nothing"),
    )
    for load in loaders:
        with pytest.raises(FileFormatError) as caught:
            load(io.BytesIO(content))
        assert text in str(caught.value)


def test_a_note_may_stand_beside_names_that_spell_nothing() -> None:
    kinds = {"@a": "tuple", "b": "list", "@o": ["OrderedDict", ["@y", "@x"]]}
    content = nodes(kinds, "#01", "a\\x", "@a#0", "@ab", "b c", "ba", "@o@x", "@o@y#0", "@oo")
    assert load_metadata(io.BytesIO(content)) == {}
    assert load_pytree(io.BytesIO(content), prefix="@o")["x"].tolist() == [0]


def test_many_deep_claims_are_checked_in_time() -> None:
    kinds = {f"@{number}" + "#0" * 2000: "list" for number in range(2000)}
    with no_hang(20):
        assert isinstance(attempt(load_metadata, nodes(kinds)), dict)


@pytest.mark.parametrize(("content", "text"), NOTES, ids=range(len(NOTES)))
def test_a_note_that_is_none_is_refused(content: bytes, text: str) -> None:
    with bounded_memory(len(content)):
        refused(content, FileFormatError, text)


@pytest.mark.parametrize(("content", "text"), TREE_NOTES, ids=range(len(TREE_NOTES)))
def test_a_note_that_contradicts_the_tensors_is_refused(content: bytes, text: str) -> None:
    found = attempt(load_pytree, content)
    assert type(found) is FileFormatError
    assert text in str(found)


@pytest.mark.parametrize("path", [".a", "#01", "@b\\q", "@\ud800"])
def test_a_noted_leaf_without_a_tensor_has_a_key_path(path: str) -> None:
    content = leaves({path: ["str", "text"]})
    for load in (load_pytree, load_abstract, load_metadata):
        found = attempt(load, content)
        assert type(found) is FileFormatError
        assert "the note of the BytesIO has a leaf that no tree has: " in str(found)


def test_noted_nodes_that_registered_nodes_alone_have_make_no_tree() -> None:
    for kinds, places, text in (
        ({"@a": "list", "b": "list"}, [], "two kinds of node at once"),
        ({r"@\(True)": "tuple"}, [r"@\(1)#0"], "have dict keys that are equal in Python"),
        ({r"@\(True)": "None"}, [r"@\(1)"], "have dict keys that are equal in Python"),
    ):
        found = attempt(load_pytree, nodes(kinds, *places))
        assert type(found) is TreeStructureError
        assert text in str(found)
        assert "load_into_pytree loads them into a template" in str(found)


def test_a_large_note_is_read() -> None:
    kinds = {f"@a#{i}#{'0' * (i % 2)}": "list" for i in range(0, 600_000, 2) if i % 2}
    content = noted({"version": 1, "nodes": kinds, "leaves": {"@t": ["str", "x" * 50_000_000]}})
    with no_hang(), bounded_memory(len(content), 16):
        assert len(load_pytree(io.BytesIO(content))["t"]) == 50_000_000


def test_a_large_int_is_read() -> None:
    content = leaves({"@a": ["int", "-0x" + "f" * 1_000_000]})
    with no_hang(), bounded_memory(len(content), 16):
        assert load_pytree(io.BytesIO(content))["a"] == -(2**4_000_000) + 1


# --- names ------------------------------------------------------------------------------------

NAMES: list[tuple[tuple[str, ...], type[Pytree2SafetensorsError], str]] = [
    (("#01",), KeyPathError, "'#01' spells no key path: at position 1"),
    (("a\\x",), KeyPathError, "spells no key path"),
    (("@\\(open('x'))",), KeyPathError, "spells no key path"),
    (("@\\(1e999)",), KeyPathError, "spells no key path"),
    (("@\\(" + "(" * 100_000 + ")",), KeyPathError, "spells no key path"),
    (("@\\(" + "9" * 1_000_000 + ")",), KeyPathError, "spells no key path"),
    (("#2000000000",), TreeStructureError, "would have 2000000001 elements"),
    (("#2147483647",), TreeStructureError, "would have 2147483648 elements"),
    (("#2147483648",), KeyPathError, "spells no key path"),
    (("#\\(2000000000)",), TreeStructureError, "lacks 2000000000 of its 2000000001 children"),
    (tuple(f"@{i}#600000" for i in range(3)), TreeStructureError, "more than 1048576 gaps"),
    (("a.b", "a@c"), TreeStructureError, "two kinds of node at once"),
    (("@a", "#0"), TreeStructureError, "two kinds of node at once"),
    (("#0", "#\\(1)"), TreeStructureError, "two kinds of node at once"),
    (("a", "a.b"), TreeStructureError, "name a leaf and a node at one place"),
    (("", "@a"), TreeStructureError, "name a leaf and a node at one place"),
    (("@\\(1)", "@\\(True)"), TreeStructureError, "are equal in Python"),
    (("@\\(1)", "@\\(1\\.0)"), TreeStructureError, "are equal in Python"),
    (("@\\(1)@a", "@\\(True)@b"), TreeStructureError, "are equal in Python"),
    (("@a", "@\\(1)"), TreeStructureError, "JAX cannot sort the keys"),
    (("@\\(None)", "@\\(b'')"), TreeStructureError, "JAX cannot sort the keys"),
    (("@a" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("#0" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("a" + ".a" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("#\\(0)" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("@a" * 10_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("a" + ".a" * 10_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("#\\(0)" * 10_000,), TreeStructureError, "nested deeper than JAX can flatten"),
]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\3\4" + b"x" * 30, "a zip archive"),
    ],
)
def test_what_looks_like_something_else_is_told(content: bytes, kind: str) -> None:
    with pytest.raises(FileFormatError, match=f"looks like {kind}"):
        load_pytree(io.BytesIO(content))


@pytest.mark.parametrize(("found", "error", "text"), NAMES, ids=range(len(NAMES)))
def test_names_that_make_no_tree_are_refused(
    found: tuple[str, ...], error: type[Pytree2SafetensorsError], text: str
) -> None:
    content = names(*found)
    refused(content, error, text, by_all=False)
    message = r"^the names in the BytesIO make no tree: .*into a template, and load_abstract\(.*$"
    with pytest.raises(error, match=message):
        load_pytree(io.BytesIO(content))
    if len(content) < 100_000:
        with bounded_memory(len(content)):
            attempt(load_pytree, content)
    assert load_metadata(io.BytesIO(content)) == {}


@pytest.mark.parametrize("found", [entry[0] for entry in NAMES], ids=range(len(NAMES)))
def test_a_template_asks_for_no_tree_of_the_names(found: tuple[str, ...]) -> None:
    source = io.BytesIO(names(*found))
    template = {"x": np.zeros(1, np.uint8)}
    loaded = load_into_pytree(template, source, strict=False, rename={"@x": found[0]})
    assert loaded["x"].tolist() == [0]


@pytest.mark.parametrize("segment", ["@a", ".a", "#0", r"#\(0)"])
def test_names_as_deep_as_jax_can_flatten_are_loaded_and_deeper_ones_refused(segment: str) -> None:
    outcomes = []
    for depth in (100, 300, 500, *range(600, 1100, 50)):
        found = attempt(load_pytree, names((segment * depth).removeprefix(".")))
        outcomes.append(not isinstance(found, TreeStructureError))
        if outcomes[-1]:
            jax.tree_util.tree_structure(found)
    assert outcomes[:3] == [True, True, True]
    assert sorted(outcomes, reverse=True) == outcomes
    assert sys.version_info >= (3, 12) or not outcomes[-1]
    check_file(names("@a"))  # the stack is as it was


@pytest.mark.parametrize("make", [lambda t: {"a": t}, lambda t: PyTreeContainer({"a": t})])
def test_a_tree_too_deep_to_save_is_refused_and_breaks_nothing(make: Callable[[Any], Any]) -> None:
    tree: Any = 1
    for _ in range(20_000):
        tree = make(tree)
    cyclic = PyTreeContainer()
    cyclic.again = {"and": [cyclic]}
    for found in (tree, cyclic):
        with pytest.raises(TreeStructureError, match="is cyclic, or nested deeper than JAX can"):
            pytree2dict(found)
    check_file(names("@a"))


STRANGE = [
    "@\0", "@\u202egnp.exe", "@\u2066", "@\ufeff", "@\uffff", "@\U0010ffff", "@é", "@e\u0301", "@ ",
    "@\n", "@\x1b[31m", "@" + "x" * 1_000_000, "@" + "é" * 1_000_000, "@" + "\\." * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE, ids=range(len(STRANGE)))
def test_strange_names_are_names(name: str) -> None:
    content = names(name)
    with no_hang(), bounded_memory(len(content)):
        tree = check_file(content)
    assert list(pytree2dict(tree)) == [name]
    assert isinstance(attempt(lambda s: load_pytree(s, prefix="@none"), content), Exception)
    with pytest.raises(Pytree2SafetensorsError) as caught:
        load_into_pytree({"other": 1}, io.BytesIO(content))
    assert len(str(caught.value)) < 2000
    assert str(caught.value).replace("\n", "").isprintable()


DUNDER = [
    "__class__", "__dict__", "__reduce__", "__reduce_ex__", "__getattribute__", "__getattr__",
    "__setattr__", "__init__", "__new__", "__del__", "__repr__", "__hash__", "__eq__", "__array__",
    "__jax_array__", "__slots__", "__attrs__", "__weakref__", "__module__", "__copy__", "__iter__",
    "__deepcopy__", "__getstate__", "__setstate__", "__instancecheck__", ".__metadata__", ".", "self",
    "tree_flatten", "tree_unflatten", "shape", "dtype", "items", "keys", "attrs", "_fields",
]  # fmt: skip


def test_attribute_names_change_nothing_about_the_container() -> None:
    tree = load_pytree(io.BytesIO(names(*DUNDER)))
    assert type(tree) is PyTreeContainer
    assert isinstance(tree, PyTreeContainer)
    assert tree.__class__ is PyTreeContainer
    assert repr(tree).startswith("PyTreeContainer(")
    assert sorted(pytree2dict(tree)) == sorted(DUNDER)
    for again in (copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert_loaded(again, tree)
    assert_same(jax.tree_util.tree_map(lambda leaf: leaf, tree), tree)
    assert_loaded(jax.jit(lambda t: t)(tree), tree)
    check_file(names(*DUNDER))


def test_many_names_take_time_and_memory_in_proportion() -> None:
    content = names(*(f"@{i % 7}#{i // 7}.x" for i in range(3000)))
    with no_hang(), bounded_memory(len(content)):
        load_pytree(io.BytesIO(content))
    long = "@" + "x" * 10_000
    content = names(*(f"{long}@{i}" for i in range(300)))
    with no_hang(), bounded_memory(len(content)):
        load_pytree(io.BytesIO(content))


def test_flat_dicts_and_strings_are_input_like_any_other() -> None:
    for name in (*STRANGE, *DUNDER):
        assert dict2pytree({name: 1}) is not None
    for found, error, _ in NAMES:
        with no_hang(), pytest.raises(error):
            dict2pytree(dict.fromkeys(found, 1))
    for name in ("@\ud800", "\ud800", "@a.\udfff#0", "#0@\ud800"):
        for read in (string2keypath, lambda name: dict2pytree({name: 1})):
            with pytest.raises(KeyPathError, match="a lone surrogate has no UTF-8 spelling"):
                read(name)


# --- nothing is run ---------------------------------------------------------------------------


# What Python tells an auditor when something is run. A hook stays for ever, so this one sleeps.
RUNNING = {"import", "os.system", "subprocess.Popen", "pickle.find_class"}
events: list[str] = []
watching = False


def audit(event: str, args: tuple[Any, ...]) -> None:
    # The runtime type checks compile code of their own.
    if watching and (event in RUNNING or "antigravity" in f"{args}"):
        events.append(f"{event} {args}")


@pytest.fixture(scope="module")
def auditor() -> None:
    sys.addaudithook(audit)


@pytest.mark.usefixtures("auditor")
def test_nothing_that_a_file_names_is_imported_or_called(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = [
        names("os.system", "__import__@os", "builtins.eval", "antigravity"),
        names("@\\(__import__('antigravity'))"),
        nodes({"": "antigravity"}),
        nodes({"": ["antigravity.fly", ["@a"]]}, "@a"),
        leaves({"@a": "antigravity"}, **{"@a": byte()}),
        leaves({"@a": ["key", "antigravity"]}, **{"@a": U32}),
        leaves({"@a": ["str", "{0.__class__}"]}),
        file({"@a": tensor("antigravity", [], 0, 1)}, b"\0"),
        file({"@a": tensor("O", [], 0, 8)}, bytes(8)),
        file({"__metadata__": {"format": "antigravity", NOTE: "__import__('antigravity')"}}),
    ]
    for content in attacks:
        attempt(load_pytree, content)  # what JAX imports and compiles for itself
    monkeypatch.setattr(sys.modules[__name__], "watching", True)
    for content in attacks:
        attempt(load_pytree, content)
    assert events == []
    compile("antigravity", "here", "eval")
    assert len(events) == 1


# --- what the peer's own tests try ------------------------------------------------------------

SMALL = {"test": tensor("I32", [2, 2], 0, 16)}


def peer(header: str, data: bytes, length: int | None = None) -> bytes:
    return file(header.encode(), data, length)


PEER_SOUND: list[tuple[bytes, dict[str, tuple[int, ...]]]] = [
    (peer("{}      ", b""), {}),
    (peer('{"__metadata__":{"framework":"pt"}}     ', b""), {}),
    (peer("{}\r \t\n", b""), {}),
    (file({"attn.0": tensor("F32", [1, 2, 3], 0, 24)}, bytes(24)), {"attn.0": (1, 2, 3)}),
    (file({"attn0": tensor("F32", [1, 1, 2, 3], 0, 24)}, bytes(24)), {"attn0": (1, 1, 2, 3)}),
    (file({"test": tensor("I32", [], 0, 4)}, bytes(4)), {"test": ()}),
    (file(SMALL, bytes(16)), {"test": (2, 2)}),
    (file({"test": tensor("I32", [2, 0], 0, 0)}), {"test": (2, 0)}),
    # Tensors stand in any order, and those of no size anywhere.
    (
        file({"b": byte(1), "z": tensor("F32", [0], 1, 1), "a": byte(0)}, bytes(2)),
        {"a": (1,), "b": (1,), "z": (0,)},
    ),
]

OVERLAPPING = {f"weight_{i}": tensor("F32", [2, 2], 0, 16) for i in range(10)}

PEER_BROKEN: list[tuple[bytes, str]] = [
    (file(SMALL, bytes(16), 1000), "is cut short: its header should take 1,000 bytes"),
    (b"", "has 0 bytes and is no safetensors file"),
    (b"<\0\0\0\0\0\0\0", "is cut short: its header should take 60 bytes, and the file has 8"),
    (b"<\0\0\0\0\xff\xff\xff" + file(SMALL, bytes(16))[8:], "and the format allows 100,000,000"),
    (b"\1\0\0\0\0\0\0\0\xff", "its header does not begin with {"),
    (peer("{", b""), "is not valid JSON"),
    (peer("\t\n{}\r ", b""), "its header does not begin with {"),
    (file(SMALL, bytes(16)) + b"bytes of another file", "has bytes after its data"),
    (file(SMALL, bytes(14)), "is cut short: its header describes 16 bytes of data, and 14 follow"),
    (
        file({"test": tensor("I32", [2, 2], 0, 4)}),
        "4 bytes, and its dtype I32 with its shape [2, 2]",
    ),
    (file({"test": tensor("I32", [2, 2**64 - 2], 0, 16)}, bytes(16)), "another size"),
    (file({"test": tensor("I32", [2, 2**63 - 1], 0, 16)}, bytes(16)), "another size"),
    (file(OVERLAPPING, bytes(16)), "has an overlap at the data of 'weight_"),
    (file({"test": tensor("F4", [1, 3], 0, 2)}, bytes(2)), "its dtype F4 with its shape [1, 3]"),
]


@pytest.mark.parametrize(("content", "shapes"), PEER_SOUND, ids=range(len(PEER_SOUND)))
def test_what_the_peer_takes_is_taken(content: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    found = load_pytree(io.BytesIO(content))
    assert {name: leaf.shape for name, leaf in pytree2dict(found).items()} == shapes


@pytest.mark.parametrize(("content", "text"), PEER_BROKEN, ids=range(len(PEER_BROKEN)))
def test_what_the_peer_refuses_is_refused(content: bytes, text: str) -> None:
    refused(content, FileFormatError, text)


@pytest.mark.parametrize("side", [2, 200])
def test_many_tensors_on_the_same_bytes_are_refused_at_once(side: int) -> None:
    size = side * side * 4
    header = {f"weight_{i}": tensor("F32", [side, side], 0, size) for i in range(10_000)}
    content = file(header, bytes(size))
    with no_hang(), bounded_memory(len(content)):
        found = attempt(load_pytree, content)
    assert "has an overlap at the data of 'weight_" in str(found)


# --- damage -----------------------------------------------------------------------------------


def test_with_checksums_every_flipped_bit_is_reported_or_changes_nothing() -> None:
    tree = {
        "w": jnp.arange(3, dtype=jnp.float32),
        "t": (1, "é", None),
    }
    metadata = {"run": "1"}
    saved = io.BytesIO()
    save_pytree(tree, saved, checksum=True, metadata=metadata)
    content = saved.getvalue()
    data = len(content) - len(split(content)[1])
    assert_loaded(load_pytree(io.BytesIO(content)), tree)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        found = attempt(load_pytree, bytes(flipped))
        if not isinstance(found, FileFormatError):
            assert_loaded(found, tree)
        told = attempt(load_metadata, bytes(flipped))
        if bit // 8 < data:
            assert isinstance(told, FileFormatError) or told == metadata
        else:
            assert isinstance(found, FileFormatError)
            assert "in the BytesIO does not match its digest: its data are damaged" in str(found)
            assert told == metadata


def test_with_checksums_a_file_that_is_put_together_from_two_is_reported() -> None:
    contents = []
    for value in (1.0, 2.0):
        saved = io.BytesIO()
        save_pytree({"a": jnp.full(8, value), "b": jnp.full(8, value)}, saved, checksum=True)
        contents.append(saved.getvalue())
    assert len(contents[0]) == len(contents[1])
    spliced = contents[0][:-32] + contents[1][-32:]
    found = attempt(load_pytree, spliced)
    assert "'@b' in the BytesIO does not match its digest" in str(found)


def test_with_checksums_tensors_cannot_change_places() -> None:
    saved = io.BytesIO()
    save_pytree({"a": jnp.ones(8), "b": jnp.zeros(8)}, saved, checksum=True)
    header, data = split(saved.getvalue())
    entries = json.loads(header)
    entries["@a"], entries["@b"] = entries["@b"], entries["@a"]
    found = attempt(load_pytree, file(entries, data))
    assert "does not match its digest" in str(found)


def test_with_checksums_a_subtree_and_a_template_are_checked() -> None:
    saved = io.BytesIO()
    save_pytree({"a": jnp.ones(8), "b": jnp.zeros(8)}, saved, checksum=True)
    flipped = bytearray(saved.getvalue())
    flipped[-1] ^= 1
    source = bytes(flipped)
    assert load_pytree(io.BytesIO(source), prefix="@a").tolist() == [1.0] * 8
    template = {"a": jnp.ones(8), "b": jnp.ones(8)}
    loads: list[Callable[[], Any]] = [
        lambda: load_pytree(io.BytesIO(source), prefix="@b"),
        lambda: load_into_pytree(template, io.BytesIO(source)),
    ]
    for load in loads:
        with pytest.raises(FileFormatError, match="'@b' in the BytesIO does not match its digest"):
            load()

"""Wrong notes, each with the message of the error."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from hostile import attempt, bounded_memory, byte, leaves, no_hang, nodes, noted, refused, tensor
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    TreeStructureError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
)

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
    (noted({"version": 2}), "has version 2, but this reader knows only version 1; install a newer"),
    (noted({"version": 10**4000}), "has version 1000000000, but this reader knows only version 1"),
    (noted({"version": 1, "code": ""}), "the note of the BytesIO has an unknown entry 'code'"),
    (noted({"version": 1, "nodes": []}), "the node kinds in the note of"),
    (noted({"version": 1, "leaves": None}), "the leaf kinds in the note of"),
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
    (leaves({"@a": ["int", "-0x8000000000000000"]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "0x0" + "f" * 20]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "0x" + "F" * 20]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["int", "__import__('os')"]}), "the unknown or malformed leaf kind 'int'"),
    (leaves({"@a": ["str", 1]}), "the unknown or malformed leaf kind 'str'"),
    (leaves({"@a": "str"}), "the unknown or malformed leaf kind 'str'"),
    (leaves({"@a": "key"}), "the unknown or malformed leaf kind 'key'"),
    (
        leaves({"@a": ["str", "x"]}, **{"@a": byte()}),
        "a tensor '@a', but its note says that it has no tensor",
    ),
    (leaves({"@a": "int"}), "the note of the BytesIO names '@a', which is not a tensor"),
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
    (
        leaves({"@a": ["key", "rbg"]}, **{"@a": U32}),
        "noted as a key of rbg, whose data must end in",
    ),
    (
        leaves({"@a": "int4"}, **{"@a": tensor("I8", [1], 0, 1)})[:-1] + b"\x10",
        "has values that are not int4",
    ),
]


CLAIMS: list[tuple[bytes, str]] = [
    (nodes({"#01": "list"}), "'#01' is not a key path"),
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
    (nodes({"a.b.c": "list"}, "a"), "'a' and 'a.b.c' name a leaf and a node at the same place"),
    (nodes({"a": "list"}, ""), "'' and 'a' name a leaf and a node at the same place"),
    (nodes({"a": "None", "a#0": "None"}), "'a' is noted as None, and its children differ"),
    (nodes({"a": "tuple"}, r"a#\(0)"), "'a' is noted as tuple, and its children differ"),
    (nodes({"a": "tuple"}, "a#0", "a@b"), "'a' is noted as tuple, and its children differ"),
    (nodes({"": "tuple"}, "#0", "b"), "'' is noted as tuple, and its children differ"),
]


# Notes beside names that are not key paths, which do not count. So some of these files open, and only
# their trees are refused.
BESIDE: list[tuple[bytes, str]] = [
    (nodes({"@a": "list"}, "@a#01"), "name"),
    (nodes({r"@a\.b": "list"}, "@a\\"), "name"),
    (nodes({"": "tuple"}, "@a#01"), "name"),
    (nodes({"@a": ["OrderedDict", ["@b"]]}, "@a@b#01"), "note"),
    (nodes({"@a": ["OrderedDict", ["@b"]]}, "@a@b", "@a@c#01"), "name"),
]


@pytest.mark.parametrize(("content", "reason"), BESIDE, ids=range(len(BESIDE)))
def test_names_that_are_not_key_paths_do_not_count_for_a_note(content: bytes, reason: str) -> None:
    opened = attempt(load_metadata, content)
    assert (type(opened) is FileFormatError) == (reason == "note")
    error = {"name": KeyPathError, "note": FileFormatError}[reason]
    assert type(attempt(load_pytree, content)) is error


# Notes of a node that is deeper than many readers take. What they say of it counts nevertheless.
_DEEP = "@a" * 1100
DEEP: list[bytes] = [
    nodes({_DEEP: ["OrderedDict", ["@a"]]}),
    nodes({_DEEP: ["OrderedDict", ["@a"]]}, f"{_DEEP}@b"),
    nodes({_DEEP: "tuple"}, f"{_DEEP}@a"),
    nodes({_DEEP: "tuple"}, "@a"),
    nodes({_DEEP: "tuple"}, _DEEP.removesuffix("@a")),
]


@pytest.mark.parametrize("content", DEEP, ids=range(len(DEEP)))
def test_a_note_of_a_deep_node_is_compared_with_the_names(content: bytes) -> None:
    assert type(attempt(load_metadata, content)) is FileFormatError
    assert type(attempt(load_pytree, content)) is FileFormatError


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


def test_a_note_may_accompany_names_that_are_not_key_paths() -> None:
    kinds = {"@a": "tuple", "b": "list", "@o": ["OrderedDict", ["@y", "@x"]]}
    content = nodes(kinds, "#01", "a\\x", "@a#0", "@ab", "b c", "ba", "@o@x", "@o@y#0", "@oo")
    assert load_metadata(io.BytesIO(content)) == {}
    assert load_pytree(io.BytesIO(content), prefix="@o")["x"].tolist() == [0]


def test_many_deep_claims_are_checked_in_time() -> None:
    kinds = {f"@{number}" + "#0" * 2000: "list" for number in range(2000)}
    with no_hang(20):
        assert isinstance(attempt(load_metadata, nodes(kinds)), dict)


@pytest.mark.parametrize(("content", "text"), NOTES, ids=range(len(NOTES)))
def test_a_malformed_note_is_refused(content: bytes, text: str) -> None:
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
        assert "the note of the BytesIO has an impossible leaf: " in str(found)


def test_noted_nodes_that_only_registered_types_have_make_no_tree() -> None:
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

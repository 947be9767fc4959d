"""Wrong names, and names that must not be run as code."""

import copy
import functools
import io
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from hostile import (
    NOTE,
    attempt,
    bounded_memory,
    byte,
    check_file,
    file,
    leaves,
    names,
    no_hang,
    nodes,
    refused,
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
    string2keypath,
)

U32 = tensor("U32", [2], 0, 8)


NAMES: list[tuple[tuple[str, ...], type[Pytree2SafetensorsError], str]] = [
    (("#01",), KeyPathError, "'#01' is not a key path: at position 1"),
    (("a\\x",), KeyPathError, "is not a key path"),
    (("@\\(open('x'))",), KeyPathError, "is not a key path"),
    (("@\\(1e999)",), KeyPathError, "is not a key path"),
    (("@\\(" + "(" * 100_000 + ")",), KeyPathError, "is not a key path"),
    (("@\\(" + "9" * 1_000_000 + ")",), KeyPathError, "is not a key path"),
    (("#2000000000",), TreeStructureError, "would have 2000000001 elements"),
    (("#2147483647",), TreeStructureError, "would have 2147483648 elements"),
    (("#2147483648",), KeyPathError, "is not a key path"),
    (("#\\(2000000000)",), TreeStructureError, "lacks 2000000000 of its 2000000001 children"),
    (tuple(f"@{i}#600000" for i in range(3)), TreeStructureError, "more than 1048576 gaps"),
    (("a.b", "a@c"), TreeStructureError, "two kinds of node at once"),
    (("@a", "#0"), TreeStructureError, "two kinds of node at once"),
    (("#0", "#\\(1)"), TreeStructureError, "two kinds of node at once"),
    (("a", "a.b"), TreeStructureError, "name a leaf and a node at the same place"),
    (("", "@a"), TreeStructureError, "name a leaf and a node at the same place"),
    (("@\\(1)", "@\\(True)"), TreeStructureError, "are equal in Python"),
    (("@\\(1)", "@\\(1\\.0)"), TreeStructureError, "are equal in Python"),
    (("@\\(1)@a", "@\\(True)@b"), TreeStructureError, "are equal in Python"),
    (("@\\(0\\.0)", "@\\(-0\\.0)"), TreeStructureError, "are equal in Python"),
    (("@\\(0\\.0)@a", "@\\(-0\\.0)@b"), TreeStructureError, "are equal in Python"),
    (("@a", "@\\(1)"), TreeStructureError, "JAX cannot sort the keys"),
    (("@\\(None)", "@\\(b'')"), TreeStructureError, "JAX cannot sort the keys"),
    (("@a" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("#0" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("a" + ".a" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
    (("#\\(0)" * 100_000,), TreeStructureError, "nested deeper than JAX can flatten"),
]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\3\4" + b"x" * 30, "a zip archive"),
        (b"PK\3\4" + bytes(100), "a zip archive"),
    ],
)
def test_what_looks_like_something_else_is_reported(content: bytes, kind: str) -> None:
    with pytest.raises(FileFormatError, match=f"looks like {kind}"):
        load_pytree(io.BytesIO(content))


@pytest.mark.parametrize(("found", "error", "text"), NAMES, ids=range(len(NAMES)))
def test_names_that_make_no_tree_are_refused(
    found: tuple[str, ...], error: type[Pytree2SafetensorsError], text: str
) -> None:
    content = names(*found)
    refused(content, error, text, by_all=False)
    message = (
        r"^the names in the BytesIO do not form a tree: .*into a template, "
        r"load_pytree\(\.\.\., separator='\.'\) splits them at dots, and load_abstract\(.*$"
    )
    with pytest.raises(error, match=message):
        load_pytree(io.BytesIO(content))
    if len(content) < 100_000:
        with bounded_memory(len(content)):
            attempt(load_pytree, content)
    assert load_metadata(io.BytesIO(content)) == {}


@pytest.mark.parametrize(
    ("name", "is_old"),
    [
        ("@a\\b", True),
        ("@a\\\\b@\\", True),
        ("#01", False),
        ("@\\(open('x'))", False),
        ("@a\\\\", False),
    ],
)
def test_a_backslash_that_escapes_nothing_is_explained(name: str, is_old: bool) -> None:
    """Version 0.1.4 escaped nothing."""
    hint = "; if pytree2safetensors 0.1.4 wrote the file, load it into a template with rename={path: name}"
    for load in (load_pytree, load_abstract):
        with pytest.raises(Pytree2SafetensorsError, match="do not form a tree") as caught:
            load(io.BytesIO(names(name, "#02")))
        assert str(caught.value).endswith("flat=True) lists them" + (hint if is_old else ""))


@pytest.mark.parametrize("found", [entry[0] for entry in NAMES], ids=range(len(NAMES)))
def test_a_template_asks_for_no_tree_of_the_names(found: tuple[str, ...]) -> None:
    source = io.BytesIO(names(*found))
    template = {"x": np.zeros(1, np.uint8)}
    loaded = load_into_pytree(template, source, strict=False, rename={"@x": found[0]})
    assert loaded["x"].tolist() == [0]


@pytest.mark.parametrize("segment", ["@a", ".a", "#0", r"#\(0)"])
def test_names_as_deep_as_jax_can_flatten_are_loaded_and_deeper_ones_refused(segment: str) -> None:
    outcomes = []
    for depth in (100, 300, 500, *range(600, 1100, 50), 10_000):
        found = attempt(load_pytree, names((segment * depth).removeprefix(".")))
        outcomes.append(not isinstance(found, TreeStructureError))
        assert outcomes[-1] or "nested deeper than JAX can flatten" in str(found)
        if depth <= 800:  # JAX takes less here, below the frames of the test
            jax.tree_util.tree_structure(found)
    assert outcomes[:3] == [True, True, True]
    assert sorted(outcomes, reverse=True) == outcomes
    assert sys.version_info >= (3, 12) or not outcomes[-1]
    check_file(names("@a"))  # JAX has not lost count of the stack


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


@pytest.mark.parametrize("segment", ["@a", ".a", "#0", r"#\(0)"])
def test_long_names_take_memory_in_proportion_to_their_tree(segment: str) -> None:
    # The tree alone is up to 100 times as large as the names: a dict for every two characters.
    content = names(*(f"@{number}{segment * 190}" for number in range(40)))
    load_pytree(io.BytesIO(names("@a")))
    tracemalloc.start()
    try:
        tree = load_pytree(io.BytesIO(content))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tree) == 40
    assert peak < 4 * kept


def without_a_tree(found: list[str]) -> None:
    """Load in the ways that build no tree from the names."""
    content = names(*found)
    template = {"x": np.zeros(1, np.uint8)}
    load_into_pytree(template, io.BytesIO(content), strict=False, rename={"@x": found[0]})
    assert len(load_abstract(io.BytesIO(content), flat=True)) == len(found)


def test_dict_keys_of_the_same_hash_cost_no_time_without_a_tree() -> None:
    with no_hang(60):  # a tree would take longer
        without_a_tree([rf"@\({number * (2**61 - 1)})" for number in range(40_000)])


def test_names_of_many_nodes_cost_no_memory_without_a_tree() -> None:
    found = [f"@{number:06x}{'@' * 890}" for number in range(2000)]
    with bounded_memory(sum(map(len, found)), 8):  # a tree would take 300 times as much
        without_a_tree(found)


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


# The audit events of running something. A hook cannot be removed, so it does nothing unless `watching`.
RUNNING = {"import", "os.system", "subprocess.Popen", "pickle.find_class"}
events: list[str] = []
watching = False


def audit(event: str, args: tuple[Any, ...]) -> None:
    # The runtime type checks compile code of their own.
    if watching and (event in RUNNING or "antigravity" in f"{args}"):
        events.append(f"{event} {args}")


add_auditor = functools.cache(lambda: sys.addaudithook(audit))


@pytest.fixture
def auditor() -> None:
    add_auditor()
    events.clear()  # of an earlier run


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

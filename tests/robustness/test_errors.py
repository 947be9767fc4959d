"""The messages of errors about trees, names and leaves."""

import copy
import enum
import io
import os
import pickle
import re
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pytree2safetensors
from oracle import assert_same
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    UnsupportedLeafError,
    WeightsMismatchError,
    dict2pytree,
    keypath2string,
    load_into_pytree,
    load_pytree,
    save_pytree,
    set_weights,
    string2keypath,
)
from pytree2safetensors._errors import DeletedLeaf

# --- the classes ------------------------------------------------------------------------------

CLASSES: list[tuple[type[Exception], type[Exception]]] = [
    (KeyPathError, ValueError),
    (TreeStructureError, ValueError),
    (UnsupportedLeafError, TypeError),
    (WeightsMismatchError, ValueError),
    (FileFormatError, ValueError),
]


@pytest.mark.parametrize(("error", "builtin"), CLASSES)
def test_each_error_is_the_packages_and_a_built_in_one(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, Pytree2SafetensorsError)
    assert issubclass(error, builtin)
    assert not issubclass(error, OSError)
    assert error.__module__ == "pytree2safetensors"
    assert getattr(pytree2safetensors, error.__name__) is error
    assert error.__name__ in pytree2safetensors.__all__
    assert error.__doc__


def test_what_is_deleted_cannot_be_stored() -> None:
    assert issubclass(DeletedLeaf, UnsupportedLeafError)
    assert issubclass(DeletedLeaf, RuntimeError)  # as JAX's own error of it is


def test_a_traceback_names_the_public_class_for_a_deleted_array() -> None:
    error = DeletedLeaf("text")
    assert type(error).__name__ == "UnsupportedLeafError"
    shown = traceback.format_exception_only(type(error), error)
    assert shown == ["pytree2safetensors.UnsupportedLeafError: text\n"]


def test_there_are_no_other_errors() -> None:
    assert set(Pytree2SafetensorsError.__subclasses__()) == {error for error, _ in CLASSES}


@pytest.mark.parametrize("error", [*(error for error, _ in CLASSES), DeletedLeaf])
@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_go_from_process_to_process(
    error: type[Exception], copied: Callable[[Any], Any]
) -> None:
    first: Any = error("text")
    assert str(copied(first)) == "text"
    first.__notes__ = ["a note"]
    first.step = 3
    found = copied(first)
    assert (str(found), found.args) == ("text", ("text",))
    assert (found.__notes__, found.step) == (["a note"], 3)
    assert type(found) is error


def test_a_mismatch_goes_from_process_to_process_with_its_lists() -> None:
    error = WeightsMismatchError("text", ["@a"], ["@b"], ["@c: differs"])
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.missing) == ("text", ("@a",))
    assert (found.unexpected, found.mismatched) == (("@b",), ("@c: differs",))


# --- trees, names and leaves ------------------------------------------------------------------


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node that gives both its children one key."""

    def tree_flatten_with_keys(self) -> Any:
        key = jax.tree_util.GetAttrKey("same")
        return [(key, 1), (key, 2)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Twins":
        return cls()


@jax.tree_util.register_pytree_with_keys_class
class Strs:
    """A node whose keys are plain strs."""

    def tree_flatten_with_keys(self) -> Any:
        return [("weight", 1)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Strs":
        return cls()


class Unregistered:
    """A class that JAX does not know."""

    def __init__(self, held: Any = None) -> None:
        self.held = held


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


def cyclic() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def objects(held: Any) -> Any:
    return np.array([held, None], object)


HOLDS = ", which holds arrays"
HOLDING = (
    "Register the class of an object that holds arrays as a pytree node, for example with "
    "jax.tree_util.register_dataclass, or save its arrays instead."
)
FUNCTION = "builtins.builtin_function_or_method"
TREES: list[tuple[Any, type[Exception], str]] = [
    (
        {"f": print, "g": [b"x", np.array(["a"]), 1]},
        UnsupportedLeafError,
        "3 leaves of the tree cannot be stored:\n"
        f"  '@f': {FUNCTION}\n"
        "  '@g#0': builtins.bytes, which np.frombuffer(leaf, np.uint8) turns into an array\n"
        "  '@g#1': numpy.ndarray of dtype <U1, whose .tolist() can be saved\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its '
        "template. (To save an object of your own class, register the class as a pytree node.)",
    ),
    (
        {"a": np.float32},
        UnsupportedLeafError,
        "1 leaf of the tree cannot be stored:\n"
        "  '@a': builtins.type\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its template.',
    ),
    (
        Unregistered(),
        UnsupportedLeafError,
        "the tree is a single leaf, which cannot be stored: test_errors.Unregistered. (To save an "
        "object of your own class, register the class as a pytree node.)",
    ),
    (
        Unregistered([np.ones(1)]),
        UnsupportedLeafError,
        f"the tree is a single leaf, which cannot be stored: test_errors.Unregistered{HOLDS}. {HOLDING}",
    ),
    (
        {"f": print, "w": Unregistered([np.ones(1)])},
        UnsupportedLeafError,
        f"2 leaves of the tree cannot be stored:\n  '@f': {FUNCTION}\n"
        f"  '@w': test_errors.Unregistered{HOLDS}\n"
        f'{HOLDING} Then unsupported="skip" leaves out the others.',
    ),
    (
        [deque([np.ones(1)]), partial(print, np.ones(1)), objects(np.ones(1))],
        UnsupportedLeafError,
        f"3 leaves of the tree cannot be stored:\n"
        f"  '#0': collections.deque{HOLDS}; list(leaf) is a pytree node\n"
        f"  '#1': functools.partial{HOLDS}; a jax.tree_util.Partial is a pytree node\n"
        f"  '#2': numpy.ndarray of dtype object{HOLDS}; leaf.tolist() is a pytree node\n{HOLDING}",
    ),
    (
        b"x",
        UnsupportedLeafError,
        "the tree is a single leaf, which cannot be stored: builtins.bytes, which "
        "np.frombuffer(leaf, np.uint8) turns into an array.",
    ),
    (
        {"a": np.zeros(2, [("x", "f4")])},
        UnsupportedLeafError,
        "1 leaf of the tree cannot be stored:\n"
        "  '@a': numpy.ndarray of dtype [('x', '<f4')]\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its '
        "template.",
    ),
    (
        {"rng": np.random.default_rng(0)},
        UnsupportedLeafError,
        "1 leaf of the tree cannot be stored:\n"
        "  '@rng': numpy.random._generator.Generator, whose .bit_generator.state can be saved\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its '
        "template.",
    ),
    (
        {"a": jax.eval_shape(lambda: jnp.zeros(3)), "f": print},
        UnsupportedLeafError,
        "2 leaves of the tree cannot be stored:\n"
        f"  '@a': {jax.ShapeDtypeStruct.__module__}.ShapeDtypeStruct of dtype float32\n"
        f"  '@f': {FUNCTION}\n"
        "Only concrete arrays can be saved: call this outside jit, grad and vmap, and save the array that a Ref or "
        "another object holds.",
    ),
    (
        {"a": deleted()},
        DeletedLeaf,
        "the array at '@a' was deleted or donated; save it before that, or save the array that "
        "replaced it",
    ),
    (
        {"a": {float("nan"): 1}},
        KeyPathError,
        "a dict key is the float nan, which is not finite, in a key path that begins '@a'",
    ),
    (
        {"a": {frozenset(): 1}},
        KeyPathError,
        "a dict key must be a str, None, bool, int, float, bytes or a tuple of these, not frozenset() "
        "of type builtins.frozenset, in a key path that begins '@a'",
    ),
    (
        {"\ud800": 1},
        KeyPathError,
        "a dict key with a lone surrogate, '\\ud800', has no UTF-8 spelling, in the first key "
        "of a key path",
    ),
    (
        [Twins()],
        KeyPathError,
        "two children of one node have the key path '#0.same': the node type test_errors.Twins "
        "gives both one key",
    ),
    (
        [Strs()],
        KeyPathError,
        "cannot spell 'weight' of type builtins.str: not one of JAX's own key classes (where the node "
        "type is registered, give a GetAttrKey instead of this str), in a key path that begins '#0'",
    ),
    (
        {"a": {1: 1, "b": 2}},
        TreeStructureError,
        "JAX cannot sort the keys of the dict at '@a', of these types: int, str; use keys that "
        "compare with each other",
    ),
    (
        {"a": {1j: 1, 2j: 2}},
        KeyPathError,
        "a dict key must be a str, None, bool, int, float, bytes or a tuple of these, not 1j of type "
        "builtins.complex, in a key path that begins '@a'",
    ),
    (
        {"s": "\ud83d\ude00"},
        UnsupportedLeafError,
        "1 leaf of the tree cannot be stored:\n"
        "  '@s': builtins.str with the two halves of a surrogate pair, which JSON would join to "
        'one character\nSave with unsupported="skip" to leave them out; load_into_pytree then keeps '
        "those of its template. (To save an object of your own class, register the class as a pytree "
        "node.)",
    ),
    (
        cyclic(),
        TreeStructureError,
        "the tree below * is cyclic, or nested deeper than JAX can flatten; flatten it into fewer "
        "levels",
    ),
]


@pytest.mark.parametrize(("tree", "error", "text"), TREES, ids=range(len(TREES)))
def test_a_tree_that_cannot_be_saved_is_reported(
    tree: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        save_pytree(tree, tmp_path / "model")
    assert type(caught.value) is error
    assert re.fullmatch(re.escape(text).replace(r"\*", ".*"), str(caught.value))
    assert not list(tmp_path.iterdir())


def test_a_traced_value_is_reported() -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        jax.jit(lambda x: save_pytree({"a": x}, io.BytesIO()))(1.0)
    assert "'@a': jax._src" in str(caught.value)
    assert "Tracer, a traced value\n" in str(caught.value)
    assert "call this outside jit" in str(caught.value)


class Stage(enum.IntEnum):
    TRAIN = 3


class Pair(enum.Enum):
    BOTH = (1, 2)


class Meters(float):
    """A float of another class."""


HINTS: list[tuple[Any, str]] = [
    (Stage.TRAIN, "test_errors.Stage, whose .value can be saved"),
    (Pair.BOTH, "test_errors.Pair"),
    (Meters(2.5), "test_errors.Meters, which float(leaf) converts"),
    (np.str_("text"), "numpy.str_ of dtype <U4, which str(leaf) converts"),
    (b"text", "builtins.bytes, which np.frombuffer(leaf, np.uint8) turns into an array"),
    (bytearray(2), "builtins.bytearray, which np.frombuffer(leaf, np.uint8) turns into an array"),
    (
        np.datetime64(5, "s"),
        "numpy.datetime64 of dtype datetime64[s], which .view(np.int64) turns into integers",
    ),
    (
        np.zeros(2, "m8[ms]"),
        "numpy.ndarray of dtype timedelta64[ms], which .view(np.int64) turns into integers",
    ),
    (np.array(["a"]), "numpy.ndarray of dtype <U1, whose .tolist() can be saved"),
    (
        np.ma.masked_array([1j]),
        f"{np.ma.MaskedArray.__module__}.MaskedArray of dtype complex128, whose .data and .mask can be saved",
    ),
    (print, FUNCTION),
]


@pytest.mark.parametrize(("leaf", "text"), HINTS, ids=range(len(HINTS)))
def test_an_unsupported_leaf_that_can_be_converted_says_how(leaf: Any, text: str) -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        save_pytree([leaf], io.BytesIO())
    lines = str(caught.value).splitlines()
    assert lines[1] == f"  '#0': {text}"
    assert ("register the class" in lines[2]) is ("which" not in text and "whose" not in text)


def test_the_hints_lead_to_leaves_that_can_be_saved(tmp_path: Path) -> None:
    times = np.zeros(2, "m8[ms]")
    tree = [
        Stage.TRAIN.value,
        str(np.str_("a")),
        np.frombuffer(b"a", np.uint8),
        times.view(np.int64),
    ]
    save_pytree(tree, tmp_path / "file")
    assert_same(load_into_pytree(tree, tmp_path / "file"), tree)


def test_the_first_unsupported_leaves_are_listed() -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        save_pytree([print] * 1000, io.BytesIO())
    lines = str(caught.value).splitlines()
    assert lines[0] == "1,000 leaves of the tree cannot be stored:"
    assert lines[1:-2] == [f"  '#{i}': {FUNCTION}" for i in range(20)]
    assert lines[-2] == "  ... and 980 more"


METADATA: list[tuple[dict[str, str], str]] = [
    (
        {"pytree2safetensors": "{}"},
        "the metadata may not set 'pytree2safetensors', which this package writes itself; choose "
        "another name",
    ),
    (
        {"pytree2safetensors.sha256": "{}"},
        "the metadata may not set 'pytree2safetensors.sha256', which this package writes itself; "
        "choose another name",
    ),
    (
        {"a": "\ud800"},
        "the metadata entry 'a' holds a lone surrogate, which has no UTF-8 form",
    ),
]


@pytest.mark.parametrize(("metadata", "text"), METADATA)
def test_metadata_that_cannot_be_saved_are_reported(metadata: dict[str, str], text: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        save_pytree(1, io.BytesIO(), metadata=metadata)
    assert str(caught.value) == text


TOO_LONG = "shorten the metadata, which take {} of them"
SPLIT = "save with max_shard_size=, which gives each file a part of the tensors"
PARTS = "save parts of the tree apart"
NOTE_TOO_LONG = f"{PARTS}, or shorten its strings"
MANY = {f"{n:02}": np.float32(n) for n in range(20)}  # an entry of about 60 bytes each


@pytest.mark.parametrize(
    ("tree", "metadata", "remedy", "remedy_in_index"),
    [
        (MANY, {}, SPLIT, None),
        (MANY, {"big": "x" * 700}, TOO_LONG.format(743), TOO_LONG.format(743)),
        (MANY, {f"{n:02}": "x" * 5 for n in range(60)}, TOO_LONG.format(814), TOO_LONG.format(814)),
        ([1.0] * 100, {}, NOTE_TOO_LONG, NOTE_TOO_LONG),
        ({"text": "x" * 1000}, {}, NOTE_TOO_LONG, NOTE_TOO_LONG),
        ([MANY["01"]], {"big": "x" * 957}, TOO_LONG.format("1,000"), TOO_LONG.format("1,000")),
        ({"n" * 300: {"n" * 200: MANY["01"], "m" * 200: MANY["02"]}}, {}, SPLIT, PARTS),
    ],
)
def test_the_error_for_a_header_beyond_the_limit_names_the_remedy(
    tree: Any,
    metadata: dict[str, str],
    remedy: str,
    remedy_in_index: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pytree2safetensors._format.layout.MAX_HEADER", 1000)
    monkeypatch.setattr("pytree2safetensors._format.index.MAX_HEADER", 1000)
    with pytest.raises(FileFormatError) as caught:
        save_pytree(tree, io.BytesIO(), metadata=metadata)
    text = "the header would take [0-9],[0-9]+ bytes, and the format allows 1,000; "
    assert re.fullmatch(text + re.escape(remedy), str(caught.value))
    if remedy_in_index is None:
        return
    with pytest.raises(FileFormatError) as caught:
        save_pytree(tree, tmp_path, metadata=metadata, max_shard_size=5)
    text = "the (header|index) would take [0-9],[0-9]+ bytes, and (the format allows|readers allow) 1,000; "
    assert re.fullmatch(text + re.escape(remedy_in_index), str(caught.value))
    assert not list(tmp_path.iterdir())


DICTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"#01": 1},
        KeyPathError,
        "'#01' is not a key path: at position 1, an index is a decimal number from 0 to "
        "2147483647, without sign or leading zero; the canonical spelling is '#1'",
    ),
    (
        {"a.b": 1, "a@c": 2},
        TreeStructureError,
        "'a@c' and 'a.b' make the node at 'a' two kinds of node at once",
    ),
    (
        {"a": 1, "a.b": 2},
        TreeStructureError,
        "'a' and 'a.b' name a leaf and a node at the same place",
    ),
    (
        {"a.b": 1, "a": 2},
        TreeStructureError,
        "'a.b' and 'a' name a leaf and a node at the same place",
    ),
    (
        {r"@\(1)": 1, r"@\(True)": 2},
        TreeStructureError,
        r"'@\\(1)' and '@\\(True)' have dict keys that are equal in Python",
    ),
    (
        {"@a": [1]},
        TreeStructureError,
        "the value of '@a' is of type list, which JAX does not treat as a leaf; give each of its "
        "leaves a name",
    ),
    (
        {"@a": None},
        TreeStructureError,
        "the value of '@a' is of type NoneType, which JAX does not treat as a leaf; give each of "
        "its leaves a name",
    ),
    (
        {r"@a#\(1)": 1},
        TreeStructureError,
        "the node without keys at '@a' lacks 1 of its 2 children",
    ),
    (
        {"@a#2000000": 1},
        TreeStructureError,
        "the list at '@a' would have 2000001 elements, and the tree would have more than 1048576 gaps",
    ),
]


@pytest.mark.parametrize(("found", "error", "text"), DICTS, ids=range(len(DICTS)))
def test_names_that_make_no_tree_are_reported(
    found: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        dict2pytree(found)
    assert str(caught.value) == text


KEYPATHS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: keypath2string((jax.tree_util.SequenceKey(-1),)),
        "an index is at least 0 and at most 2147483647, not -1, in the first key of a key path",
    ),
    (
        lambda: string2keypath(".a"),
        "'.a' is not a key path: at position 0, a leading name has no '.'; the "
        "canonical spelling is 'a'",
    ),
    (
        lambda: set_weights({"a": 1}, {"@a": 1}, prefix="#01"),
        "'#01' is not a key path: at position 1, an index is a decimal number from 0 to "
        "2147483647, without sign or leading zero; the canonical spelling is '#1'",
    ),
]


@pytest.mark.parametrize(("work", "text"), KEYPATHS, ids=range(len(KEYPATHS)))
def test_what_is_no_key_path_is_reported(work: Callable[[], Any], text: str) -> None:
    with pytest.raises(KeyPathError) as caught:
        work()
    assert str(caught.value) == text


WRONG: list[Callable[[], Any]] = [
    lambda: save_pytree(1, 3),  # type: ignore[arg-type] # the mistake, here and below
    lambda: save_pytree(1, io.BytesIO(), metadata={"a": 1}),  # type: ignore[dict-item]
    lambda: save_pytree(1, io.BytesIO(), unsupported="no"),  # type: ignore[arg-type]
    lambda: save_pytree(1, io.BytesIO(), durable="no"),  # type: ignore[arg-type]
    lambda: load_pytree(3),  # type: ignore[arg-type]
    lambda: load_pytree(b"model"),  # type: ignore[arg-type]
    lambda: load_pytree("model", prefix=None),  # type: ignore[arg-type]
    lambda: load_into_pytree({}, "model", rename=3),  # type: ignore[arg-type]
    lambda: set_weights({}, [1]),  # type: ignore[arg-type]
    lambda: dict2pytree([1]),  # type: ignore[arg-type]
    lambda: PyTreeContainer([1]),  # type: ignore[arg-type]
    lambda: UnkeyedContainer(3),  # type: ignore[arg-type]
]


@pytest.mark.skipif(bool(os.environ.get("JAXTYPING_DISABLE")), reason="the checks are off")
@pytest.mark.parametrize("work", WRONG, ids=range(len(WRONG)))
def test_arguments_of_wrong_types_are_type_errors(work: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        work()


def test_a_prefix_that_leads_nowhere_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree({f"k{i}": i for i in range(9)}, path)
    loads: list[Callable[[], Any]] = [
        lambda: load_pytree(path, prefix="@x"),
        lambda: load_into_pytree({"a": 1}, path, prefix="@x"),
    ]
    for load in loads:
        with pytest.raises(WeightsMismatchError) as caught:
            load()
        assert str(caught.value) == (
            f"{str(path)!r} has nothing at the prefix '@x'; its names begin with '@k0', '@k1', "
            "'@k2', '@k3', '@k4'"
        )

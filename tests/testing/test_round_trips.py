"""`assert_round_trips` fails if a tree does not round-trip."""

import math
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import pytree2safetensors
from oracle import assert_same
from pytree2safetensors import KeyPathError, PyTreeContainer, UnsupportedLeafError
from pytree2safetensors.testing import _compare, _round_trips, assert_round_trips, pytrees
from pytree2safetensors.testing._nodes import Keyed, Pair


@settings(max_examples=settings().max_examples // 2)
@given(pytrees())
@example(Keyed({".a": Keyed({".": None}), "@": 0}))
@example(Keyed({".": None, "@": {}}))
def test_every_tree_round_trips(tree: Any) -> None:
    assert_round_trips(tree)


def test_assert_round_trips_does_not_change_the_tree() -> None:
    tree = {"a": np.arange(3), "b": [None, 1.5]}
    before = jax.tree_util.tree_map(lambda leaf: leaf, tree)
    assert assert_round_trips(tree) is None  # type: ignore[func-returns-value] # what is tested
    assert_same(tree, before)


TREE: dict[str, Any] = {
    "array": np.array([1.0, 2.0], np.float32),
    "jax": jnp.array([[1, 2]], jnp.int32),
    "key": jax.random.key(1),
    "weak": jnp.asarray(1.0),
    "int": 3,
    "float": 0.0,
    "complex": complex(0.0, 0.0),
    "str": "text",
    "list": [1, ()],
}

WRONG: list[tuple[str, Any, str]] = [
    ("array", np.array([1.0, 3.0], np.float32), "its bits differ in 1 of 2 elements"),
    ("array", np.array([1.0, 2.0], np.float64), "its dtype was float32, and is float64"),
    ("array", np.array([[1.0, 2.0]], np.float32), "its shape was (2,), and is (1, 2)"),
    ("array", np.array([1.0], np.float32), "its shape was (2,), and is (1,)"),
    ("array", 1.0, "it was a NumPy array, and is of type float"),
    ("jax", jnp.array([[1, 2]], jnp.uint32), "its dtype was int32, and is uint32"),
    ("key", jax.random.key(2), "its bits were 00000000 00000001, and are "),
    ("key", jax.random.key(1, impl="rbg"), "its dtype was key<fry>, and is key<rbg>"),
    ("weak", jnp.ones((), jnp.float32), "it was weakly typed"),
    ("int", 4, "it was 3, and is 4"),
    ("int", 3.0, "it was of type int, and is of type float"),
    ("int", True, "it was of type int, and is of type bool"),
    ("int", np.int64(3), "it was of type int, and is a NumPy scalar"),
    ("int", jnp.int32(3), "it was of type int, and is a JAX array"),
    ("float", -0.0, "it was 0.0, and is -0.0"),
    ("complex", complex(0.0, -0.0), "it was 0j, and is -0j"),
    ("str", "texts", "it was 'text', and is 'texts'"),
    ("list", (1, ()), "it was the node 'PyTreeDef([*, *])', and is 'PyTreeDef((*, *))'"),
    ("list", [1, []], "it was the node 'PyTreeDef(())', and is 'PyTreeDef([])'"),
    ("list", [1, None], "it was the node 'PyTreeDef(())', and is 'PyTreeDef(None)'"),
    ("list", [1], "it was the node 'PyTreeDef([*, *])', and is 'PyTreeDef([*])'"),
]


@pytest.mark.parametrize("how", ["load_pytree", "load_into_pytree"])
@pytest.mark.parametrize(("name", "value", "difference"), WRONG, ids=range(len(WRONG)))
def test_fails_for_a_wrong_round_trip(
    monkeypatch: pytest.MonkeyPatch, how: str, name: str, value: Any, difference: str
) -> None:
    wrong = {**TREE, name: value}
    monkeypatch.setattr(_round_trips, how, lambda *_: wrong)
    with pytest.raises(AssertionError) as caught:
        assert_round_trips(TREE)
    place = f"'@{name}" + ("#1" if "()" in difference else "") + "'"
    way = "without a template" if how == "load_pytree" else "into a template"
    assert str(caught.value).startswith(f"{place} is different when loaded {way}: {difference}")


KINDS = {
    "a NumPy array": np.ones((), np.float32),
    "a NumPy scalar": np.float32(1),
    "a JAX array": jnp.ones((), jnp.float32),
}


@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_template_asks_for_the_kind_of_array(
    monkeypatch: pytest.MonkeyPatch, kind: str, found: str
) -> None:
    tree, wrong = {"array": KINDS[kind]}, {"array": KINDS[found]}
    monkeypatch.setattr(_round_trips, "load_pytree", lambda *_: wrong)
    assert_round_trips(tree)  # without a template, any kind comes back
    if kind == found:
        return
    monkeypatch.setattr(_round_trips, "load_into_pytree", lambda *_: wrong)
    with pytest.raises(AssertionError) as caught:
        assert_round_trips(tree)
    assert str(caught.value) == (
        f"'@array' is different when loaded into a template: it was {kind}, and is {found}"
    )


class Labelled(np.ndarray[Any, Any]):
    """A subclass of NumPy's array."""


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.matrix, Labelled])
def test_arrays_of_subclasses_come_back_as_arrays(kind: Any) -> None:
    assert_round_trips({"array": np.array([[1.0, 2.0]], np.float32).view(kind)})


# What a file distinguishes, and == does not.
KEYS = [
    (1, True), (1, 1.0), (True, 1.0), (0, False), (0.0, -0.0), ((1,), (True,)), ((0.0,), (-0.0,)),
]  # fmt: skip


@pytest.mark.parametrize("how", ["load_pytree", "load_into_pytree"])
@pytest.mark.parametrize("node", [dict, OrderedDict])
@pytest.mark.parametrize(("key", "found"), [*KEYS, *(pair[::-1] for pair in KEYS)], ids=repr)
def test_keys_that_are_equal_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, how: str, node: Any, key: Any, found: Any
) -> None:
    tree, wrong = [node({key: "leaf"})], [node({found: "leaf"})]
    monkeypatch.setattr(_round_trips, how, lambda *_: wrong)
    with pytest.raises(AssertionError) as caught:
        assert_round_trips(tree)
    way = "without a template" if how == "load_pytree" else "into a template"
    keys = [repr(pytree2safetensors.keypath2string((DictKey(key),))) for key in (key, found)]
    assert str(caught.value) == (
        f"'#0' is different when loaded {way}: it had the key {keys[0]}, and has {keys[1]}"
    )


def test_a_key_that_no_file_can_hold_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_round_trips, "load_into_pytree", lambda *_: {np.float64(1): "leaf"})
    with pytest.raises(
        AssertionError, match=r"it had the key '@.*', and has 'DictKey\(.*\)'$"
    ) as caught:
        assert_round_trips({1.0: "leaf"})
    assert str(caught.value).startswith("the root is different when loaded into a template: ")


def test_a_load_that_keeps_the_template_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_round_trips, "load_into_pytree", lambda template, path: template)
    with pytest.raises(AssertionError, match="different when loaded into a template: "):
        assert_round_trips(TREE)


@pytest.mark.parametrize(
    ("rebuild", "difference"),
    [
        (lambda children: [child.astype(np.float16) for child in children], "float16[2]"),
        (lambda children: [child.reshape(2, 1) for child in children], "float32[2,1]"),
        (lambda children: children[:-1], "'@node#1' is gone"),
        (lambda children: [*children, *children], "'@node#2' is new"),
        (lambda _: [None, None], "'@node#0' is gone"),
    ],
)
def test_nodes_that_are_rebuilt_as_others_are_reported(
    rebuild: Callable[[Any], Any], difference: str
) -> None:
    class Faulty(list[Any]):
        pass

    jax.tree_util.register_pytree_with_keys(
        Faulty,
        lambda node: ([(SequenceKey(i), child) for i, child in enumerate(node)], None),
        lambda _, children: Faulty(rebuild(list(children))),
    )
    with pytest.raises(AssertionError) as caught:
        assert_round_trips({"node": Faulty([np.ones(2, np.float32), np.zeros(2, np.float32)])})
    message = str(caught.value)
    assert message.startswith("unflattening the nodes of the tree gives another tree:\n")
    assert difference in message
    assert "strict" not in message


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda flat: {**flat, "third": 1}, "'third': it was not in the tree"),
        (lambda flat: {"first": 1}, "'second': it is missing"),
        (lambda flat: {**flat, "first": 7}, "'first': it was 1, and is 7"),
    ],
)
def test_other_nodes_are_compared_by_name(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], difference: str
) -> None:
    assert_round_trips(Pair(1, 2))
    wrong = PyTreeContainer(change({"first": 1, "second": 2}))
    monkeypatch.setattr(_round_trips, "load_pytree", lambda *_: wrong)
    with pytest.raises(AssertionError) as caught:
        assert_round_trips(Pair(1, 2))
    name, _, change_of_it = difference.partition(": ")
    assert (
        str(caught.value) == f"{name} is different when loaded without a template: {change_of_it}"
    )


def test_a_tree_of_plain_nodes_must_load_without_a_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: Any) -> Any:
        raise pytree2safetensors.TreeStructureError("no")

    monkeypatch.setattr(_round_trips, "load_pytree", refuse)
    assert_round_trips(Keyed({"@a": 1, ".a": 2}))
    with pytest.raises(pytree2safetensors.TreeStructureError):
        assert_round_trips({"a": 1})


@pytest.mark.parametrize(
    "keys",
    [
        ("@a", ".a"),  # of two kinds
        (r"#\(1)", r"#\(3)"),  # a gap between children without keys
        (r"@\(1)", r"@\(True)"),  # equal in Python
        (r"@\(1)", "@a"),  # cannot be sorted
        ("#2000000",),  # too many gaps
    ],
)
def test_nodes_whose_key_paths_form_no_tree_are_loaded_into_the_template(
    keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = Keyed(dict.fromkeys(keys, 1))
    assert_round_trips(node)
    pytree2safetensors.save_pytree(node, tmp_path / "file")
    with pytest.raises(pytree2safetensors.TreeStructureError):
        pytree2safetensors.load_pytree(tmp_path / "file")
    monkeypatch.setattr(_round_trips, "load_into_pytree", lambda template, path: template)
    with pytest.raises(AssertionError, match="different when loaded into a template: "):
        assert_round_trips(node)


def test_what_cannot_be_saved_says_why() -> None:
    with pytest.raises(UnsupportedLeafError, match="'@a': builtins"):
        assert_round_trips({"a": len})


@jax.tree_util.register_pytree_with_keys_class
class Repeating:
    """A node that gives both children one key."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        return [(GetAttrKey("child"), child) for child in self.children], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Repeating":
        return cls(*children)


@jax.tree_util.register_pytree_with_keys_class
class Forgetful(Repeating):
    """A node that comes back without its last child."""

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        keyed = [(SequenceKey(index), child) for index, child in enumerate(self.children)]
        return keyed, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Forgetful":
        return cls(*[*children][:-1])


@jax.tree_util.register_pytree_with_keys_class
class Scale:
    """A node that refuses some values, also when JAX builds it."""

    def __init__(self, factor: Any, least: float = 0.0) -> None:
        self.factor, self.least = factor, least
        if not float(factor) > least:
            raise ValueError("a scale must be positive")

    def tree_flatten_with_keys(self) -> tuple[Any, float]:
        return [(GetAttrKey("factor"), self.factor)], self.least

    @classmethod
    def tree_unflatten(cls, least: float, children: Any) -> "Scale":
        return cls(children[0], least)


def test_nodes_may_refuse_the_values_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (2.0, np.float32(2), jnp.asarray(2.0)):
        assert_round_trips({"scale": Scale(factor), "w": np.ones(2, np.float32)})
    monkeypatch.setattr(_round_trips, "load_into_pytree", lambda *_: {"scale": Scale(3.0)})
    with pytest.raises(AssertionError, match=r"^'@scale.factor' is different when loaded into a"):
        assert_round_trips({"scale": Scale(2.0)})


def test_nodes_that_refuse_their_own_values_are_reported() -> None:
    scale = Scale(2.0)
    scale.least = 7.0
    with pytest.raises(AssertionError) as caught:
        assert_round_trips([scale])
    assert str(caught.value) == (
        "JAX cannot build the tree from its own leaves: ValueError: a scale must be positive"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_nodes_of_other_libraries() -> None:
    with pytest.raises(KeyPathError, match="two children of one node have the key path 'child'"):
        assert_round_trips(Repeating(1, 2))
    with pytest.raises((AssertionError, pytree2safetensors.Pytree2SafetensorsError)):
        assert_round_trips(Forgetful(1, 2))


def test_the_package_needs_no_hypothesis() -> None:
    program = "import sys, pytree2safetensors; print('hypothesis' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True
    )
    assert run.stdout == "False\n"
    program = "import sys; sys.modules['hypothesis'] = None; import pytree2safetensors"
    subprocess.run([sys.executable, "-c", program], check=True)
    failed = subprocess.run(
        [sys.executable, "-c", f"{program}.testing"], capture_output=True, check=False, text=True
    )
    assert failed.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: pytree2safetensors.testing needs Hypothesis; install hypothesis"
    )


@pytest.mark.parametrize(
    ("module", "missing"), [("testing", "hypothesis"), ("orbax", "orbax.checkpoint")]
)
def test_pytest_skips_what_needs_a_missing_package(module: str, missing: str) -> None:
    program = f"""
import sys, pytest
sys.modules[{missing!r}] = None
try:
    pytest.importorskip("pytree2safetensors.{module}")
except pytest.skip.Exception:
    print("skipped")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, check=True, text=True
    )
    assert run.stdout == "skipped\n"


NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]
KEY = jax.random.key(1)
FLOATS = np.array([[0x7FC00000] * 6, [1] * 6], np.uint32).view(np.float32)
OTHER_FLOATS = np.array([[0x7FC00000] * 5 + [0x7FC00001], [1, 2] * 3], np.uint32).view(np.float32)
# What differs between the first and the second.
BITS: list[tuple[Any, Any, str]] = [
    (math.nan, NAN, "its bits were 7ff8000000000000, and are 7ff8000000000001"),
    (
        complex(0, NAN), complex(0, math.nan),
        "its bits were 0000000000000000 7ff8000000000001, and are 0000000000000000 7ff8000000000000",
    ),
    (1.5, math.nan, "it was 1.5, and is nan"),
    (np.float32(-0.0), np.float32(0.0), "its bits were 80000000, and are 00000000"),
    (jnp.asarray(1.0), jnp.asarray(2.0), "its bits were 3f800000, and are 40000000"),
    (
        FLOATS, OTHER_FLOATS,
        "its bits differ in 4 of 12 elements; the first, at [0, 5], was 7fc00000, and is 7fc00001",
    ),
    (
        FLOATS.astype(">f4"), OTHER_FLOATS,
        "its bits differ in 4 of 12 elements; the first, at [0, 5], was 7fc00000, and is 7fc00001",
    ),
    (
        np.zeros(1_000_000, np.int8), np.full(1_000_000, -1, np.int8),
        "its bits differ in 1,000,000 of 1,000,000 elements; the first, at [0], was 00, and is ff",
    ),
    (
        np.array([1j, 2], np.complex64), np.array([1j, 3j], np.complex64),
        "its bits differ in 1 of 2 elements; the first, at [1], was 40000000 00000000, and is 00000000 40400000",
    ),
    (
        np.array([True]), np.array([False]),
        "its bits differ in 1 of 1 element; the first, at [0], was 01, and is 00",
    ),
    (
        np.array([1, 2], ml_dtypes.int4), np.array([1, -2], ml_dtypes.int4),
        "its bits differ in 1 of 2 elements; the first, at [1], was 02, and is 0e",
    ),
    (
        np.array([1, 2], ml_dtypes.bfloat16), np.array([3, 2], ml_dtypes.bfloat16),
        "its bits differ in 1 of 2 elements; the first, at [0], was 3f80, and is 4040",
    ),
    (KEY, jax.random.key(2), "its bits were 00000000 00000001, and are 00000000 00000002"),
    (
        jnp.stack([KEY, KEY]), jnp.stack([KEY, jax.random.key(3)]),
        "its bits differ in 1 of 2 elements; the first, at [1], was 00000000 00000001, and is 00000000 00000003",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "found", "difference"), BITS, ids=range(len(BITS)))
def test_messages_say_which_bits_differ(leaf: Any, found: Any, difference: str) -> None:
    _compare.assert_same(leaf, leaf, "found")
    with pytest.raises(AssertionError) as caught:
        _compare.assert_same({"w": leaf}, {"w": found}, "found")
    assert str(caught.value) == f"'@w' is different when loaded found: {difference}"


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_arrays_have_no_bits(shape: tuple[int, ...]) -> None:
    keys = jax.random.wrap_key_data(jnp.zeros((*shape, 2), jnp.uint32))
    for leaf in (np.zeros(shape, np.float32), np.zeros(shape, ml_dtypes.int4), keys):
        _compare.assert_same(leaf, leaf, "found")


def test_bits_are_compared_in_the_byte_order_of_this_machine() -> None:
    other = np.array([1, 2], np.uint32).astype(np.dtype(np.uint32).newbyteorder())
    assert_round_trips({"other": other})
    with pytest.raises(AssertionError, match="its bits differ"):
        _compare.assert_same({"w": other}, {"w": np.array([1, 3], np.uint32)}, "found")

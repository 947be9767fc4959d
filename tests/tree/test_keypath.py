"""Key paths: tables of accepted and rejected spellings. The laws are in test_laws."""

import ast
import enum
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from pytree2safetensors import KeyPath, KeyPathError, keypath2string, string2keypath
from pytree2safetensors._tree.keypath import split
from pytree2safetensors._tree.keys import item_key
from pytree2safetensors._tree.paths import add_prefix, cut, strip_prefix
from pytree2safetensors._tree.spelling import join
from pytree2safetensors.testing import keypaths

CASES = json.loads((Path(__file__).parents[1] / "data" / "keypaths.json").read_text("utf-8"))
READERS = {
    "attr": GetAttrKey,
    "item": DictKey,
    "literal": lambda literal: item_key(ast.literal_eval(literal)),
    "index": SequenceKey,
    "flat": FlattenedIndexKey,
}
NUMBER = "an index is a decimal number from 0 to 2147483647, without sign or leading zero"
LITERAL = "a dict key in parentheses is written as Python's ascii() writes it, and is not a str"
NO_KEY = "the text in parentheses is not a dict key"
OPEN = r"a \( needs a ) at the end of its segment"
BACKSLASH = r"a backslash must be before one of . @ # \, or after @ or # as \("
DOT = "a leading name has no '.'"

# Every rejected string: the position, the reason, and the canonical spelling where there is one.
REJECTED = [
    (".a", 0, DOT, "a"),
    (".a.b", 0, DOT, "a.b"),
    (".a@b", 0, DOT, "a@b"),
    ("__metadata__", 0, "this name is reserved by the file format", ".__metadata__"),
    ("__metadata__@x", 0, "this name is reserved by the file format", ".__metadata__@x"),
    ("#01", 1, NUMBER, "#1"),
    (r"@\(" + "(" * 65 + ")" + ",)" * 64 + ")", 3, NO_KEY, None),  # one tuple too many
    ("#00", 1, NUMBER, "#0"),
    ("#-1", 1, NUMBER, None),
    ("#+1", 1, NUMBER, "#1"),
    ("#1_0", 1, NUMBER, "#10"),
    ("#٣", 1, NUMBER, "#3"),
    ("# 1", 1, NUMBER, "#1"),
    ("#1 ", 1, NUMBER, "#1"),
    ("#", 1, NUMBER, None),
    ("a#", 2, NUMBER, None),
    ("#a", 1, NUMBER, None),
    ("#1.5#", 5, NUMBER, None),
    ("#1\n", 1, NUMBER, "#1"),
    ("a#2@b#03", 6, NUMBER, "a#2@b#3"),
    ("#2147483648", 1, NUMBER, None),
    ("#" + "9" * 5000, 1, NUMBER, None),
    ("a\\", 1, BACKSLASH, None),
    ("\\", 0, BACKSLASH, None),
    ("a\\x", 1, BACKSLASH, None),
    ("a\\n", 1, BACKSLASH, None),
    ("@x\\(3)", 2, BACKSLASH, None),
    ("a\\(3)", 1, BACKSLASH, None),
    ("a@b\\", 3, BACKSLASH, None),
    (".\\(3)", 1, r"an attribute has no \(...) form", None),
    ("@\\(", 3, OPEN, None),
    ("@\\(3", 4, OPEN, None),
    ("@\\(3)x", 6, OPEN, None),
    ("#\\(1", 4, OPEN, None),
    ("@\\(1.5)", 4, OPEN, "@\\(1\\.5)"),
    ("@a@\\(1.5)", 6, OPEN, "@a@\\(1\\.5)"),
    ("a.\\(1.5)", 2, r"an attribute has no \(...) form", None),
    ("a#\\(1.5)", 5, OPEN, None),
    ("@\\()", 3, NO_KEY, None),
    ("@\\([1])", 3, NO_KEY, None),
    ("@\\({})", 3, NO_KEY, None),
    ("@\\(nan)", 3, NO_KEY, None),
    ("@\\(inf)", 3, NO_KEY, None),
    ("@\\(-inf)", 3, NO_KEY, None),
    ("@\\(1j)", 3, NO_KEY, None),
    ("@\\(x)", 3, NO_KEY, None),
    ("@\\(1,)", 3, NO_KEY, None),
    ("@\\(,)", 3, NO_KEY, None),
    ("@\\((1))", 3, LITERAL, "@\\(1)"),
    ("@\\((1, 2,))", 3, LITERAL, "@\\((1, 2))"),
    ("@\\((,))", 3, NO_KEY, None),
    ("@\\((1 2))", 3, NO_KEY, None),
    ("@\\((1, 2)", 3, NO_KEY, None),
    ("@\\(__import__)", 3, NO_KEY, None),
    ("@\\(print())", 3, NO_KEY, None),
    ("@\\(1e999)", 3, "a dict key is the float inf, which is not finite", None),
    ("@\\( 3)", 3, LITERAL, "@\\(3)"),
    ("@\\(3 )", 3, LITERAL, "@\\(3)"),
    ("@\\(03)", 3, LITERAL, "@\\(3)"),
    ("@\\(+3)", 3, LITERAL, "@\\(3)"),
    ("@\\(-0)", 3, LITERAL, "@\\(0)"),
    ("@\\(0x3)", 3, LITERAL, "@\\(3)"),
    ("@\\(1e5)", 3, LITERAL, "@\\(100000\\.0)"),
    ("@\\(1_0)", 3, LITERAL, "@\\(10)"),
    ("@\\(1\\.50)", 3, LITERAL, "@\\(1\\.5)"),
    ("@\\('a')", 3, LITERAL, "@a"),
    ('@\\("a")', 3, LITERAL, "@a"),
    ("@\\('a\\.b')", 3, LITERAL, "@a\\.b"),
    ("@\\((1,2))", 3, LITERAL, "@\\((1, 2))"),
    ('@\\(("a",))', 3, LITERAL, "@\\(('a',))"),
    ("@\\(B'x')", 3, LITERAL, "@\\(b'x')"),
    ("@\\(('é',))", 3, LITERAL, "@\\(('\\\\xe9',))"),
    ("#\\(01)", 1, NUMBER, "#\\(1)"),
    ("#\\(-1)", 1, NUMBER, None),
    ("#\\(a)", 1, NUMBER, None),
    ("a\ud800", 1, "a lone surrogate has no UTF-8 spelling", None),
    ("@\\(('\\\\ud800',))", 3, "a dict key holds a lone surrogate, in '\\ud800'", None),
    ("@\\(('\\\\U00110000',))", 3, "the text in parentheses has an unknown escape", None),
]


@pytest.mark.parametrize("case", CASES["accepted"], ids=lambda case: ascii(case["string"]))
def test_accepted_key_paths_are_spelled_and_read(case: dict[str, Any]) -> None:
    path = tuple(READERS[kind](value) for kind, value in case["path"])
    assert keypath2string(path) == case["string"]
    found = string2keypath(case["string"])
    assert found == path
    assert repr(found) == repr(path)  # 1, 1.0 and True are equal, and are not one key


def test_every_rejected_case_is_in_the_table() -> None:
    assert {*CASES["rejected"]} <= {string for string, *_ in REJECTED}


@pytest.mark.parametrize(
    ("string", "position", "reason", "canonical"), REJECTED, ids=lambda value: ascii(value)[:40]
)
def test_a_rejected_string_gets_a_position_a_reason_and_a_correction(
    string: str, position: int, reason: str, canonical: str | None
) -> None:
    with pytest.raises(KeyPathError) as caught:
        string2keypath(string)
    message = str(caught.value)
    shown, _, rest = message.partition(" is not a key path: ")
    assert shown == repr(string) if len(string) <= 200 else repr(string[:50])[1:-1] in shown
    expected = f"at position {position}, {reason}"
    if canonical is not None:
        expected += f"; the canonical spelling is {canonical!r}"
        string2keypath(canonical)
    assert rest == expected
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "string"),
    [
        ("__metadata__", ".__metadata__"),
        ("__metadata__x", "__metadata__x"),
        ("__metadata_", "__metadata_"),
        ("__metadata__.", "__metadata__\\."),
        ("__metadata__\\", "__metadata__\\\\"),
        ("__metadata__@", "__metadata__\\@"),
        ("", "."),
        (".", "\\."),
    ],
)
def test_only_names_that_are_empty_or_reserved_keep_their_dot(name: str, string: str) -> None:
    for rest, spelled in (((), ""), ((SequenceKey(1),), "#1"), ((GetAttrKey("b"),), ".b")):
        path = (GetAttrKey(name), *rest)
        assert keypath2string(path) == string + spelled
        assert string2keypath(string + spelled) == path


def test_rejecting_never_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for literal in (
            "1if 0else 2",
            "0777",
            "'\\\\d'",
            "b'\\\\d'",
            "0xfor x",
            "1_000_",
            "(1)(2)",
        ):
            with pytest.raises(KeyPathError):
                string2keypath(f"@\\({literal})")


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(depth - 1):
        value = (value,)
    return value


KEY_KINDS = "a dict key must be a str, None, bool, int, float, bytes or a tuple of these, not "
TOO_MANY_DIGITS = "a dict key is an int of more than 4300 digits"
UNSPELLABLE: list[tuple[Any, str]] = [
    (SequenceKey(-1), "an index is at least 0 and at most 2147483647, not -1"),
    (DictKey(float("nan")), "a dict key is the float nan, which is not finite"),
    (DictKey(float("inf")), "a dict key is the float inf, which is not finite"),
    (DictKey((1, float("-inf"))), "a dict key is the float -inf, which is not finite"),
    (DictKey(Color.RED), KEY_KINDS + f"<Color.RED: 1> of type {__name__}.Color"),
    (DictKey(Text("a")), KEY_KINDS + f"'a' of type {__name__}.Text"),
    (DictKey((0, Text("a"))), KEY_KINDS + f"'a' of type {__name__}.Text"),
    (DictKey(np.int64(3)), KEY_KINDS + f"{np.int64(3)!r} of type numpy.int64"),
    (DictKey(np.float64(3)), KEY_KINDS + f"{np.float64(3)!r} of type numpy.float64"),
    (DictKey(np.str_("a")), KEY_KINDS + f"{np.str_('a')!r} of type numpy.str_"),
    (DictKey(1j), KEY_KINDS + "1j of type builtins.complex"),
    (DictKey(frozenset()), KEY_KINDS + "frozenset() of type builtins.frozenset"),
    (DictKey(Hostile()), KEY_KINDS + f"a value of type {__name__}.Hostile"),
    (DictKey(10**4300), TOO_MANY_DIGITS),
    (DictKey((-(10**4300),)), TOO_MANY_DIGITS),
    (DictKey(nested(65)), "a dict key nests tuples more than 64 deep"),
    (DictKey("\ud800"), "a dict key with a lone surrogate, '\\ud800', has no UTF-8 spelling"),
    (DictKey(("\udfff",)), "a dict key holds a lone surrogate, in '\\udfff'"),
    (FlattenedIndexKey(-1), "an index is at least 0 and at most 2147483647, not -1"),
]


@pytest.mark.parametrize(("key", "reason"), UNSPELLABLE, ids=range(len(UNSPELLABLE)))
def test_a_key_that_has_no_spelling(key: Any, reason: str) -> None:
    with pytest.raises(KeyPathError) as caught:
        keypath2string((GetAttrKey("layers"), SequenceKey(2), key))
    assert str(caught.value) == f"{reason}, in a key path that begins 'layers#2'"


@pytest.mark.parametrize("kind", [SequenceKey, FlattenedIndexKey])
def test_the_largest_index_is_spelled_and_read(kind: Any) -> None:
    path = (kind(2**31 - 1),)
    assert string2keypath(keypath2string(path)) == path


def test_the_longest_and_deepest_dict_keys_are_spelled_and_read() -> None:
    for value in (10**4300 - 1, 1 - 10**4300, nested(64), -sys.float_info.max, 5e-324):
        key: Any
        (key,) = string2keypath(keypath2string((item_key(value),)))
        assert key.key == value
        assert type(key.key) is type(value)
    with pytest.raises(KeyPathError):
        keypath2string((DictKey(nested(65)),))
    with pytest.raises(KeyPathError):
        string2keypath(f"@\\({'(' * 10_000}{')' * 10_000})")
    with pytest.raises(KeyPathError):
        string2keypath(f"@\\({'9' * 4301})")


def test_fewer_digits_than_python_allows() -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(1000)
    try:
        with pytest.raises(KeyPathError):
            keypath2string((DictKey(10**2000),))
        for sign in ("", "-"):
            with pytest.raises(KeyPathError, match="a dict key cannot be read"):
                string2keypath(f"@\\({sign}{'9' * 2000})")
        with pytest.raises(KeyPathError):
            string2keypath("#" + "9" * 2000)
    finally:
        sys.set_int_max_str_digits(limit)


# With the checks of this test run, arguments of other types do not even reach the functions.
WRONG_TYPES = """
import json
from jax.tree_util import FlattenedIndexKey, GetAttrKey, SequenceKey
from pytree2safetensors import KeyPathError, keypath2string, string2keypath

class Text(str): pass

def attempt(make):  # what JAX refuses itself, or turns into a fitting key, it need not refuse
    try:
        key = make()
    except TypeError:
        return
    field = getattr(key, "name", getattr(key, "idx", getattr(key, "key", None)))
    if type(field) not in (int, str):
        refused.append((keypath2string, (key,)))

refused = []
for kind, value in [(SequenceKey, True), (FlattenedIndexKey, True), (GetAttrKey, 3),
                    (GetAttrKey, None), (GetAttrKey, Text("a")), (SequenceKey, 1.0)]:
    attempt(lambda: kind(value))
for function, argument in refused:
    try:
        function(argument)
    except KeyPathError as error:
        assert str(error).startswith(("an index must be an int, not ", "an attribute name must be a str, not "))
    else:
        raise AssertionError(argument)

messages = []
for function, argument in [
    (string2keypath, None), (string2keypath, b"a"),
    (keypath2string, 3), (keypath2string, ("a",)), (keypath2string, (None,)),
]:
    try:
        function(argument)
    except (TypeError, KeyPathError) as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


def test_arguments_of_other_types() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WRONG_TYPES], stdout=subprocess.PIPE, check=True, text=True
    )
    no_key = "not one of JAX's own key classes, in the first key of a key path"
    assert json.loads(run.stdout) == [
        "string2keypath: string must be a spelled key path, which is a str, not NoneType",
        "string2keypath: string must be a spelled key path, which is a str, not bytes",
        "keypath2string: path must be a tuple of keys, not int",
        "cannot spell 'a' of type builtins.str: not one of JAX's own key classes (where the node type "
        "is registered, give a GetAttrKey instead of this str), in the first key of a key path",
        f"cannot spell None of type builtins.NoneType: {no_key}",
    ]


def test_a_str_of_another_class_is_read_as_a_str() -> None:
    for string in (Text("a@b"), np.str_("a@b")):
        found = string2keypath(string)
        assert found == (GetAttrKey("a"), DictKey("b"))
        assert keypath2string(found) == "a@b"  # which refuses names of other classes


def test_a_path_of_a_hundred_thousand_keys() -> None:
    path = (GetAttrKey("a"), DictKey("b.c"), SequenceKey(3), DictKey((1, "x"))) * 25_000
    string = keypath2string(path)
    assert len(string) == 25_000 * len(r".a@b\.c#3@\((1, 'x'))") - 1
    assert string2keypath(string) == path


# Quadratic or recursive code would be too slow for these, or exceed the stack.
HOSTILE = {
    "dots": "." * 1_000_000,
    "ats": "@" * 1_000_000,
    "hashes": "#" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "an odd backslash": "\\" * 1_000_001,
    "parentheses": "@\\(" + "(" * 1_000_000,
    "closed parentheses": "@\\(" + "(" * 500_000 + ")" * 500_000 + ")",
    "segments left open": "@\\(" * 300_000,
    "flat segments left open": "#\\(" * 300_000,
    "digits": "#" + "1" * 1_000_000,
    "digits of a dict key": "@\\(" + "1" * 1_000_000 + ")",
    "a number with an exponent": "@\\(1e" + "9" * 1_000_000 + ")",
    "signs": "@\\(" + "-" * 1_000_000 + "1)",
    "spaces": "@\\(" + " " * 1_000_000 + "x)",
    "commas": "@\\((" + "1," * 500_000 + "))",
    "an open text": "@\\('" + "a" * 1_000_000 + ")",
    "escapes": "@\\(('" + "\\\\x41" * 200_000 + "',))",
    "errors to fix": "#01" * 300_000,
    "names": "a." * 500_000 + "\\x",
    "a surrogate": "a" * 1_000_000 + "\ud800",
}


def read(string: str) -> tuple[str, KeyPath]:
    try:
        return "", string2keypath(string)
    except KeyPathError as error:
        return str(error), ()


@pytest.mark.parametrize("string", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_string_of_a_megabyte(string: str) -> None:
    message, path = read(string)
    assert len(message) < 2000
    if not message:
        some = len(string) * 10_000 // len(path)
        assert keypath2string(path[-10_000:]) == string[-some:]


def test_key_paths_that_jax_makes_are_spelled() -> None:
    tree = {"a.b": [1, (2, None)], "c": {3: 4, 5: 6}}
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    spelled = [keypath2string(path) for path, _ in pairs]
    assert spelled == ["@a\\.b#0", "@a\\.b#1#0", "@c@\\(3)", "@c@\\(5)"]


# --- what the rest of the package builds on ---------------------------------------------------


@given(keypaths())
def test_split_cuts_into_segments(path: Any) -> None:
    string = keypath2string(path)
    segments = split(string)
    assert join("", *segments) == string
    assert [segment[0] for segment in segments] == [marker(key) for key in path]


def marker(key: Any) -> str:
    return {GetAttrKey: ".", DictKey: "@", SequenceKey: "#", FlattenedIndexKey: "#"}[type(key)]


@given(keypaths(min_size=1))
def test_cut_takes_off_the_last_key(path: Any) -> None:
    prefix, segment = cut(keypath2string(path))
    assert prefix == keypath2string(path[:-1])
    assert join(prefix, segment) == keypath2string(path)


@given(keypaths(max_size=3), keypaths(max_size=3))
def test_below_and_under_are_inverse(path: Any, rest: Any) -> None:
    prefix, string = keypath2string(path), keypath2string((*path, *rest))
    assert strip_prefix(prefix, string) == keypath2string(rest)
    assert add_prefix(prefix, keypath2string(rest)) == string


@given(keypaths(max_size=2), keypaths(max_size=4))
def test_strip_prefix_finds_exactly_the_paths_below_a_prefix(path: Any, other: Any) -> None:
    found = strip_prefix(keypath2string(path), keypath2string(other))
    is_below = [repr(key) for key in other[: len(path)]] == [repr(key) for key in path]
    assert (found is not None) == is_below


@given(st.text(st.sampled_from(".@#\\()'\",0123aéx -+e_\n"), max_size=12))
def test_reading_lets_no_other_exception_out(string: str) -> None:
    message, path = read(string)
    assert message or keypath2string(path) == string

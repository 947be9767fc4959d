"""Literals, and the edges of reading: where a rule about a single character decides."""

from typing import Any

import pytest
from jax.tree_util import DictKey, GetAttrKey

from pytree2safetensors import KeyPathError, dict2pytree, pytree2dict, string2keypath
from pytree2safetensors._messages import short_form
from pytree2safetensors._tree.literal import MAX_DIGITS, read_literal, write_literal
from pytree2safetensors._tree.placeholders import Binding, Match
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.rule_index import RuleIndex


@pytest.mark.parametrize(
    "value",
    [
        (), ((),), (1, ()), ((), 1), ((), ()), ((1,),), (((),), 2), ("\U0010ffff", "\U00010000"),
        ("\xff", "\u0100", "\x00", "\n\r\t"), b"\x00\xff", ("X", "\\", "'", '"', "'\""), (1, (2, (3,)), 4),
    ],
)  # fmt: skip
def test_reading_inverts_writing(value: Any) -> None:
    found = read_literal(write_literal(value))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        ")",
        ",",
        "1,",
        "1,2",
        "1 2",
        "1)",
        "(1",
        "(,)",
        "(1,,)",
        "(1 2)",
        "1 (",
        "()()",
        "((1)",
        "b'\\u0100'",
    ],
)
def test_other_texts_are_no_literals(text: str) -> None:
    with pytest.raises(KeyPathError):
        read_literal(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"@\(b'\\u0100')", r"a byte in parentheses is beyond \xff"),
        (r"@\(('\\U00110000',))", "the text in parentheses has an unknown escape"),
        (r"@\(('\\q',))", "the text in parentheses has an unknown escape"),
    ],
)
def test_unknown_escapes_are_refused(text: str, reason: str) -> None:
    with pytest.raises(KeyPathError) as caught:
        string2keypath(text)
    assert reason in str(caught.value)


def test_a_long_value_is_shown_in_part() -> None:
    assert short_form("a" * 98) == repr("a" * 98)
    for length in (99, 100, 101, 1000):
        assert short_form("a" * length) == "'" + "a" * 96 + "..."
    assert short_form(b"a" * 1000) == "b'" + "a" * 95 + "..."


@pytest.mark.parametrize("digits", [101, 4300, 4301, 6000])
def test_a_long_int_is_shown_by_its_number_of_digits(digits: int) -> None:
    text = f"an int of {digits:,} digits"
    assert short_form(10 ** (digits - 1)) == short_form(10**digits - 1) == text
    assert short_form(-(10**digits) + 1) == text


def test_a_name_may_begin_with_any_letter() -> None:
    assert string2keypath("X") == (GetAttrKey("X"),)
    assert string2keypath("Xy.X@X") == (GetAttrKey("Xy"), GetAttrKey("X"), DictKey("X"))


@pytest.mark.parametrize(("length", "is_shown"), [(MAX_DIGITS, True), (MAX_DIGITS + 1, False)])
def test_the_canonical_spelling_is_shown_of_strings_that_are_not_huge(
    length: int, is_shown: bool
) -> None:
    with pytest.raises(KeyPathError, match="a leading name has no") as caught:
        string2keypath("." + "a" * (length - 1))
    assert ("; the canonical spelling is 'aaa" in str(caught.value)) is is_shown


def test_equal_keys_of_other_types_have_their_own_spellings() -> None:
    tree = {"a": {1: 0}, "b": {True: 0}, "c": {1.0: 0}, "d": {1: 0}}
    assert [*pytree2dict(tree)] == [r"@a@\(1)", r"@b@\(True)", r"@c@\(1\.0)", r"@d@\(1)"]


def test_a_name_that_begins_as_the_node_before_it_is_not_below_it() -> None:
    flat = {"@z@ab": 1, "@a@x": 2, "@ab": 3}
    assert dict2pytree(flat) == {"a": {"x": 2}, "ab": 3, "z": {"ab": 1}}
    assert pytree2dict(dict2pytree({"b": 1, "a.x": 2, "ab": 3})) == {"b": 1, "a.x": 2, "ab": 3}


def test_a_match_says_what_the_placeholders_stand_for() -> None:
    index = RuleIndex([Rule("a.{l}", "b.{l}"), Rule("{*}.c", "{*}.d")])
    assert index.match_paths(["@b@3", "@x@d", "@y"]) == [
        Match(0, Binding({"l": 3}, "")),
        Match(1, Binding({}, "x")),
        None,
    ]

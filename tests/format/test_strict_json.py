"""Strict JSON: which numbers it takes."""

from typing import Any

import pytest

from pytree2safetensors import FileFormatError
from pytree2safetensors._format.strict_json import read_json, read_json_at


@pytest.mark.parametrize("text", ["1.0", "1e2", "-0", "NaN", "Infinity", "[1.5]"])
def test_only_integers_are_read(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"x is not valid JSON: .* is not an integer"):
        read_json(text, "x")


@pytest.mark.parametrize("text", ["0", "-1", str(2**64), "9" * 30])
def test_integers_of_any_size_are_read(text: str) -> None:
    assert read_json(text, "x") == int(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-0", -0.0),
        ("1.5", 1.5),
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("1" + "0" * 20, 1e20),
        ("9" * 5000, float("inf")),  # more digits than Python makes an int of
    ],
)
def test_other_numbers_are_floats_where_nothing_reads_them(text: str, number: Any) -> None:
    found = read_json(text, "x", fractions=True)
    assert (type(found), str(found)) == (type(number), str(number))


@pytest.mark.parametrize("text", ["[1]", "1", '{"a":1.5}', '{"a":NaN}', '{"a":"1","a":"2"}', "{"])
def test_only_an_object_of_strict_json_begins_a_header(text: str) -> None:
    with pytest.raises(FileFormatError, match="no JSON object begins at 1"):
        read_json_at(f" {text}", 1)

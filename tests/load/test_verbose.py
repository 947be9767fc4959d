"""`verbose`, the third argument of 0.1.4."""

import inspect
import io
from pathlib import Path
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    Rule,
    UnsupportedLeafError,
    WeightsMismatchError,
    load_into_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)
from pytree2safetensors._save import contents as save_contents

struct: Any = jax.ShapeDtypeStruct


def test_verbose_prints_what_did_not_fit(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = {"a": 0, "b": np.zeros(2), "c": 1}
    stored = {"@a": 5, "@b": np.zeros(3), "@d": 2}
    found = set_weights(template, stored, True, strict=False)
    assert (found["a"], found["c"]) == (5, 1)
    expected = (
        "the dictionary does not fit the template: 1 missing, 1 unexpected, 1 mismatched\n"
        "  missing (the template has them):\n"
        "    '@c'\n"
        "  unexpected (the template does not have them):\n"
        "    '@d'\n"
        "  mismatched:\n"
        "    '@b': the template has float64[2], but the stored leaf is float64[3]\n"
    )
    assert capfd.readouterr() == ("", expected)
    save_pytree({"a": 5, "d": 2}, tmp_path / "file")
    load_into_pytree({"a": 0}, tmp_path / "file", verbose=True, strict=False)
    assert capfd.readouterr().err.endswith("not have them):\n    '@d'\n")


@pytest.mark.parametrize("load", [load_into_pytree, set_weights])
def test_unexpected_leaves_can_be_ignored(load: Any, tmp_path: Path) -> None:
    stored = {"a": 1, "b": 2, "more": 3.0}
    save_pytree(stored, tmp_path / "file")
    source = tmp_path / "file" if load is load_into_pytree else pytree2dict(stored)
    assert load({"a": 0, "b": 0}, source, unexpected="skip") == {"a": 1, "b": 2}
    assert load({}, source, unexpected="skip") == {}
    with pytest.raises(
        WeightsMismatchError,
        match=r'\nunexpected="skip" ignores leaves that the template does not have; strict=False loads what fits\.$',
    ):
        load({"a": 0, "b": 0}, source)
    with pytest.raises(
        WeightsMismatchError, match="1 missing, 0 unexpected, 1 mismatched"
    ) as caught:
        load({"a": 0, "b": "text", "mor": 0.0}, source, unexpected="skip")
    assert "'@mor' (nearest: '@more')" in str(caught.value)
    assert (caught.value.missing, caught.value.unexpected) == (("@mor",), ())
    with pytest.raises(WeightsMismatchError, match="No leaf fits"):
        load({"c": 0}, source, unexpected="skip", strict=False)


@pytest.mark.parametrize("verbose", [False, True])
def test_a_logger_gets_what_did_not_fit(
    verbose: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"@a": 1, "@b": "text", "@more": 3}
    with caplog.at_level("INFO", "pytree2safetensors"):
        set_weights({"a": 0, "b": 0, "new": 5}, given, strict=False, verbose=verbose)
        set_weights({"a": 0}, {"@a": 1}, strict=False)  # all fits
    [record] = caplog.records
    left: Any = record
    assert (record.name, record.levelname) == ("pytree2safetensors", "INFO")
    assert (left.missing, left.unexpected) == (["@new"], ["@more"])
    assert left.mismatched == [
        "'@b': the template has a Python int, but the stored leaf is a Python str"
    ]
    text = record.getMessage()
    assert text.startswith(
        "the dictionary does not fit the template: 1 missing, 1 unexpected, 1 mis"
    )
    assert (text in capfd.readouterr().err) == verbose


def test_entries_have_the_whole_path_and_the_message_a_short_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "k" * 300
    template, given = {name: np.zeros(2), "a": 0}, {f"@{name}": np.zeros(3), "@a": 1}
    why = "the template has float64[2], but the stored leaf is float64[3]"
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, given)
    assert caught.value.mismatched == (f"'@{name}': {why}",)
    short = f"    '@{'k' * 99}'...'{'k' * 100}' (301 characters): {why}"
    assert short in str(caught.value).splitlines()
    with caplog.at_level("INFO", "pytree2safetensors"):
        set_weights(template, given, strict=False)
    [record] = caplog.records
    assert vars(record)["mismatched"] == [f"'@{name}': {why}"]
    assert short in record.getMessage().splitlines()
    rule = Rule("w", f"@{name}", "a b -> b a")
    with pytest.raises(WeightsMismatchError) as caught:
        pytree2dict({name: np.zeros(2)}, rename=[rule])
    assert caught.value.mismatched[0].startswith(f"'@{name}': it has 1 axis")
    assert name not in str(caught.value).splitlines()[1].partition(": ")[0]


def test_verbose_says_nothing_where_all_fits(capfd: pytest.CaptureFixture[str]) -> None:
    assert set_weights({"a": 0}, {"@a": 5}, verbose=True) == {"a": 5}
    with pytest.raises(WeightsMismatchError):  # which says it all
        set_weights({"a": 0}, {"@a": 5, "@b": 6}, verbose=True)
    set_weights({"a": 0}, {"@a": 5, "@b": 6}, strict=False)
    assert capfd.readouterr() == ("", "")


def test_what_a_cast_loses_is_no_warning(tmp_path: Path) -> None:
    tree = {"a": np.array([1e9, np.nan, -1e-9], np.float32)}
    save_pytree(tree, tmp_path / "file")
    for template in ({"a": np.zeros(3, np.float16)}, {"a": jnp.zeros(3, jnp.float16)}):
        found = load_into_pytree(template, tmp_path / "file", cast=True)
        assert np.isinf(found["a"][0])
        assert_same(set_weights(template, pytree2dict(tree), cast=True), found)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
@pytest.mark.parametrize("unsupported", ["raise", "skip"])
def test_no_reference_to_an_array_is_left_out(unsupported: Any) -> None:
    tree = {"a": getattr(jax, "new_ref", None)(jnp.ones(3)), "f": print}  # type: ignore[misc] # an older JAX has none
    with pytest.raises(
        UnsupportedLeafError, match="save the array that a Ref or another object holds"
    ) as caught:
        save_pytree(tree, io.BytesIO(), unsupported=unsupported)
    assert "skip" not in str(caught.value)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
def test_a_reference_in_a_template_gets_no_values(tmp_path: Path) -> None:
    template = {"a": getattr(jax, "new_ref", None)(jnp.ones(3)), "b": 1}  # type: ignore[misc] # an older JAX has none
    save_pytree({"b": 2}, tmp_path / "file")
    found = load_into_pytree(template, tmp_path / "file", strict=False)
    assert found["a"] is template["a"]
    assert found["b"] == 2
    save_pytree({"a": jnp.zeros(3), "b": 2}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree(template, tmp_path / "file")
    assert len(caught.value.mismatched) == 1


def test_keys_are_saved_while_others_are_traced() -> None:
    keys = {"one": jax.random.key(0), "many": jax.random.split(jax.random.key(1), 2000)}
    expected, found = io.BytesIO(), io.BytesIO()
    save_pytree(keys, expected)

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        save_pytree(keys, found)
        return x

    traced(jnp.ones(1))
    assert found.getvalue() == expected.getvalue()


def test_nothing_but_skip_leaves_leaves_out() -> None:
    unchecked: Any = inspect.unwrap(
        save_contents.collect
    )  # as where the runtime type checks are off
    with pytest.raises(UnsupportedLeafError):
        unchecked({"a": 1, "b": print}, {}, "ignore")

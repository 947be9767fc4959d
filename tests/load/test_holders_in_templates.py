"""Template leaves that hold arrays but are not pytree nodes: a load cannot give them values."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import (
    Rule,
    WeightsMismatchError,
    explain,
    load_into_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)


class Model:
    """A model whose class is not registered."""

    def __init__(self, w: Any) -> None:
        self.w = w


@dataclass
class Foreign:
    """An array of another library."""

    values: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.ones(2, np.float32)


REGISTER = (
    ", which holds arrays, but is not a pytree node; register its class, for example with "
    "jax.tree_util.register_dataclass"
)
ONES = np.ones(2, np.float32)
HOLDERS: list[tuple[Any, str]] = [
    (Model(jnp.zeros(2)), f"a {__name__}.Model{REGISTER}"),
    (SimpleNamespace(inner=Model(ONES)), f"a types.SimpleNamespace{REGISTER}"),
    (partial(print, ONES), "a functools.partial, which holds arrays; a jax.tree_util.Partial is a pytree node"),
    (np.array([ONES, None, 1], object), "a numpy.ndarray, which holds arrays; leaf.tolist() is a pytree node"),
    (Foreign(0), f"a {__name__}.Foreign, not an array of JAX or NumPy; convert it with jnp.asarray(leaf)"),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_pytree({"model": {"w": ONES}, "step": 1000}, tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize(("leaf", "text"), HOLDERS)
def test_what_holds_arrays_is_mismatched(leaf: Any, text: str, path: Path) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"model": leaf, "step": 0}, path, unexpected="skip")
    assert caught.value.mismatched == (f"'@model': the template has {text}",)
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"model": leaf, "step": 0}, {"@step": 1000})
    assert caught.value.mismatched == (f"'@model': the template has {text}",)


@pytest.mark.parametrize("leaf", [leaf for leaf, _ in HOLDERS])
def test_a_lenient_load_keeps_what_holds_arrays_and_says_so(
    leaf: Any, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = load_into_pytree({"model": leaf, "step": 0}, path, strict=False, verbose=True)
    assert found["model"] is leaf
    assert found["step"] == 1000
    assert "1 unexpected, 1 mismatched" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
def test_a_reference_is_mismatched_traced_or_not() -> None:
    reason = (
        "'@ref': the template has a reference to an array; put the array that it holds in its place, as "
        "ref[...]"
    )

    def check(value: Any) -> None:
        template = {"ref": jax.new_ref(value), "w": 1.0}
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights(template, {"@w": 2.0})
        assert caught.value.mismatched == (reason,)
        assert set_weights(template, {"@w": 2.0}, strict=False)["ref"] is template["ref"]
        with pytest.raises(WeightsMismatchError, match="is not an array, or is an array without"):
            set_weights({"w": jnp.ones(())}, {"@w": template["ref"]})

    check(jnp.ones(()))
    jax.jit(check)(1.0)


def test_an_array_under_the_name_of_what_holds_arrays_is_not_unexpected(path: Path) -> None:
    save_pytree({"model": ONES, "step": 1}, path)
    with pytest.raises(WeightsMismatchError, match="0 missing, 0 unexpected, 1 mismatched"):
        load_into_pytree({"model": Model(ONES), "step": 0}, path)


def test_the_templates_own_object_is_a_fitting_value() -> None:
    template = {"model": Model(ONES), "step": 0}
    assert set_weights(template, pytree2dict(template)) == template


def test_the_templates_own_object_fits_under_a_name_of_no_leaf() -> None:
    template = {"f": print, "model": Model(ONES), "step": 0}
    values = {"@x": template["model"], "#0": print, "@step": 1}
    assert set_weights(template, values) == {**template, "step": 1}


def test_the_templates_own_object_does_not_fit_under_the_name_of_another_leaf() -> None:
    one, other = Model(ONES), Model(ONES)
    template = {"f": print, "o": one, "p": other, "step": 0}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"@o": other, "@p": one}, ["@o", "@p"]),
        ({"@o": print, "@f": one}, ["@f", "@o"]),
        ({"@step": one}, ["@step"]),
    ]
    for values, mismatched in cases:
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights(template, {"@o": one, "@p": other, "@step": 1, **values})
        found = caught.value.mismatched
        assert [text.partition(":")[0] for text in found] == [*map(repr, mismatched)]


RENAMES: list[Any] = [[Rule("x", "model"), Rule("{=}", "{=}")], {"@model": "x"}]


@pytest.mark.parametrize("rename", RENAMES)
def test_the_templates_own_object_fits_under_another_name(rename: Any) -> None:
    template = {"model": Model(ONES), "step": 0}
    values = pytree2dict(template, rename=rename)
    assert "x" in values
    assert set_weights(template, values, rename=rename) == template


@pytest.mark.parametrize("rename", [*RENAMES, [Rule("x", "model", "a -> a"), *RENAMES[0]]])
def test_an_array_under_that_name_is_not_unexpected(rename: Any) -> None:
    with pytest.raises(WeightsMismatchError, match="0 missing, 0 unexpected, 1 mismatched"):
        set_weights({"model": Model(ONES), "step": 0}, {"x": ONES, "@step": 1}, rename=rename)


def test_what_holds_arrays_may_be_without_a_rule() -> None:
    with pytest.raises(
        WeightsMismatchError, match="0 missing, 1 unexpected, 1 mismatched"
    ) as caught:
        set_weights(
            {"model": Model(ONES), "step": 0},
            {"@model": ONES, "@step": 1},
            rename=[Rule("@step", "@step")],
        )
    assert caught.value.unexpected == ("@model",)


def test_a_dotted_path_of_what_holds_arrays_must_be_the_only_one() -> None:
    template = {"a.b": Model(ONES), "a": {"b": ONES}}
    for function in (
        lambda: set_weights(template, {}, rename=[Rule(None, "a.b")]),
        lambda: pytree2dict(template, rename=[Rule(None, "a.b")]),
    ):
        with pytest.raises(ValueError, match=r"'@a@b'"):
            function()


def test_a_rule_keeps_what_holds_arrays(path: Path) -> None:
    template = {"model": Model(ONES), "step": 0}
    last = Rule("{=}", "{=}")
    found = load_into_pytree(
        template, path, rename=[Rule(None, "@model"), Rule("@model@w", None), last]
    )
    assert found == {"model": template["model"], "step": 1000}
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree(template, path, rename=[Rule("@model@w", "@model"), last])
    assert len(caught.value.mismatched) == 1
    assert "no leaf of the template uses" not in str(caught.value)


def test_a_function_is_not_asked_for_the_name_of_what_holds_arrays(path: Path) -> None:
    names = {"@step": "@step"}
    with pytest.raises(WeightsMismatchError, match="1 mismatched"):
        load_into_pytree({"model": Model(ONES), "step": 0}, path, rename=names.__getitem__)


def test_what_holds_arrays_is_explained(path: Path) -> None:
    save_pytree({"step": 1000}, path)
    assert explain({"f": print, "model": Model(ONES), "step": 0}, path).splitlines() == [
        f"{str(path)!r}: 1 of 2 leaves fit",
        f"  differs  '@model' = 'model'  not data      the template has a {__name__}.Model{REGISTER}",
        "  fits     '@step' = 'step'    a Python int  '@step' a Python int",
    ]


def test_what_holds_no_arrays_is_kept_in_silence(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    leaves: list[Any] = [print, Model(None), jax.jit(lambda x: x), partial(print, 1), object()]
    save_pytree({"w": 1.0}, path)
    found = load_into_pytree({"leaves": leaves, "w": 0.0}, path, verbose=True)
    assert found == {"leaves": leaves, "w": 1.0}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("leaf", [print, *(leaf for leaf, _ in HOLDERS)])
@pytest.mark.parametrize(
    "rename", [None, {"@w": "x"}, [Rule("{*}", "{*}")], lambda path: path[1:].upper()]
)
def test_a_flat_dict_of_the_template_fits_it(leaf: Any, rename: Any) -> None:
    template = {"w": ONES, "model": leaf}
    found = set_weights(template, pytree2dict(template, rename=rename), rename=rename)
    assert found["model"] is leaf
    found = set_weights(
        template, {"any name": leaf, **pytree2dict({"w": ONES}, rename=rename)}, rename=rename
    )
    assert found["model"] is leaf

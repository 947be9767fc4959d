"""Leaves that cannot be loaded: they stop only what needs them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hostile import file, tensor
from pytree2safetensors import (
    FileFormatError,
    Rule,
    WeightsMismatchError,
    explain,
    load_abstract,
    load_into_pytree,
    load_pytree,
)

STRUCT: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types
NOTE = '{"leaves":{"@k":["key","other"]},"version":1}'
PACKED = (
    "is of the packed dtype F4, which has no NumPy dtype; unpack it with the program that wrote it"
)
KEY = (
    "is a key of the PRNG implementation 'other', which this process does not know; register it, or "
    "install a newer JAX"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    header: dict[str, Any] = {
        "__metadata__": {"pytree2safetensors": NOTE},
        "@a": tensor("F32", [1], 0, 4),
        "@k": tensor("U32", [2], 4, 12),
        "@p": tensor("F4", [2], 12, 13),
    }
    path = tmp_path / "file"
    path.write_bytes(file(header, np.float32(3).tobytes() + bytes(9)))
    return path


def template() -> dict[str, Any]:
    return {"a": np.zeros(1, np.float32), "k": jax.random.key(7), "p": np.zeros(2, np.float32)}


def test_unknown_leaves_are_mismatched(path: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="0 missing, 0 unexpected, 2 mismatched") as got:
        load_into_pytree(template(), path)
    assert got.value.mismatched == (
        f"'@k': the template has key<threefry2x32>[], but the stored leaf {KEY}",
        f"'@p': the template has float32[2], but the stored leaf {PACKED}",
    )


def test_a_lenient_load_keeps_the_leaves_of_the_template(path: Path) -> None:
    wanted = template()
    found = load_into_pytree(wanted, path, strict=False)
    assert found["a"].tolist() == [3]
    assert (found["k"], found["p"]) == (wanted["k"], wanted["p"])


def test_an_abstract_leaf_has_no_value_to_keep(path: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="2 mismatched"):
        load_into_pytree({**template(), "p": STRUCT((2,), np.float32)}, path, strict=False)


def test_unknown_leaves_are_explained(path: Path) -> None:
    assert explain(template(), path).splitlines() == [
        f"{str(path)!r}: 1 of 3 leaves fit",
        "  fits     '@a' = 'a'  float32[1]           '@a' float32[1]",
        "  differs  '@k' = 'k'  key<threefry2x32>[]  the template has key<threefry2x32>[], but the "
        f"stored leaf {KEY}",
        "  differs  '@p' = 'p'  float32[2]           the template has float32[2], but the stored leaf "
        f"{PACKED}",
    ]


def test_rules_do_not_find_their_values(path: Path) -> None:
    rules = [Rule("@p", "p", "(a b) -> a b", a=1), Rule("{=}", "{=}")]
    wanted = {**template(), "p": np.zeros((1, 2), np.float32)}
    with pytest.raises(WeightsMismatchError) as got:
        load_into_pytree(wanted, path, rename=rules)
    assert got.value.mismatched[1] == (
        f"'@p': the template has float32[1,2]; under {rules[0]!r}, the tensor '@p' would be [2], but it {PACKED}"
    )
    assert load_into_pytree(wanted, path, rename=rules, strict=False)["a"].tolist() == [3]


def test_a_flat_list_names_them_in_a_warning(path: Path) -> None:
    text = (
        f"The list of {str(path)!r} lacks leaves that cannot be loaded: '@k' {KEY}, '@p' {PACKED}"
    )
    with pytest.warns(UserWarning, match="cannot be loaded") as caught:
        found = load_abstract(path, flat=True)
    assert [(str(warning.message), warning.filename) for warning in caught] == [(text, __file__)]
    assert found == {"@a": STRUCT((1,), np.float32)}


def test_a_tree_is_not_loaded_without_them(path: Path) -> None:
    for load in (load_pytree, load_abstract):
        with pytest.raises(FileFormatError) as caught:
            load(path)
        assert str(caught.value) == f"in {str(path)!r}, '@k' {KEY}"


def test_keys_whose_data_have_another_shape_stop_only_what_needs_them(tmp_path: Path) -> None:
    note = '{"leaves":{"@k":["key","threefry2x32"]},"version":1}'
    header: dict[str, Any] = {
        "__metadata__": {"pytree2safetensors": note},
        "@a": tensor("F32", [1], 0, 4),
        "@k": tensor("U32", [3], 4, 16),
    }
    path = tmp_path / "file"
    path.write_bytes(file(header, np.float32(3).tobytes() + bytes(12)))
    why = (
        "is noted as a key of threefry2x32, whose data must end in the shape [2], and stored with the "
        "shape [3]"
    )
    wanted = {"a": np.zeros(1, np.float32), "k": jax.random.key(7)}
    found = load_into_pytree(wanted, path, strict=False)
    assert np.asarray(found["a"]).tolist() == [3]
    assert found["k"] is wanted["k"]
    assert f"but the stored leaf {why}" in explain(wanted, path)
    with pytest.warns(UserWarning, match="cannot be loaded") as caught:
        assert list(load_abstract(path, flat=True)) == ["@a"]
    assert str(caught[0].message).endswith(f"'@k' {why}")
    assert load_pytree(path, prefix="@a").tolist() == [3]
    with pytest.raises(FileFormatError) as refused:
        load_pytree(path)
    assert str(refused.value) == f"in {str(path)!r}, '@k' {why}"

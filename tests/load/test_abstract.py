"""`load_abstract`: a tree, or on request a flat dict, with shapes and dtypes for arrays."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pytree2safetensors import (
    KeyPathError,
    TreeStructureError,
    load_abstract,
    pytree2dict,
    save_pytree,
)

Struct: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["w.weight", "w.weight.absmax"], TreeStructureError),
        (["blocks.0.w", "blocks#0.w"], TreeStructureError),
        (["a\\b", "#x"], KeyPathError),
        (["", "a"], TreeStructureError),
    ],
)
def test_names_that_make_no_tree_load_flat(
    names: list[str], error: type[ValueError], tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({name: np.zeros((2, place), np.int8) for place, name in enumerate(names)}, path)
    with pytest.raises(error, match=r"load_abstract\(\.\.\., flat=True\) lists them$"):
        load_abstract(path)
    found = load_abstract(path, flat=True)
    assert found == {name: Struct((2, place), np.int8) for place, name in enumerate(names)}
    assert list(found) == sorted(names)


def test_a_flat_dict_has_the_leaves_of_the_tree(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "w": [np.zeros(3, np.float16)], "k": jax.random.key(0), "n": 7, "s": "adam", "none": None,
    }  # fmt: skip
    save_pytree(tree, tmp_path / "tree.safetensors")
    flat = load_abstract(tmp_path / "tree.safetensors", flat=True)
    assert flat == pytree2dict(load_abstract(tmp_path / "tree.safetensors"))
    assert (flat["@n"], flat["@s"]) == (7, "adam")

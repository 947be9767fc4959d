"""What tensors describe: arrays of dtypes that are known or not, with or without weak types."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    FileFormatError,
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    set_weights,
)
from pytree2safetensors._format.tensor import NUMPY
from pytree2safetensors._leaves import spec
from pytree2safetensors._leaves.spec import LeafSpec


def test_a_dtype_that_an_older_ml_dtypes_lacks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree({"w": jnp.ones(2, jnp.bfloat16)}, tmp_path / "file")
    monkeypatch.setattr(spec, "NUMPY", {**NUMPY, "BF16": "bfloat17"})
    spec._numpy_dtype.cache_clear()
    try:
        with pytest.raises(FileFormatError) as caught:
            load_pytree(tmp_path / "file")
        with pytest.raises(WeightsMismatchError) as refused:
            load_into_pytree({"v": jnp.ones(2)}, tmp_path / "file", rename={"@v": "@w"})
    finally:
        spec._numpy_dtype.cache_clear()
    reason = "is of the dtype bfloat17, which this ml_dtypes lacks; install a newer one"
    assert f"'@w' {reason}" in str(caught.value)
    assert refused.value.mismatched == (
        f"'@v': the template has float32[2], but the stored leaf '@w' {reason}",
    )


def test_an_array_is_strongly_typed_unless_something_else_is_said() -> None:
    assert not LeafSpec("array", np.dtype(np.float32), ()).weak


def test_what_jax_holds_is_the_same_under_a_trace(tmp_path: Path) -> None:
    template = {"w": jnp.zeros(3, jnp.bfloat16)}
    save_pytree(template, tmp_path / "file")
    spec._jax_holds.cache_clear()
    traced = jax.jit(lambda x: set_weights({"w": jnp.zeros(3, jnp.bfloat16)}, {"@w": x}, cast=True))
    assert_same(traced(jnp.ones(3)), {"w": jnp.ones(3, jnp.bfloat16)})
    assert isinstance(load_pytree(tmp_path / "file")["w"], jax.Array)


def test_an_array_of_a_dtype_that_jax_refuses_is_one_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise TypeError("not a valid JAX array type")

    tree = {"w": np.ones(3, jnp.bfloat16)}
    save_pytree(tree, tmp_path / "file")
    monkeypatch.setattr(spec, "block_until_ready", refuse)
    spec._jax_holds.cache_clear()
    try:
        with pytest.warns(UserWarning, match="bfloat16"):
            assert_same(load_pytree(tmp_path / "file"), tree)
    finally:
        spec._jax_holds.cache_clear()

"""Unreduced arrays: their values are sums over their shards, which no process has."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import pytree2safetensors as p2s
from placed import P, Struct

AxisType: Any = getattr(jax.sharding, "AxisType", None)
set_mesh: Any = getattr(jax, "set_mesh", None)
pytestmark = pytest.mark.skipif(
    set_mesh is None or not hasattr(jax, "reshard"), reason="this JAX has no unreduced arrays"
)


@pytest.fixture(scope="module")
def unreduced() -> Any:
    """The product [[42.0]] of the row 0 to 3 and a column of sevens; each device has one part."""
    make_mesh: Any = jax.make_mesh
    mesh = make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    row, column = np.arange(4.0, dtype=np.float32)[None], np.full((4, 1), 7, np.float32)
    product: Any = jax.jit(
        lambda a, b: jax.numpy.einsum(
            "ij,jk->ik", a, b, out_sharding=P(None, None, unreduced={"x"})
        )
    )
    with set_mesh(mesh):
        placed = jax.device_put(
            (row, column), (NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P("x", None)))
        )
        return product(*placed)


@pytest.mark.parametrize("unsupported", ["raise", "skip"])
def test_unreduced_arrays_cannot_be_saved(tmp_path: Path, unreduced: Any, unsupported: Any) -> None:
    path = tmp_path / "a.safetensors"
    for save in (p2s.save_pytree, p2s.save_pytree_async):
        with pytest.raises(p2s.UnsupportedLeafError) as error:
            save({"a": unreduced}, path, unsupported=unsupported)
        assert str(error.value) == (
            "the array at '@a' is unreduced: its values are sums over its shards; "
            "reduce it first, for example with jax.reshard"
        )
    assert not path.exists()


@pytest.mark.parametrize("is_abstract", [False, True])
def test_nothing_is_loaded_into_an_unreduced_sharding(
    tmp_path: Path, unreduced: Any, is_abstract: bool
) -> None:
    path = tmp_path / "a.safetensors"
    p2s.save_pytree({"a": np.array([[42]], np.float32)}, path)
    shape, sharding = unreduced.shape, unreduced.sharding
    leaf = Struct(shape, np.float32, sharding=sharding) if is_abstract else unreduced
    with pytest.raises(p2s.WeightsMismatchError, match="its template has an unreduced sharding"):
        p2s.load_into_pytree({"a": leaf}, path)
    with pytest.raises(p2s.WeightsMismatchError, match="its template has an unreduced sharding"):
        p2s.set_weights({"a": leaf}, {"@a": np.array([[42]], np.float32)})

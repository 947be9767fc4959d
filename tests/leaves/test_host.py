"""The values of leaves on the host: booleans, arrays in other layouts, and shards."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from oracle import assert_same_values
from placed import P
from pytree2safetensors import Rule, load_pytree, save_pytree, save_pytree_async, set_weights
from pytree2safetensors._leaves import host
from pytree2safetensors._leaves.to_jax import TAKEN_OVER


def test_every_byte_of_booleans_becomes_0_or_1() -> None:
    odd = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)
    assert host.canonical_bools(odd).view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("rows", [1, 1 << 12])
@pytest.mark.parametrize("spec", [None, P(), P("x"), P(None, "x")])
def test_booleans_of_jax_are_saved_as_0_and_1(rows: int, spec: Any) -> None:
    odd = np.tile(np.array([[0, 1, 2, 255] * 8], np.uint8), (8 * rows, 1)).view(np.bool_)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    leaf = jax.device_put(odd, None if spec is None else NamedSharding(mesh, spec))
    assert np.asarray(leaf).view(np.uint8).max() == 255  # JAX keeps the bytes
    assert host.host_array(leaf).view(np.uint8).max() == 1
    transposed = [Rule("w", "#0", "a b -> b a"), Rule("s", "#1")]
    for options in ({}, {"rename": transposed}, {"checksum": True}):
        files = []
        for tree in ([leaf, leaf[0, 2]], [odd != 0, np.True_]):
            files.append(io.BytesIO())
            save_pytree(tree, files[-1], **options)
        assert files[0].getvalue() == files[1].getvalue()


def test_booleans_of_jax_become_0_and_1_on_the_host() -> None:
    odd = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)
    given = {"#0": jax.device_put(odd), "#1": jax.device_put(odd[2])}
    found: list[Any] = [*set_weights([np.zeros(4, np.bool_), np.bool_(0)], given)]
    assert found[0].view(np.uint8).tolist() == [0, 1, 1, 1]
    assert found[1].view(np.uint8) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("size", [8, 80])
def test_an_array_in_another_layout_is_saved_while_transfers_are_guarded(
    tmp_path: Path, dtype: str, size: int
) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    if getattr(layouts, "Format", None) in {None, layouts.Layout}:
        pytest.skip("this JAX gives layouts other names")
    array = jnp.arange(size).reshape(2, -1).astype(dtype)
    form = layouts.Format(layouts.Layout(major_to_minor=(1, 0)), array.sharding)
    with jax.transfer_guard("allow"):
        moved = jax.device_put(array, form)
    with jax.transfer_guard("disallow"):
        save_pytree({"a": moved}, tmp_path / "file")
        save_pytree_async({"a": moved, "b": moved}, tmp_path / "async").result()
    for name in ("file", "async"):
        assert (load_pytree(tmp_path / name)["a"] == array).all()


def test_shards_on_the_host_leave_no_copy_behind() -> None:
    data: Any = jnp.arange(TAKEN_OVER).astype(jnp.int4)  # which is packed on any device
    assert_same_values(host.host_shard(data), np.asarray(jnp.array(data)))
    assert data._npy_value is None  # where JAX keeps it


def test_the_values_of_a_key_are_its_data() -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    np.testing.assert_array_equal(host.host_shard(keys), jax.random.key_data(keys))

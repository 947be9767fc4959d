"""Leaves as bytes and back: scalars, and tensors that are converted piece by piece."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from oracle import assert_same_values
from placed import P
from pytree2safetensors import (
    FileFormatError,
    Rule,
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    save_pytree_async,
    set_weights,
)
from pytree2safetensors._format.tensor import NUMPY, TensorInfo
from pytree2safetensors._leaves import encode, host, spec
from pytree2safetensors._leaves.cast import holds_value
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.prng_keys import implementation_of
from pytree2safetensors._leaves.to_jax import TAKEN_OVER, weaken


@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.integers(2, 40), st.data())
def test_blocks_are_the_bytes_in_order(
    shape: tuple[int, ...], limit: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    values = np.arange(np.prod(shape, dtype=int), dtype=">u2").reshape(shape).transpose(order)
    info = TensorInfo("U16", values.shape, values.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_PIECE", limit)
        pieces = list(encode.pieces(values, info))
    assert b"".join(piece.tobytes() for piece in pieces) == values.astype("<u2").tobytes()
    assert all(len(piece) <= limit for piece in pieces)


def test_a_contiguous_tensor_is_one_block_without_a_copy() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    [piece] = encode.pieces(values, TensorInfo("F32", (2, 3), 24))
    assert np.shares_memory(piece, values)


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


@pytest.mark.parametrize(
    ("leaf", "kind"), [(2**63, ["int", "0x8000000000000000"]), ("text", ["str", "text"])]
)
def test_what_the_note_holds_has_no_tensor(leaf: Any, kind: list[str]) -> None:
    assert describe([leaf]) == [TensorInfo("", (), 0, kind)]


@pytest.mark.parametrize(("value", "dtype"), [(256, "u1"), (-1, "u4"), (2**63, "i8")])
@pytest.mark.filterwarnings("ignore:NumPy will stop allowing conversion:DeprecationWarning")
def test_an_integer_that_would_wrap_does_not_fit(value: int, dtype: str) -> None:
    assert not holds_value(np.dtype(dtype), value)  # NumPy 1 wraps it, with a warning since 1.24


def test_the_implementation_of_keys_is_found_by_their_dtype() -> None:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        assert implementation_of(jax.random.key(0, impl=name).dtype) == name


def test_a_dtype_without_a_weak_type_stays_as_it_is() -> None:
    array = jnp.asarray(3, jnp.int8)
    assert weaken(array) is array
    assert weaken(jnp.asarray(3, jnp.int32)).weak_type


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

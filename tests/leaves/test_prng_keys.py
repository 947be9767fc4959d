"""PRNG keys: their implementations, which may be unknown or have no registered name."""

from pathlib import Path
from typing import NoReturn

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import (
    UnsupportedLeafError,
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._errors import UnknownHere
from pytree2safetensors._leaves.prng_keys import (
    implementation_name,
    implementation_of,
    key_dtype,
    key_shape,
)

UNNAMED = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jnp.full(2, seed, np.uint32),
    split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
    random_bits=lambda key, width, shape: jnp.zeros(shape, np.uint32),
    fold_in=lambda key, data: key,
    name="unnamed",
)


def test_keys_without_a_registered_name_are_refused_or_left_out(tmp_path: Path) -> None:
    key = jax.random.key(0, impl=UNNAMED)
    assert implementation_name(key) is None
    assert implementation_of(key.dtype) is None
    with pytest.raises(UnsupportedLeafError, match="'@key'"):
        save_pytree({"key": key, "w": 1.0}, tmp_path / "file")
    save_pytree({"key": key, "w": 1.0}, tmp_path / "file", unsupported="skip")
    assert load_pytree(tmp_path / "file") == {"w": 1.0}


def test_keys_without_a_registered_implementation_keep_their_values(tmp_path: Path) -> None:
    key = jax.random.key(0, impl=UNNAMED)
    save_pytree({"w": 1.0}, tmp_path / "file")
    found = load_into_pytree({"key": key, "w": 0.0}, tmp_path / "file")
    assert found["key"] is key
    assert found["w"] == 1.0
    save_pytree({"key": jax.random.key(0), "w": 1.0}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError, match="'@key'"):
        load_into_pytree({"key": key, "w": 0.0}, tmp_path / "file")


def test_the_dtype_of_keys_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = key_dtype("rbg")

    def trace(*arguments: object) -> NoReturn:
        pytest.fail("a dtype was traced twice")

    monkeypatch.setattr(jax, "eval_shape", trace)
    assert key_dtype("rbg") is found


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_are_saved_and_loaded_while_transfers_are_guarded(tmp_path: Path, impl: str) -> None:
    key = jax.random.key(1, impl=impl)
    with jax.transfer_guard("disallow"):
        save_pytree({"key": key}, tmp_path / "file")
        found = load_into_pytree({"key": key}, tmp_path / "file")
    assert found["key"].dtype == key.dtype
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(key)).all()


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(UnknownHere) as caught:
        key_shape("other", "@k")
    reason = (
        "is a key of the PRNG implementation 'other', which this process does not know; "
        "register it, or install a newer JAX"
    )
    assert str(caught.value) == f"'@k' {reason}"
    assert caught.value.reason == reason


def test_the_implementation_of_keys_is_found_by_their_dtype() -> None:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        assert implementation_of(jax.random.key(0, impl=name).dtype) == name

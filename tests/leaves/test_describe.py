"""How leaves are stored: which have tensors, and which are in the note."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import UnsupportedLeafError, load_pytree, save_pytree
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.jax_versions import ShapeDtypeStruct, structs_are_weak


@pytest.mark.parametrize(
    "value", [0, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**62, -(2**62) - 1]
)
def test_an_int_of_64_bits_has_a_tensor_and_a_larger_one_is_in_the_note(value: int) -> None:
    [info] = describe([value])
    assert info is not None
    fits = np.iinfo(np.int64).min <= value <= np.iinfo(np.int64).max
    assert (info.dtype, info.kind) == (("I64", "int") if fits else ("", ["int", hex(value)]))


@pytest.mark.skipif(not structs_are_weak(), reason="this JAX has no weak types of structs")
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "int4"])
def test_a_weak_type_that_no_python_number_has_is_not_noted(name: str) -> None:
    dtype = jnp.dtype(name)
    struct = ShapeDtypeStruct((), dtype, weak_type=True)
    compiled: Any = jax.jit(lambda x: x).lower(struct).compile()
    weak = compiled(jnp.ones((), dtype))
    assert weak.aval.weak_type
    file = io.BytesIO()
    save_pytree({"a": weak}, file)
    file.seek(0)
    found = load_pytree(file)["a"]
    assert (found.dtype, found.aval.weak_type) == (dtype, False)
    assert np.asarray(found).tobytes() == np.asarray(weak).tobytes()


def test_a_weak_type_of_an_array_with_axes_is_not_noted() -> None:
    weak: Any = jnp.full((3,), 0.5)
    assert weak.aval.weak_type
    assert describe([weak]) == describe([np.full((3,), 0.5, np.float32)])


@pytest.mark.parametrize(
    ("leaf", "kind"), [(2**63, ["int", "0x8000000000000000"]), ("text", ["str", "text"])]
)
def test_what_the_note_holds_has_no_tensor(leaf: Any, kind: list[str]) -> None:
    assert describe([leaf]) == [TensorInfo("", (), 0, kind)]


def test_a_str_of_two_surrogate_halves_is_refused() -> None:
    with pytest.raises(UnsupportedLeafError):
        save_pytree("\ud83d\ude00", io.BytesIO())
    file = io.BytesIO()
    save_pytree(["\ud83d", "\U0001f600"], file)
    file.seek(0)
    assert load_pytree(file) == ["\ud83d", "\U0001f600"]

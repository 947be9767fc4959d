"""How leaves are stored: which have tensors, and which are in the note."""

import numpy as np
import pytest

from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.spec import LeafSpec


@pytest.mark.parametrize(
    "value", [0, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**62, -(2**62) - 1]
)
def test_an_int_of_64_bits_has_a_tensor_and_a_larger_one_is_in_the_note(value: int) -> None:
    [info] = describe([value])
    assert info is not None
    fits = np.iinfo(np.int64).min <= value <= np.iinfo(np.int64).max
    assert (info.dtype, info.kind) == (("I64", "int") if fits else ("", ["int", hex(value)]))


def test_an_array_is_strongly_typed_unless_something_else_is_said() -> None:
    assert not LeafSpec("array", np.dtype(np.float32), ()).weak

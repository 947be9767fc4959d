"""Which Python scalars a dtype can hold."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pytree2safetensors import WeightsMismatchError, set_weights
from pytree2safetensors._leaves.cast import holds_value


@pytest.mark.parametrize(("value", "dtype"), [(256, "u1"), (-1, "u4"), (2**63, "i8")])
@pytest.mark.filterwarnings("ignore:NumPy will stop allowing conversion:DeprecationWarning")
def test_an_integer_that_would_wrap_does_not_fit(value: int, dtype: str) -> None:
    assert not holds_value(np.dtype(dtype), value)  # NumPy 1 wraps it, with a warning since 1.24


def test_infinity_fits_no_dtype_without_one() -> None:
    template = {"a": np.zeros((), ml_dtypes.float8_e4m3b11fnuz)}
    with pytest.raises(WeightsMismatchError):
        set_weights(template, {"@a": float("inf")})
    assert np.isinf(set_weights({"a": np.zeros((), np.float32)}, {"@a": float("inf")})["a"])
    assert np.isnan(set_weights({"a": np.zeros((), np.float32)}, {"@a": float("nan")})["a"])


def test_a_huge_int_is_no_float() -> None:
    with pytest.raises(WeightsMismatchError):
        set_weights({"a": 0.0}, {"@a": 10**400}, cast=True)
    assert set_weights({"a": 0.0}, {"@a": 3}, cast=True) == {"a": 3.0}


RANGES = [
    (jnp.int32(0), 2**40, "int32[]", "int (1099511627776), which int32 cannot hold"),
    (np.uint8(0), -1, "uint8[]", "int (-1), which uint8 cannot hold"),
    (np.float32(0), 1e300, "float32[]", "float (1e+300), which float32 cannot hold"),
    (jnp.int32(0), 10**6000, "int32[]", "int (an int of 6,001 digits), which int32 cannot hold"),
]  # fmt: skip


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(("leaf", "value", "wanted", "stored"), RANGES, ids=range(len(RANGES)))
def test_a_value_out_of_range_is_the_reason(
    leaf: Any, value: float, wanted: str, stored: str, cast: bool
) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": leaf}, {"@a": value}, cast=cast)
    reason = f"'@a': the template has {wanted}, but the stored leaf is a Python {stored}"
    assert caught.value.mismatched == (reason,)


# Dtypes without infinity: the largest number, one that is rounded to it, and one that is beyond.
SATURATING = [
    ("float4_e2m1fn", 6.0, 6.5, 7.0),
    ("float6_e2m3fn", 7.5, 7.6, 7.75),
    ("float6_e3m2fn", 28.0, 29.0, 30.0),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "largest", "rounded", "beyond"), SATURATING)
def test_a_dtype_without_infinity_has_a_range(
    name: str, largest: float, rounded: float, beyond: float, sign: int
) -> None:
    if not hasattr(ml_dtypes, name):
        pytest.skip("this ml_dtypes does not have it")
    leaf = np.zeros((), getattr(ml_dtypes, name))
    for value in (largest, rounded):
        assert float(set_weights({"a": leaf}, {"@a": sign * value})["a"]) == sign * largest
    for value in (beyond, 1e300, 10**400):
        with pytest.raises(WeightsMismatchError, match=f"which {name} cannot hold"):
            set_weights({"a": leaf}, {"@a": sign * value}, cast=True)


def test_a_complex_number_of_any_size_fits() -> None:
    value = complex(1.5e308, -1.5e308)  # its absolute value is not finite
    assert set_weights({"a": np.complex128(0)}, {"@a": value}) == {"a": value}


@pytest.mark.parametrize(
    ("cast", "why"), [(False, ""), (True, ", which cast=True does not convert")]
)
def test_a_value_of_another_kind_is_not_called_too_large(cast: bool, why: str) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": np.int32(1)}, {"@a": 1.5}, cast=cast)
    reason = "'@a': the template has int32[], but the stored leaf is a Python float (1.5)"
    assert caught.value.mismatched == (reason + why,)


def test_an_int_may_be_too_large_for_a_float() -> None:
    with pytest.raises(
        WeightsMismatchError, match=r"401 digits\), which a Python float cannot hold\n"
    ):
        set_weights({"a": 1.5}, {"@a": 10**400}, cast=True)

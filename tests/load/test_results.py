"""What a leaf of a template becomes, from files and from dictionaries."""

from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    Rule,
    WeightsMismatchError,
    _messages,
    load_into_pytree,
    load_pytree,
    save_pytree,
    set_weights,
)
from pytree2safetensors._format.tensor import NOTED_DTYPES, NUMPY

Struct: Any = jax.ShapeDtypeStruct
WIDE = np.array([1.0, 1 + 2.0**-50])  # not what float32 holds
KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


def from_file(template: Any, tree: Any, path: Path, **options: Any) -> Any:
    save_pytree(tree, path)
    return load_into_pytree(template, path, **options)


def from_dict(template: Any, tree: Any, path: Path, **options: Any) -> Any:
    return set_weights(template, {f"@{name}": leaf for name, leaf in tree.items()}, **options)


@pytest.fixture(params=[from_file, from_dict])
def load(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.filterwarnings("ignore:JAX does not support the dtypes")
def test_64_bits_stay_numpys_without_x64(load: Any, tmp_path: Path) -> None:
    found = load({"a": Struct((2,), np.float64)}, {"a": WIDE}, tmp_path / "file")["a"]
    assert type(found) is np.ndarray
    assert found.dtype == np.float64
    assert found.tobytes() == WIDE.tobytes()
    assert not np.shares_memory(found, WIDE)


@pytest.mark.filterwarnings("ignore:JAX does not support the dtypes")
def test_an_array_of_jax_is_cast_to_64_bits_by_numpy() -> None:
    found = set_weights(
        {"a": Struct((2,), np.float64)}, {"@a": jnp.ones(2, jnp.float32)}, cast=True
    )["a"]
    assert (type(found), found.dtype) == (np.ndarray, np.float64)


def test_what_jax_cannot_hold_is_a_warning_that_names_it(tmp_path: Path) -> None:
    save_pytree({"a": WIDE, "b": KERNEL}, tmp_path / "file")
    template = {"a": Struct((2,), np.float64), "b": Struct((2, 3), np.float32)}
    with pytest.warns(
        UserWarning, match="does not support the dtypes of some leaves here"
    ) as caught:
        load_into_pytree(template, tmp_path / "file")
    assert [warning.filename for warning in caught] == [__file__]  # the caller of the package
    assert "'@a'" in str(caught[0].message)
    assert "'@b'" not in str(caught[0].message)


def test_a_warning_gives_dtypes_of_the_template_and_names_python_scalars(tmp_path: Path) -> None:
    save_pytree({"a": KERNEL, "b": 3}, tmp_path / "file")
    template = {"a": Struct((2, 3), np.float64), "b": Struct((), np.int64)}
    with pytest.warns(UserWarning, match="does not support the dtypes") as caught:
        found = load_into_pytree(template, tmp_path / "file", cast=True)
    assert {type(leaf) for leaf in found.values()} == {np.ndarray}
    (message,) = (str(warning.message) for warning in caught)
    assert "'@a' (float64)" in message
    assert "'@b' (int64)" in message


@pytest.mark.parametrize("package", ["pytree2safetensors", "jaxtyping", "beartype", "another"])
def test_a_warning_names_the_caller_of_the_package_and_its_type_checks(
    package: str, tmp_path: Path
) -> None:
    save_pytree(WIDE, tmp_path / "file")
    between: dict[str, Any] = {"__name__": f"{package}.module"}
    exec(compile("def call(load, path): return load(path)", "between", "exec"), between)
    with pytest.warns(UserWarning, match="does not support the dtypes") as caught:
        between["call"](load_pytree, tmp_path / "file")
    expected = "between" if package == "another" else __file__
    assert [warning.filename for warning in caught] == [expected]


def test_scalars_of_numpy_and_python_stay_what_they_are(load: Any, tmp_path: Path) -> None:
    template = {"f": np.float32(0), "i": np.int8(0), "p": 0.0, "b": False, "a": np.zeros(())}
    tree = {"f": np.float32(1.5), "i": np.int8(-3), "p": 2.5, "b": True, "a": np.ones(())}
    found = load(template, tree, tmp_path / "file")
    assert {name: type(leaf) for name, leaf in found.items()} == {
        "f": np.float32, "i": np.int8, "p": float, "b": bool, "a": np.ndarray,
    }  # fmt: skip
    assert found == tree


def test_an_int_becomes_a_float32_without_a_float64_in_between(load: Any, tmp_path: Path) -> None:
    number = 2**60 + 2**36 + 1  # float64 rounds it to the middle of two numbers of float32
    found = load({"a": np.float32(0)}, {"a": number}, tmp_path / "file", cast=True)["a"]
    assert int(found) == 2**60 + 2**37


KINDS = [  # cast=True converts to the same kind or a later one
    ["bool"],
    ["uint1", "uint2", "uint4", "uint8", "uint16", "uint32", "uint64"],
    ["int1", "int2", "int4", "int8", "int16", "int32", "int64"],
    ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3",
     "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
     "float8_e8m0fnu", "bfloat16", "float16", "float32", "float64"],
    ["complex64", "complex128"],
]  # fmt: skip


def dtype_of(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name, name))


def known(names: Any) -> list[str]:
    """The dtypes that the installed ml_dtypes has."""
    return [name for name in names if name in np.sctypeDict or hasattr(ml_dtypes, name)]


def test_the_kinds_of_dtypes_are_those_of_files() -> None:
    assert {*chain(*KINDS)} == {*NUMPY.values(), *NOTED_DTYPES, "complex128"}


@pytest.mark.parametrize(
    ("kind", "stored"), [(kind, name) for kind in range(5) for name in known(KINDS[kind])]
)
def test_cast_converts_to_the_same_kind_or_a_later_one(kind: int, stored: str) -> None:
    for other, names in enumerate(KINDS):
        template = {n: np.zeros(2, dtype_of(n)) for n in known(names) if n != stored}
        ones = np.ones(2).astype(dtype_of(stored))
        given = {f"@{name}": ones for name in template}
        if kind <= other:
            found = set_weights(template, given, cast=True)
            dtypes = {name: leaf.dtype.name for name, leaf in found.items()}
            assert dtypes == {name: name for name in template}
            # The only int1 that is not 0 is -1.
            assert all((leaf == 1).all() for n, leaf in found.items() if "int1" not in {n, stored})
        else:
            with pytest.raises(WeightsMismatchError) as caught:
                set_weights(template, given, cast=True)
            assert len(caught.value.mismatched) == len(template)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (np.int64(2**40), "int32", 0),
        (np.uint8(200), "int8", -56),
        (np.float32(1e9), "float16", np.inf),
    ],
)
def test_values_that_do_not_fit_are_cast_as_numpy_does(
    value: Any, dtype: str, expected: float, load: Any, tmp_path: Path
) -> None:
    template = {"a": np.zeros(2, dtype_of(dtype))}
    found = load(template, {"a": np.full(2, value)}, tmp_path / "file", cast=True)["a"]
    assert found.tolist() == [expected] * 2


@pytest.mark.parametrize(("value", "dtype"), [(2**40, "int32"), (200, "int8"), (1e9, "float16")])
def test_a_python_scalar_that_does_not_fit_is_not_cast(
    value: Any, dtype: str, load: Any, tmp_path: Path
) -> None:
    with pytest.raises(WeightsMismatchError, match="1 mismatched"):
        load({"a": np.zeros((), dtype)}, {"a": value}, tmp_path / "file", cast=True)


def test_an_array_of_jax_becomes_a_scalar_of_numpy() -> None:
    found = set_weights({"a": np.float32(0)}, {"@a": jnp.asarray(1.5, jnp.float32)})["a"]
    assert (type(found), found) == (np.float32, 1.5)


def test_rearranged_leaves_of_numpy_are_contiguous_and_their_own(load: Any, tmp_path: Path) -> None:
    for template in ({"a": np.zeros((3, 2), np.float32)}, {"a": jnp.zeros((3, 2))}):
        rename = [Rule("@a", "@a", "o i -> i o")]
        found = load(template, {"a": KERNEL}, tmp_path / "file", rename=rename)["a"]
        assert type(found) is type(template["a"])
        assert np.array_equal(found, KERNEL.T)
        if isinstance(found, np.ndarray):
            assert found.flags.c_contiguous
            assert not np.shares_memory(found, KERNEL)


def test_keys_come_back_from_their_data(load: Any, tmp_path: Path) -> None:
    key = jax.random.key(3)
    found = load({"k": jax.random.key(0)}, {"k": key}, tmp_path / "file")["k"]
    assert jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key)  # type: ignore[attr-defined] # public, and not exported
    assert jax.random.key_data(found).tolist() == jax.random.key_data(key).tolist()


@pytest.mark.parametrize("leaf", [object(), np.ma.MaskedArray(KERNEL), len])
def test_a_leaf_that_is_not_data_is_named(leaf: Any, load: Any, tmp_path: Path) -> None:
    hint = r"unexpected .*\n    '@a' \(the template has no array and no number there\)\n    '@b'\n"
    with pytest.raises(WeightsMismatchError, match=hint):
        load({"a": leaf}, {"a": KERNEL, "b": KERNEL}, tmp_path / "file")


@pytest.mark.parametrize("list_", ["missing", "unexpected", "mismatched"])
def test_a_long_list_of_mismatches_is_cut(list_: str) -> None:
    names = [f"w{n:03}" for n in range(_messages._LISTED + 5)]
    leaves = {name: np.zeros(2) for name in names}
    template = {} if list_ == "unexpected" else dict(leaves)
    given = {} if list_ == "missing" else {f"@{name}": np.zeros(3) for name in names}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({**template, "a": 0}, {**given, "@a": 1})
    text = str(caught.value)
    assert f"{len(names)} {list_}" in text
    shown = [name for name in names if f"'@{name}'" in text]
    assert shown == names[: _messages._LISTED]


@pytest.mark.parametrize("count", [_messages._LISTED, _messages._LISTED + 1])
def test_a_list_says_how_many_more_there_are_if_there_are_more(count: int) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": 0}, {"@a": 1} | {f"@b{n}": 2 for n in range(count)})
    more = [line for line in str(caught.value).splitlines() if "..." in line]
    assert more == ["    ... and 1 more"] * (count - _messages._LISTED)


@pytest.mark.parametrize(("count", "more"), [(20, ""), (21, " and 1 more")])
def test_the_warning_names_twenty_leaves(count: int, more: str, tmp_path: Path) -> None:
    save_pytree([WIDE] * count, tmp_path / "file")
    with pytest.warns(UserWarning, match=f"{more or '.'}. Enable jax_enable_x64") as caught:
        load_pytree(tmp_path / "file")
    assert str(caught[0].message).count("(float64)") == 20
    assert (" more" in str(caught[0].message)) is bool(more)


def test_data_of_keys_fits_a_key_of_its_shape(load: Any, tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    data = jax.random.key_data(keys)
    found = load({"k": keys}, {"k": data}, tmp_path / "file")["k"]
    assert jax.random.key_data(found).tolist() == data.tolist()
    for wrong in (data[0], data[:3], data.astype(np.int32)):
        with pytest.raises(WeightsMismatchError, match=r"the template has .*key"):
            load({"k": keys}, {"k": wrong}, tmp_path / "file")


@pytest.mark.parametrize(
    ("leaf", "stored", "fits"),
    [
        (np.zeros((), np.uint8), 255, True),
        (np.zeros((), np.uint8), 256, False),
        (np.zeros((), np.uint8), -1, False),
        (np.zeros((), np.int8), -128, True),
        (np.zeros((), np.int8), 128, False),
        (0, np.uint8(7), True),
        (0, np.int8(-7), True),
        (0, np.float32(7), False),
        (0.0, np.float32(7), True),
        (0.0, 7, False),
        (np.zeros((), np.float32), 7, False),
        (False, 1, False),
        (0, True, False),
    ],
)
def test_a_number_fits_a_number_of_its_kind_that_holds_it(
    leaf: Any, stored: Any, fits: bool, load: Any, tmp_path: Path
) -> None:
    if not fits:
        with pytest.raises(WeightsMismatchError, match="1 mismatched"):
            load({"a": leaf}, {"a": stored}, tmp_path / "file")
        return
    found = load({"a": leaf}, {"a": stored}, tmp_path / "file")["a"]
    assert type(found) is type(leaf)
    assert found == stored


def test_cast_to_64_bits_never_narrows() -> None:
    abstract = jax.ShapeDtypeStruct((2,), np.float64)  # type: ignore[no-untyped-call] # JAX gives it no types
    found = set_weights({"w": abstract}, {"@w": jnp.ones(2)}, cast=True)
    assert found["w"].dtype == np.float64


def test_what_is_cast_is_as_weak_as_the_template(tmp_path: Path) -> None:
    save_pytree({"w": jnp.asarray(3)}, tmp_path / "file")
    template = {"w": jnp.zeros((), jnp.float32)}
    found = load_into_pytree(template, tmp_path / "file", cast=True)
    assert_same(found, {"w": jnp.float32(3)})
    assert_same(found, set_weights(template, {"@w": jnp.asarray(3)}, cast=True))
    assert_same(load_into_pytree({"w": jnp.int32(0)}, tmp_path / "file"), {"w": jnp.asarray(3)})

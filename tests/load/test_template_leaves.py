"""What the leaves of a template need. Each case was a bug, or no other test would notice one."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hostile import file, tensor
from oracle import assert_same
from pytree2safetensors import (
    UnsupportedLeafError,
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves import spec

Struct: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped


class Foreign:
    """An array of another library, as far as attributes go."""

    shape = (2,)
    dtype = np.dtype(np.float32)

    def __init__(self, name: str) -> None:
        self.name = name


def foreign(method: str) -> Any:
    kind = type("Foreign", (Foreign,), {method: lambda self, *_: np.zeros(2, np.float32)})
    return kind("theirs")


@pytest.mark.parametrize("method", ["__array__", "__dlpack__", "__jax_array__"])
def test_an_array_of_another_library_is_no_abstract_array(method: str, tmp_path: Path) -> None:
    theirs = foreign(method)
    save_pytree({"w": np.ones(2, np.float32)}, tmp_path / "file")
    template = {"theirs": theirs, "w": np.zeros(2, np.float32)}
    found = load_into_pytree(template, tmp_path / "file")
    assert found["theirs"] is theirs
    assert found["w"].tolist() == [1, 1]
    assert set_weights(template, {"@w": np.ones(2, np.float32)})["theirs"] is theirs


@pytest.mark.parametrize("method", ["__array__", "__dlpack__", "__jax_array__"])
def test_skip_leaves_out_no_array_of_another_library(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="another object that holds an array"):
        save_pytree({"w": foreign(method)}, tmp_path / "file", unsupported="skip")
    assert not (tmp_path / "file").exists()


class Variable:
    """A mutable parameter that is no pytree node."""

    def __init__(self, value: Any) -> None:
        self.value = value


def test_skip_leaves_out_no_variable_that_holds_an_array(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="another object that holds an array"):
        save_pytree({"w": Variable(jnp.ones(3))}, tmp_path / "file", unsupported="skip")
    save_pytree({"w": Variable("text"), "f": print, "a": 1}, tmp_path / "file", unsupported="skip")
    assert load_pytree(tmp_path / "file") == {"a": 1}


def test_a_packed_tensor_under_the_name_of_a_function_stops_no_lenient_load(
    tmp_path: Path,
) -> None:
    content = file({"@f": tensor("F4", [4], 0, 2), "@w": tensor("F32", [1], 2, 6)}, bytes(6))
    (tmp_path / "file").write_bytes(content)
    template: dict[str, Any] = {"f": print, "w": np.ones(1, np.float32)}
    found = load_into_pytree(template, tmp_path / "file", strict=False)
    assert found["f"] is print
    assert found["w"].tolist() == [0]
    with pytest.raises(WeightsMismatchError, match="1 unexpected"):
        load_into_pytree({"f": print, "w": np.ones(1, np.float32)}, tmp_path / "file")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: memory")])
def test_a_passing_failure_says_nothing_of_a_dtype(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"w": jnp.ones(2, jnp.bfloat16)}
    save_pytree(tree, tmp_path / "file")
    spec._holds.cache_clear()
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> Any:
            raise error

        patch.setattr(jax, "device_put", fail)
        with pytest.raises(type(error)):
            load_pytree(tmp_path / "file")
    assert_same(load_pytree(tmp_path / "file"), tree)


def test_a_device_layout_that_a_template_asks_for_is_given(tmp_path: Path) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    if not hasattr(layouts, "Format"):
        pytest.skip("this JAX has no Format")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = layouts.Format(layouts.Layout((1, 0)), sharding)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_pytree({"w": values}, tmp_path / "file")
    found = load_into_pytree({"w": Struct((2, 3), np.float32, sharding=layout)}, tmp_path / "file")
    assert found["w"].format.layout.major_to_minor == (1, 0)
    assert np.asarray(found["w"]).tobytes() == values.tobytes()


SCALARS: list[tuple[Any, Any]] = [
    (3, np.float32(0)),
    (True, 0.0),
    (jnp.ones((), jnp.int32), 0.0),
    (2.0, np.uint8(0)),
    (True, np.uint8(0)),
    (2.5, 0),
    (1j, 0.0),
]


@pytest.mark.parametrize(("stored", "template"), SCALARS, ids=repr)
def test_without_cast_numbers_of_another_kind_do_not_fit(
    stored: Any, template: Any, tmp_path: Path
) -> None:
    save_pytree({"a": stored}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError, match="1 mismatched"):
        load_into_pytree({"a": template}, tmp_path / "file")


@pytest.mark.parametrize("template", [0j, 0.0, np.complex64(0), jnp.ones((), jnp.complex64)])
@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_an_int_that_a_dtype_cannot_hold_is_a_mismatch(
    template: Any, number: int, tmp_path: Path
) -> None:
    save_pytree({"a": number}, tmp_path / "file")
    for cast in (False, True):
        with pytest.raises(WeightsMismatchError, match="1 mismatched"):
            load_into_pytree({"a": template}, tmp_path / "file", cast=cast)
        with pytest.raises(WeightsMismatchError, match="1 mismatched"):
            set_weights({"a": template}, {"@a": number}, cast=cast)


def test_files_of_others_fit_by_dtype_alone(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"@a": np.ones(2, np.int32)}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError, match="1 mismatched"):
        load_into_pytree({"a": np.ones(2, np.float32)}, tmp_path / "file")
    found = load_into_pytree({"a": np.ones(2, np.float32)}, tmp_path / "file", cast=True)
    assert found["a"].dtype == np.float32


def test_what_is_converted_is_weak_only_if_the_template_decides() -> None:
    template: Any = jnp.asarray(0.0)
    assert template.weak_type
    file = io.BytesIO()
    save_pytree(np.int32(1), file)
    file.seek(0)
    assert not load_into_pytree(template, file, cast=True).weak_type
    assert set_weights(template, {"": np.int32(1)}, cast=True).weak_type

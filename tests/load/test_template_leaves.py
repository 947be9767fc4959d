"""What the leaves of a template need. Each case was a bug, or no other test would notice one."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hostile import file, tensor
from oracle import assert_same
from pytree2safetensors import (
    Rule,
    UnsupportedLeafError,
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves import spec

Struct: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types


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
    found = load_into_pytree(template, tmp_path / "file", strict=False)
    assert found["theirs"] is theirs
    assert found["w"].tolist() == [1, 1]
    given = {"@w": np.ones(2, np.float32)}
    assert set_weights(template, given, strict=False)["theirs"] is theirs


@pytest.mark.parametrize("method", ["__array__", "__dlpack__", "__jax_array__"])
def test_skip_leaves_out_no_array_of_another_library(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="the array that a Ref or another object holds"):
        save_pytree({"w": foreign(method)}, tmp_path / "file", unsupported="skip")
    assert not (tmp_path / "file").exists()


class Variable:
    """A mutable parameter that is not a pytree node."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("value", [jnp.ones(3), {"array": np.ones(3)}])
def test_skip_leaves_out_no_variable_that_holds_an_array(value: object, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedLeafError, match=r"as a pytree node, .* or save its arrays instead"
    ):
        save_pytree({"w": Variable(value)}, tmp_path / "file", unsupported="skip")
    assert not (tmp_path / "file").exists()


def test_skip_leaves_out_other_variables(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    values = {"text": "text", "cycle": cycle, "keys": {1: "", "a": ""}}
    tree = {name: Variable(value) for name, value in values.items()}
    save_pytree({"f": print, "a": 1, **tree}, tmp_path / "file", unsupported="skip")
    assert load_pytree(tmp_path / "file") == {"a": 1}


class Secretive:
    """An object whose attributes cannot be read."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


def test_an_object_whose_attributes_cannot_be_read_is_no_array(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"a": np.ones(2, np.float32), "secret": Secretive()}
    with pytest.raises(UnsupportedLeafError, match=f"'@secret': {__name__}.Secretive\n"):
        save_pytree(tree, tmp_path / "file")
    save_pytree(tree, tmp_path / "file", unsupported="skip")
    found = load_into_pytree(tree, tmp_path / "file")
    assert found["a"].tolist() == [1, 1]
    assert found["secret"] is tree["secret"]


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
    spec._jax_holds.cache_clear()
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> Any:
            raise error

        patch.setattr(jax, "device_put", fail)
        with pytest.raises(type(error)):
            load_pytree(tmp_path / "file")
    assert_same(load_pytree(tmp_path / "file"), tree)


def test_a_device_layout_that_a_template_asks_for_is_given(tmp_path: Path) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    if not hasattr(getattr(layouts, "Format", None), "layout"):
        pytest.skip("this JAX has no Format, or one of another kind")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = layouts.Format(layouts.Layout((1, 0)), sharding)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_pytree({"w": values}, tmp_path / "file")
    template = {"w": Struct((2, 3), np.float32, sharding=layout)}
    arrays = [values, jnp.asarray(values), jax.device_put(values, jax.devices()[1])]
    halves = {"w.0": values[0], "w.1": jnp.asarray(values[1])}
    for found in (
        load_into_pytree(template, tmp_path / "file"),
        *(set_weights(template, {"@w": array}) for array in arrays),
        set_weights(template, halves, rename=[Rule("w.{l}", "@w", "a -> l a")]),
        set_weights(template, {"@w": values.astype(np.float16)}, cast=True),
    ):
        assert found["w"].sharding == sharding
        assert found["w"].format.layout.major_to_minor == (1, 0)
        assert np.asarray(found["w"]).tobytes() == values.tobytes()


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh") or not hasattr(jax.sharding, "get_mesh"),
    reason="this JAX has no mesh in force",
)
def test_a_device_layout_may_be_on_an_abstract_mesh(tmp_path: Path) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh: Any = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    spec = jax.sharding.PartitionSpec("a", "b")  # type: ignore[no-untyped-call] # JAX gives it no types
    layout = layouts.Format(
        layouts.Layout((1, 0)), jax.sharding.NamedSharding(mesh.abstract_mesh, spec)
    )
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    save_pytree({"w": values}, tmp_path / "file")
    template = {"w": Struct((8, 4), np.float32, sharding=layout)}
    with jax.set_mesh(mesh):
        for found in (
            load_into_pytree(template, tmp_path / "file"),
            set_weights(template, {"@w": values}),
        ):
            assert found["w"].sharding == jax.sharding.NamedSharding(mesh, spec)
            assert found["w"].format.layout.major_to_minor == (1, 0)
            assert np.asarray(found["w"]).tobytes() == values.tobytes()
    traced = jax.jit(lambda value: set_weights(template, {"@w": value})["w"])
    assert np.asarray(traced(values)).tobytes() == values.tobytes()


def test_an_empty_array_keeps_its_shards_whatever_its_device_layout(tmp_path: Path) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    if not hasattr(getattr(layouts, "Format", None), "layout"):
        pytest.skip("this JAX has no Format, or one of another kind")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))  # type: ignore[no-untyped-call] # JAX gives it no types
    layout = layouts.Format(layouts.Layout((1, 0)), sharding)
    values = np.zeros((4, 0), np.float32)
    save_pytree({"w": values}, tmp_path / "file")
    template = {"w": Struct((4, 0), np.float32, sharding=layout)}
    for found in (
        load_into_pytree(template, tmp_path / "file"),
        set_weights(template, {"@w": values}),
    ):
        assert found["w"].sharding == sharding
        assert {shard.data.shape for shard in found["w"].addressable_shards} == {(1, 0)}


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


def test_a_large_int_becomes_a_scalar_of_the_class_of_the_template(tmp_path: Path) -> None:
    save_pytree({"a": 2**64 - 1}, tmp_path / "file")
    for found in (
        load_into_pytree({"a": np.uint64(0)}, tmp_path / "file"),
        set_weights({"a": np.uint64(0)}, {"@a": 2**64 - 1}),
    ):
        assert type(found["a"]) is np.uint64
        assert found["a"] == 2**64 - 1


def test_files_of_other_programs_are_compared_by_dtype(tmp_path: Path) -> None:
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


# Some are newer than the oldest JAX.
IMPLEMENTATIONS = ["threefry2x32", "threefry4x32", "rbg", "unsafe_rbg", "philox2x32", "philox4x32"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_keys_of_every_implementation_that_jax_has(impl: str, tmp_path: Path) -> None:
    try:
        keys = jax.random.split(jax.random.key(1, impl=impl))
    except ValueError:
        pytest.skip(f"this JAX has no {impl}")
    save_pytree({"k": keys}, tmp_path / "file")
    for leaf in (keys, Struct((2,), keys.dtype)):
        assert_same(load_into_pytree({"k": leaf}, tmp_path / "file"), {"k": keys})
        assert_same(set_weights({"k": leaf}, {"@k": keys}), {"k": keys})


def test_keys_of_an_implementation_without_a_name_are_kept(tmp_path: Path) -> None:
    unnamed = jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.full(2, seed, jnp.uint32),
        split=lambda key, shape: jnp.zeros((*shape, 2), jnp.uint32),
        random_bits=lambda key, width, shape: jnp.zeros(shape, jnp.uint32),
        fold_in=lambda key, data: key,
        name="unnamed",
        tag="unnamed",
    )
    keys = jax.random.key(1, impl=unnamed)
    save_pytree({"k": keys, "w": 1.0}, tmp_path / "file", unsupported="skip")
    found = load_into_pytree({"k": keys, "w": 0.0}, tmp_path / "file")
    assert found["k"] is keys
    assert found["w"] == 1.0


@pytest.mark.parametrize(
    ("stored", "wanted", "fits"),
    [
        ("uint4", "int4", True),
        ("int4", "uint4", False),
        ("int4", "int32", True),
        ("uint8", "int4", True),
        ("int4", "bfloat16", True),
        ("bfloat16", "int4", False),
        ("float8_e4m3fn", "int32", False),
    ],
)
def test_dtypes_of_ml_dtypes_have_ranks_as_those_of_numpy(
    stored: str, wanted: str, fits: bool, tmp_path: Path
) -> None:
    save_pytree({"a": jnp.ones(2, stored)}, tmp_path / "file")
    template = {"a": jnp.zeros(2, wanted)}
    if fits:
        found = load_into_pytree(template, tmp_path / "file", cast=True)
        assert_same(found, {"a": jnp.ones(2, wanted)})
    else:
        with pytest.raises(WeightsMismatchError, match="which cast=True does not convert"):
            load_into_pytree(template, tmp_path / "file", cast=True)


class Shaped:
    """A leaf with some attributes of an array."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize("attributes", [{"shape": ()}, {"shape": [], "dtype": np.dtype("f4")}])
def test_a_leaf_without_a_dtype_or_a_tuple_as_its_shape_is_no_data(
    attributes: dict[str, Any],
) -> None:
    leaf = Shaped(**attributes)
    assert set_weights({"a": leaf, "w": 1.0}, {"@w": 2.0}) == {"a": leaf, "w": 2.0}


def test_only_what_says_so_is_weak() -> None:
    given = {"@w": np.float32(2)}
    template: Any = {"w": Shaped(shape=(), dtype=np.dtype(np.float32))}
    assert not set_weights(template, given)["w"].weak_type
    traced = jax.jit(lambda leaf: set_weights({"w": leaf}, given)["w"])
    assert traced(1.0).weak_type
    assert not traced(np.float32(1)).weak_type


@pytest.mark.parametrize(
    "leaf", [np.array(["text"]), np.datetime64("2026-01-01"), np.array([None])]
)
def test_what_numpy_holds_and_no_file_can_is_kept(leaf: Any, tmp_path: Path) -> None:
    save_pytree({"w": 1.0}, tmp_path / "file")
    found = load_into_pytree({"kept": leaf, "w": 0.0}, tmp_path / "file")
    assert found["kept"] is leaf
    assert found["w"] == 1.0

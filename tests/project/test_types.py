"""What type checkers must infer about the public names, and what they must refuse.

mypy and pyright read this file: each `assert_type` must hold, and each `type: ignore` must be needed.
Run as tests, the same lines say that the runtime checks refuse what the type checkers refuse.
"""

import io
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import pytest
from hypothesis.strategies import SearchStrategy
from jax.tree_util import DictKey, GetAttrKey

from pytree2safetensors import (
    FileFormatError,
    Key,
    KeyPath,
    KeyPathError,
    Pytree2SafetensorsError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    UnsupportedLeafError,
    WeightsMismatchError,
    dict2pytree,
    keypath2string,
    load_abstract,
    load_file,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
    save_pytree,
    save_pytree_async,
    set_weights,
    string2keypath,
    testing,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: object, _: object) -> object:
        return value


CHECKED = os.environ.get("JAXTYPING_DISABLE", "0") == "0"
refused = pytest.mark.skipif(not CHECKED, reason="the runtime checks are off")


def test_what_spells_and_builds() -> None:
    path = assert_type(string2keypath("layers#0@w"), KeyPath)
    assert_type(path[0], Key)
    assert_type(keypath2string(path), str)
    assert_type(keypath2string((GetAttrKey("layers"), DictKey(3))), str)
    assert_type(pytree2dict({"a": 1}), dict[str, Any])
    assert_type(dict2pytree({"@a": 1}), Any)


def test_containers() -> None:
    container = PyTreeContainer({"weight": 1})
    assert_type(container.weight, Any)
    assert_type(container["__class__" if "__class__" in container else "weight"], Any)
    container.bias = 2
    container["__class__"] = 3
    assert_type(list(container), list[str])
    unkeyed = UnkeyedContainer([1, 2])
    assert_type(unkeyed[0], Any)
    assert_type(len(unkeyed), int)
    PyTreeContainer()


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree = {"a": jax.numpy.zeros(3)}
    assert_type(save_pytree(tree, path, metadata={"by": "me"}, unsupported="skip"), None)
    save_pytree(tree, str(path), durable=False, checksum=True, progress=lambda done, total: None)
    save_pytree(tree, tmp_path / "shards", max_shard_size="5GB")
    save_pytree(tree, tmp_path / "shards", max_shard_size=5_000_000_000)
    save_pytree(tree, io.BytesIO())
    assert_type(save_pytree_async(tree, path), Future[None]).result()
    assert_type(load_pytree(path, prefix="", mmap=True), Any)
    assert_type(load_abstract(str(path)), Any)
    assert_type(load_abstract(path, flat=True), dict[str, Any])
    sharding = jax.numpy.zeros(3).sharding
    load_abstract(path, prefix="@a", sharding=sharding)
    load_abstract(path, sharding=lambda name, struct: sharding if struct.shape else None)
    assert_type(load_metadata(path), dict[str, str])
    assert_type(load_file(path), dict[str, jax.Array])
    assert_type(
        load_into_pytree(tree, path, strict=False, cast=True, rename={"@a": "@a"}),
        dict[str, jax.Array],
    )
    assert_type(load_into_pytree(load_abstract(path), path), Any)
    assert_type(
        set_weights(tree, pytree2dict(tree), rename=lambda name: name), dict[str, jax.Array]
    )


class Layer(NamedTuple):
    weight: jax.Array


def test_loading_keeps_the_type_of_the_template(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    layer = Layer(jax.numpy.zeros(3))
    save_pytree(layer, path)
    assert_type(load_into_pytree(layer, path), Layer)
    assert_type(set_weights(layer, pytree2dict(layer)), Layer)
    assert_type(set_weights(0, {"": 1}), int)


def test_errors() -> None:
    assert_type(WeightsMismatchError.mro(), list[type])
    errors: list[type[Pytree2SafetensorsError]] = [
        KeyPathError,
        TreeStructureError,
        UnsupportedLeafError,
        WeightsMismatchError,
        FileFormatError,
    ]
    wrong_values: list[type[ValueError]] = [
        KeyPathError,
        TreeStructureError,
        WeightsMismatchError,
        FileFormatError,
    ]
    wrong_types: list[type[TypeError]] = [UnsupportedLeafError]
    assert {*wrong_values, *wrong_types} == {*errors}


def test_testing() -> None:
    assert_type(testing.keys(), SearchStrategy[Key])
    assert_type(testing.keypaths(), SearchStrategy[KeyPath])
    assert_type(testing.arrays(), SearchStrategy[Any])
    assert_type(testing.leaves(), SearchStrategy[Any])
    assert_type(testing.pytrees(), SearchStrategy[Any])
    check: Callable[[object], None] = testing.assert_round_trips
    check({"a": 1})


@refused
def test_arguments_of_other_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    with pytest.raises(TypeError):
        dict2pytree([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_pytree({}, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_pytree({}, path, metadata={"step": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        save_pytree({}, path, unsupported="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_pytree({}, path, max_shard_size=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_pytree_async({}, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        load_pytree(path, prefix=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        load_abstract([path])  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        load_abstract(path, sharding="x")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        load_into_pytree({}, path, unexpected="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        load_metadata(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        load_into_pytree({}, path, cast="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        set_weights({}, {1: 2})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        set_weights({}, {}, rename="layers")  # type: ignore[arg-type]
    assert not path.exists()


def test_options_are_keyword_only(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    with pytest.raises(TypeError):
        save_pytree({}, path, {})  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        load_pytree(path, "")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        load_into_pytree({}, path, True, True)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        set_weights({}, {}, True, True)  # type: ignore[call-arg]


def test_key_paths_and_strings_are_not_mixed_up() -> None:
    # Outside of tests there is no runtime type check of the keys, only a message of our own.
    with pytest.raises(TypeError if CHECKED else KeyPathError):
        keypath2string(("layers",))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        keypath2string(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        string2keypath(b"layers")  # type: ignore[arg-type]

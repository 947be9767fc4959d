"""`load_abstract`: a tree, or on request a flat dict, with shapes and dtypes for arrays."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from oracle import assert_same, assert_same_values
from pytree2safetensors import (
    KeyPathError,
    PyTreeContainer,
    Rule,
    TreeStructureError,
    WeightsMismatchError,
    load_abstract,
    load_into_pytree,
    pytree2dict,
    save_pytree,
)
from pytree2safetensors._load.shardings import misplaced

Spec: Any = jax.sharding.PartitionSpec
Struct: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types
HINT = "; pass a function that returns a sharding for each array"


def test_a_function_that_gives_no_sharding_is_named_with_the_leaf(tmp_path: Path) -> None:
    save_pytree({"w": jnp.ones(2)}, tmp_path / "file")
    wrong: Any = lambda name, struct: 3  # noqa: E731 - types forbid it
    with pytest.raises(TypeError) as caught:
        load_abstract(tmp_path / "file", sharding=wrong)
    assert str(caught.value) == (
        "load_abstract: sharding= gives '@w' a value of type builtins.int, but it must give a "
        "jax.sharding.Sharding or None"
    )


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["w.weight", "w.weight.absmax"], TreeStructureError),
        (["blocks.0.w", "blocks#0.w"], TreeStructureError),
        (["a\\b", "#x"], KeyPathError),
        (["", "a"], TreeStructureError),
    ],
)
def test_names_that_make_no_tree_load_flat(
    names: list[str], error: type[ValueError], tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({name: np.zeros((2, place), np.int8) for place, name in enumerate(names)}, path)
    with pytest.raises(error, match=r"load_abstract\(\.\.\., flat=True\) lists them"):
        load_abstract(path)
    found = load_abstract(path, flat=True)
    assert found == {name: Struct((2, place), np.int8) for place, name in enumerate(names)}
    assert list(found) == sorted(names)


def test_a_flat_dict_has_the_leaves_of_the_tree(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "w": [np.zeros(3, np.float16)], "k": jax.random.key(0), "n": 7, "s": "adam", "none": None,
    }  # fmt: skip
    save_pytree(tree, tmp_path / "tree.safetensors")
    flat = load_abstract(tmp_path / "tree.safetensors", flat=True)
    assert flat == pytree2dict(load_abstract(tmp_path / "tree.safetensors"))
    assert (flat["@n"], flat["@s"]) == (7, "adam")


def test_a_prefix_gives_the_subtree(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    save_pytree({"a": [np.zeros(3, np.float16), 7, ()], "b": 1}, path)
    assert load_abstract(path, prefix="@a") == [Struct((3,), np.float16), 7, ()]
    assert load_abstract(path, prefix="@a", flat=True) == {"#0": Struct((3,), np.float16), "#1": 7}
    with pytest.raises(WeightsMismatchError, match="has nothing at the prefix '@c'"):
        load_abstract(path, prefix="@c")


def test_a_file_loads_sharded_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree: dict[str, Any] = {
        "w": jnp.arange(64.0).reshape(16, 4), "b": jnp.ones(4), "k": jax.random.key(1), "step": 7,
        "name": "adam", "lr": 0.5, "none": None, "layer": PyTreeContainer({"w": jnp.ones((8, 2))}),
        "weak": jnp.asarray(1.0), "pair": (True, OrderedDict(z=1, a=2)),
    }  # fmt: skip
    save_pytree(tree, path)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    whole = jax.sharding.NamedSharding(mesh, Spec())
    rows = jax.sharding.NamedSharding(mesh, Spec("x"))
    seen = {}

    def of(name: str, struct: jax.ShapeDtypeStruct) -> jax.sharding.Sharding | None:
        seen[name] = struct
        return rows if len(struct.shape) == 2 else None

    found = load_into_pytree(load_abstract(path, sharding=of), path)
    assert_same(found, tree)
    assert found["w"].sharding == found["layer"].w.sharding == rows
    assert found["b"].sharding == tree["b"].sharding
    assert sorted(seen) == ["@b", "@k", "@layer.w", "@w", "@weak"]
    assert seen["@w"] == Struct((16, 4), np.float32)
    everywhere = load_into_pytree(load_abstract(path, sharding=whole), path)
    assert_same(everywhere, tree)
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(everywhere) if isinstance(leaf, jax.Array)]
    assert {leaf.sharding for leaf in arrays} == {whole}
    below = load_abstract(path, prefix="@layer", sharding=lambda name, _: {"w": rows}[name])
    assert load_into_pytree(below, path, prefix="@layer").w.sharding == rows


def test_names_that_are_split_load_sharded_by_a_rule(tmp_path: Path) -> None:
    tree = {"a.0.w": np.ones(2, np.float32), "a.1.w": np.zeros(2, np.float32)}
    save_file(tree, tmp_path / "file")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    template = load_abstract(tmp_path / "file", separator=".", sharding=place)
    found = load_into_pytree(template, tmp_path / "file", rename=[Rule("{*}", "{*}")])
    assert [leaf.sharding for leaf in jax.tree_util.tree_leaves(found)] == [place, place]
    assert_same_values(np.asarray(found["a"][1]["w"]), tree["a.1.w"])


def test_a_sharding_that_does_not_fit_is_named_with_the_leaf(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_pytree({"w": jnp.ones((8, 2)), "b": jnp.ones(3)}, path)
    rows = jax.sharding.NamedSharding(_mesh(), Spec("x"))
    found = f"load_abstract: sharding= does not fit '@b': (Named)?Sharding.*{HINT}$"
    with pytest.raises(ValueError, match=found):
        load_abstract(path, sharding=rows)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [((), ("x",)), ((), (None,)), ((8,), ("x", None)), ((8,), (None, "x"))],
)
def test_a_sharding_with_more_axes_than_the_array_does_not_fit(
    shape: tuple[int, ...], spec: tuple[str | None, ...], devices: int, tmp_path: Path
) -> None:
    place = jax.sharding.NamedSharding(_mesh(devices), Spec(*spec))
    keys = jax.random.wrap_key_data(jnp.zeros((*shape, 2), jnp.uint32))
    reason = f"the sharding has more axes: {place}"
    for number, leaf in enumerate((np.ones(shape, np.float32), keys)):
        path = tmp_path / str(number)
        save_pytree({"w": np.ones((8, 8), np.float32), "b": leaf}, path)
        for sharding, hint in ((place, HINT), (lambda *_: place, "")):
            with pytest.raises(ValueError, match="does not fit '@b'") as caught:
                load_abstract(path, sharding=sharding)
            found = f"load_abstract: sharding= does not fit '@b': {reason}{hint}"
            assert str(caught.value) == found
    assert misplaced(place, shape) == f"it does not fit the sharding of its template: {reason}"
    assert misplaced(place, (8, 8)) is None


def _mesh(devices: int | None = None) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))


def test_what_a_function_of_shardings_is_called_with(tmp_path: Path) -> None:
    save_pytree({"m": {"a": np.ones(2, np.float32)}}, tmp_path / "file")
    save_file({"m.a": np.ones(2, np.float32)}, tmp_path / "dotted")
    seen: list[str] = []
    cases: list[tuple[str, dict[str, Any]]] = [
        ("file", {}),
        ("file", {"prefix": "@m"}),
        ("file", {"prefix": "@m", "flat": True}),
        ("dotted", {"separator": "."}),
    ]
    for name, options in cases:
        load_abstract(tmp_path / name, sharding=lambda path, _: seen.append(path), **options)
    assert seen == ["@m@a", "@a", "@a", "m.a"]


def test_only_what_was_weak_is_weak(tmp_path: Path) -> None:
    tree = {"k": jax.random.key(0), "strong": np.float32(1), "n": 1.5, "weak": jnp.asarray(1.0)}
    save_pytree(tree, tmp_path / "file")
    found = load_abstract(tmp_path / "file")
    weak = {name for name, leaf in found.items() if getattr(leaf, "weak_type", False)}
    assert weak == ({"weak"} if hasattr(found["k"], "weak_type") else set())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_abstract_keys_have_the_dtype_of_their_implementation(impl: str, tmp_path: Path) -> None:
    key = jax.random.key(0, impl=impl)
    save_pytree({"k": key}, tmp_path / "file")
    found = load_abstract(tmp_path / "file")["k"]
    assert (found.shape, found.dtype) == ((), key.dtype)

"""Every tree of every framework: saved, loaded without a template, and loaded into a new one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.serialization import msgpack_restore, to_bytes

from oracle import assert_same, canonical, identity
from pytree2safetensors import (
    PyTreeContainer,
    Rule,
    UnsupportedLeafError,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
)
from trees import TREES

PLACES = 40  # distinct trees at the least


def test_there_are_many_trees() -> None:
    assert len(TREES) >= PLACES


def save(tree: Any, path: Path) -> dict[str, Any]:
    """Save a tree, and return the leaves that are stored."""
    leaves = pytree2dict(tree)
    try:
        save_pytree(tree, path)
    except UnsupportedLeafError as error:
        unstorable = [name for name in leaves if f"\n  {name!r}: " in str(error)]
        assert 0 < len(unstorable) < len(leaves)
        save_pytree(tree, path, unsupported="skip")
        return {name: leaf for name, leaf in leaves.items() if name not in unstorable}
    return leaves


@pytest.mark.parametrize("name", TREES)
def test_loads_without_a_template(name: str, tmp_path: Path) -> None:
    stored = save(TREES[name](7), tmp_path / "tree.safetensors")
    found = pytree2dict(load_pytree(tmp_path / "tree.safetensors"))
    assert found.keys() == stored.keys()
    for path, leaf in stored.items():
        assert identity(found[path]) == identity(canonical(leaf)), path


@pytest.mark.parametrize("name", TREES)
def test_loads_into_a_fresh_tree(name: str, tmp_path: Path) -> None:
    tree, fresh = TREES[name](7), TREES[name](3)
    stored = save(tree, tmp_path / "tree.safetensors")
    found = load_into_pytree(fresh, tmp_path / "tree.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    leaves = pytree2dict(found)
    for path, leaf in stored.items():
        assert identity(leaves[path]) == identity(leaf), path


@pytest.mark.parametrize("name", TREES)
def test_what_was_loaded_saves_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    save(TREES[name](7), tmp_path / "tree.safetensors")
    loaded = load_pytree(tmp_path / "tree.safetensors")
    save_pytree(loaded, tmp_path / "again.safetensors")
    assert_same(load_pytree(tmp_path / "again.safetensors"), loaded)
    first, second = (tmp_path / f"{n}.safetensors" for n in ("tree", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_containers_stand_for_modules(tmp_path: Path) -> None:
    save(TREES["equinox_mlp"](1), tmp_path / "tree.safetensors")
    assert isinstance(load_pytree(tmp_path / "tree.safetensors"), PyTreeContainer)


def test_a_pure_dict_of_nnx_with_the_data_of_keys_loads_into_a_state(tmp_path: Path) -> None:
    def state(seed: int) -> Any:
        return nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(seed)))

    saved, fresh = state(0), state(1)
    assert any(is_key(leaf) for leaf in jax.tree.leaves(saved))
    pure = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, nnx.to_pure_dict(saved)
    )
    untyped = msgpack_restore(to_bytes(pure))
    save_pytree(untyped, tmp_path / "file", rename=[Rule("{*}", "{*}")])
    found = load_into_pytree(fresh, tmp_path / "file", rename=[Rule("{*}", "{*}.value")])
    assert_same(found, saved)


def is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))

"""Folders of shards that tests save: their trees, their names, and what a reader finds."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp

from oracle import assert_loaded
from pytree2safetensors import FileFormatError, load_pytree
from pytree2safetensors._load import opening

INDEX = "model.safetensors.index.json"


def tree_of(seed: int) -> Any:
    """Four tensors of 64, 64, 40 and 1 bytes, and a note; every seed gives other values."""
    return {
        "a": jnp.full((16,), seed, jnp.float32),
        "b": (jnp.full((16,), -seed, jnp.int32), None),
        "c": jnp.full((10,), seed / 2, jnp.float32),
        "d": bool(seed % 2),
        "e": f"text {seed}",
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard_names(count: int, stem: str = "model") -> list[str]:
    return [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def is_same(tree: Any, found: Any) -> bool:
    try:
        assert_loaded(found, tree)
    except AssertionError:
        return False
    return True


def outcome(folder: Any, *, waits: bool = False) -> str:
    """What a reader of a folder or URL finds, whether it waits for a save or not."""
    try:
        with nullcontext() if waits else mock.patch.object(opening, "without_saves", nullcontext):
            loaded = load_pytree(folder)
    except FileFormatError as error:
        if "but no index: a save was interrupted" in str(error):
            return "cut short"
        if "is being replaced by another save" in str(error):
            return "cut short"
        assert "has no safetensors file and no index" in str(error)
        return "nothing"
    except FileNotFoundError:
        return "nothing"
    for seed, name in ((1, "old"), (2, "new")):
        if is_same(tree_of(seed), loaded):
            return name
    raise AssertionError("a mixture")

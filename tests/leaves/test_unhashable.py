"""A leaf whose class cannot be hashed is a leaf as any other that no file can hold."""

from pathlib import Path

import jax
import pytest

from pytree2safetensors import (
    UnsupportedLeafError,
    dict2pytree,
    explain,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)


class Meta(type):
    def __eq__(cls, other: object) -> bool:
        return NotImplemented

    __hash__ = None  # type: ignore[assignment] # what Python does for a class with only __eq__


class Setting(metaclass=Meta):
    pass


def _is_known_to_jax() -> bool:
    try:
        return not issubclass(Setting, jax.Array)
    except TypeError:  # an older JAX looks for the class in a table
        return False


@pytest.mark.skipif(not _is_known_to_jax(), reason="this JAX cannot tell whether it is an array")
def test_a_leaf_of_a_class_without_a_hash_is_not_stored(tmp_path: Path) -> None:
    setting, path = Setting(), tmp_path / "file"
    tree = {"a": setting, "b": 1}
    with pytest.raises(UnsupportedLeafError, match=r"'@a': test_unhashable\.Setting\n"):
        save_pytree(tree, path)
    save_pytree(tree, path, unsupported="skip")
    assert load_pytree(path) == {"b": 1}
    assert load_into_pytree(tree, path) == tree
    assert explain(tree, path).startswith(f"{str(path)!r}: 1 of 1 leaves fit")
    assert dict2pytree(pytree2dict(tree)) == tree
    assert set_weights(tree, {"@a": Setting(), "@b": 2}) == {"a": setting, "b": 2}
    with pytest.raises(UnsupportedLeafError, match="the tree is a single leaf"):
        save_pytree(setting, path)

"""The check that a tree is the same after saving and loading."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors._errors import TreeStructureError, WeightsMismatchError
from pytree2safetensors._leaves.prng_keys import is_key_dtype
from pytree2safetensors._load.api import load_pytree
from pytree2safetensors._load.into_template import load_into_pytree
from pytree2safetensors._messages import listed, shorten
from pytree2safetensors._save.api import save_pytree
from pytree2safetensors._save.flat_dict import pytree2dict
from pytree2safetensors.testing._compare import assert_same, assert_same_leaves
from pytree2safetensors.testing._nodes import SELF_DESCRIBING


def assert_round_trips(tree: Any) -> None:
    """Assert that a tree is the same after saving and loading, with and without a template.

    The tree is saved to a temporary file, and loaded into a template with other values: zeros and
    empty strs. If a class refuses these, the template has the values of the tree. Structure, keys,
    types, dtypes, shapes and bits must be the same. In place of a NumPy array of a subclass or in
    another byte order, a plain array must come back. Without a template, this must also be true if
    the tree consists of dicts, lists, tuples, `None`s and containers. For other trees, only the
    leaves and their key paths must be the same. If the key paths do not form a tree, for example
    because the keys of a node are of different kinds, the tree is only loaded into the template.

    Args:
        tree: Any pytree that can be saved.

    Raises:
        AssertionError: The loaded tree is different, and the message names the key path; or JAX cannot
            build the tree from its own leaves.
        Pytree2SafetensorsError: The tree cannot be saved, or cannot be a template. The message says why.

    Specification: *Laws*.

    >>> assert_round_trips({"layers": [1.5, None, (True, "text")]})
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # If JAX has no 64-bit types, the arrays load as NumPy arrays, which is correct here.
        warnings.filterwarnings("ignore", message="JAX does not support the dtypes")
        path = Path(folder) / "tree.safetensors"
        save_pytree(tree, path, durable=False)
        try:
            into_template = load_into_pytree(_template(tree), path)
        except WeightsMismatchError as error:
            raise AssertionError(_not_rebuilt(error)) from None
        assert_same(tree, into_template, "into a template", same_kinds=True)
        if _is_self_describing(tree):
            assert_same(tree, load_pytree(path), "without a template")
            return
        try:
            loaded = load_pytree(path)
        except TreeStructureError:
            return  # the key paths do not form a tree
        assert_same_leaves(pytree2dict(tree), pytree2dict(loaded), "without a template")


def _not_rebuilt(error: WeightsMismatchError) -> str:
    """Describe the difference between a tree and one that JAX rebuilt from similar leaves."""
    lines = [
        *(f"{shorten(name)} is gone" for name in error.unexpected),
        *(f"{shorten(name)} is new" for name in error.missing),
        *error.mismatched,
    ]
    first = "unflattening the nodes of the tree gives another tree:"
    return "\n".join([first, *listed(lines, len(lines), "")])


def _template(tree: Any) -> Any:
    """Return the tree with other values, or with its own if one of its classes refuses the others."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    blanks = [*map(_blank, leaves)]
    try:
        return jax.tree_util.tree_unflatten(treedef, blanks)
    except Exception:  # noqa: BLE001 - classes may refuse values in any way
        return _rebuilt(leaves, treedef)


def _rebuilt(leaves: list[Any], treedef: Any) -> Any:
    try:
        return jax.tree_util.tree_unflatten(treedef, leaves)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise AssertionError(f"JAX cannot build the tree from its own leaves: {said}") from error


def _blank(leaf: Any) -> Any:
    """Return a leaf of the same kind with other values."""
    if isinstance(leaf, np.ndarray | np.generic):
        blank = np.zeros(leaf.shape, leaf.dtype)
        return blank if isinstance(leaf, np.ndarray) else blank[()]
    if not isinstance(leaf, jax.Array):
        return type(leaf)()
    if is_key_dtype(leaf.dtype):
        data = np.zeros(jax.random.key_data(leaf).shape, np.uint32)
        return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(leaf))
    if leaf.weak_type:
        return jnp.zeros_like(leaf)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


def _is_self_describing(tree: Any) -> bool:
    pending: list[Any] = [jax.tree_util.tree_structure(tree)]
    while pending:
        treedef = pending.pop()
        data = treedef.node_data()  # None for a leaf
        if data is not None and data[0] not in SELF_DESCRIBING:
            return False
        pending.extend(treedef.children())
    return True

"""Flat dicts of trees, also with the names and axes that rules give.

Specification: *Trees and flat dicts*, *Rules*.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors._arguments import checked
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled, Placed, assemble
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.host import host_array, part_of
from pytree2safetensors._leaves.meshes import computed
from pytree2safetensors._leaves.ownership import is_global
from pytree2safetensors._leaves.prng_keys import is_key_dtype
from pytree2safetensors._leaves.regions import Region, Shape
from pytree2safetensors._leaves.renaming import Rename, renamed, rules_in
from pytree2safetensors._leaves.spread import tensor_chunks
from pytree2safetensors._leaves.views import View, file_parts, region_of_tensor, tiled
from pytree2safetensors._save.renamed import (
    differ,
    have_same_bytes,
    incomparable,
    misfit_error,
    other_dtypes,
)
from pytree2safetensors._tree.flatten import flatten
from pytree2safetensors._tree.pytree import PyTree
from pytree2safetensors._tree.rule import Rule

_BYTES: Final = TensorInfo("U8", (), 1)  # for arrays whose dtype does not matter here
_WIDE: Final = (
    "it is complex128, which no pattern can rearrange, because a file stores it as float64"
)


@checked
def pytree2dict(tree: PyTree, *, rename: Rename | None = None) -> dict[str, Any]:
    """Return a flat dict from the spelled key path of each leaf to the leaf, in JAX's order.

    Args:
        tree: Any pytree.
        rename: Rules, or another value that `save_pytree` takes. The dict gets the names and axes of
            the file that it would write.

    Returns:
        A dict with the leaves themselves. Only leaves that rules rearrange are copies. If the tree
        is a single leaf, its name is "".

    Raises:
        KeyPathError: A key cannot be spelled, or two leaves have the same spelling.
        TreeStructureError: JAX cannot flatten the tree.
        WeightsMismatchError: `rename` does not fit the tree.
        FileFormatError: `rename` gives the same name to leaves that differ.
        ValueError: The path of a rule is ambiguous in the tree.

    Specification: *Trees and flat dicts*.

    >>> pytree2dict({"layers": [{"w": 1.0}, {"w": 2.0}]})
    {'@layers#0@w': 1.0, '@layers#1@w': 2.0}
    """
    flat = flatten(tree)
    if rename is None:
        return dict(zip(flat.names, flat.leaves, strict=True))
    return _renamed(flat.names, flat.leaves, rename)


def _renamed(paths: list[str], leaves: list[Any], rename: Rename) -> dict[str, Any]:
    routes = renamed(rename, paths, [*map(_shape_of, leaves)], complete=True)
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}  # the path of the leaf under each name
    ruled = rules_in(rename) is not None
    placed: list[Placed] = []
    lost: list[tuple[str, Rule | None, str]] = []
    ways = zip(routes.routes, routes.rules, routes.families, strict=True)
    for (route, rule, family), path, leaf in zip(ways, paths, leaves, strict=True):
        if isinstance(route, Lost):
            lost.append((path, rule, route.reason))
        elif isinstance(route, View) and leaf.dtype.newbyteorder("=") == np.complex128:
            lost.append((path, rule, _WIDE))
        elif isinstance(route, View):
            placed.append(Placed(route, rule, family, path, leaf, _BYTES))
        elif route is not None:
            _add(found, owners, route, path, leaf, ruled=ruled)
    lost += other_dtypes(placed)
    if lost:
        raise misfit_error(lost, paths, routes)
    for name, copies in assemble(placed).items():
        for tensor, path in copies:
            _add(found, owners, name, path, _array_of(tensor), ruled=ruled)
    return found


def _shape_of(leaf: Any) -> Shape | None:
    """Return the shape of a leaf whose axes can be rearranged."""
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array) or is_key_dtype(leaf.dtype):
        return None
    return None if isinstance(leaf, np.ma.MaskedArray) else leaf.shape


def _add(
    found: dict[str, Any], owners: dict[str, str], name: str, path: str, leaf: Any, *, ruled: bool
) -> None:
    owner = owners.setdefault(name, path)
    if name in found:
        _check_equal(found[name], leaf, (owner, path, name, ruled))
    found.setdefault(name, leaf)


def _check_equal(one: Any, other: Any, places: tuple[str, str, str, bool]) -> None:
    """Check that a file would store two leaves under one name alike, if they have values."""
    if one is other or isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return
    info, other_info = describe([one, other])
    if info is None or info != other_info:
        raise differ(*places)
    if not info.nbytes:
        return
    if is_global(one) or is_global(other):
        raise incomparable(*places)
    if not have_same_bytes(tensor_chunks(one, info), tensor_chunks(other, info)):
        raise differ(*places)


def _array_of(tensor: Assembled) -> Any:
    """Return the values of an assembled tensor: a JAX array if any of its leaves is one."""
    leaves = [member.leaf for member in tensor.members]
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return computed(lambda arrays: _joined_by_jax(tensor, arrays), leaves)
    values = np.zeros(tensor.members[0].view.fine, leaves[0].dtype)
    for region, part in _parts(tensor, leaves):
        values[tuple(slice(*bounds) for bounds in region)] = part
    return values.reshape(tensor.info.shape)


def _joined_by_jax(tensor: Assembled, leaves: list[Any]) -> Any:
    parts = [*_parts(tensor, leaves)]
    whole = tiled(parts) if parts else jnp.zeros(0, leaves[0].dtype)
    return whole.reshape(tensor.info.shape)


def _parts(tensor: Assembled, leaves: Iterable[Any]) -> Iterator[tuple[Region, Any]]:
    """Yield the regions of a tensor, reshaped to `fine`, and what the leaves have there."""
    for (view, number, _), leaf in zip(tensor.members, leaves, strict=True):
        region = region_of_tensor(view, number)
        index = tuple(slice(*bounds) for bounds in region)
        cut = part_of(leaf, index) if isinstance(leaf, jax.Array) else host_array(leaf)[index]
        for source, part in file_parts(view, region, cut, number):
            yield source.region, part

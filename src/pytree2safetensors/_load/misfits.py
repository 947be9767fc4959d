"""Whether a stored leaf fits a leaf of a template, and what a message says if it does not.

Specification: *Loading into a template*.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from pytree2safetensors._leaves.cast import holds_value
from pytree2safetensors._leaves.describe import info_of
from pytree2safetensors._leaves.prng_keys import key_shape
from pytree2safetensors._leaves.spec import ARRAYS, LeafSpec, TracedSpec, rank_of
from pytree2safetensors._leaves.unstorable import is_of_other_library
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.shardings import misplaced
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._messages import joined, short_form, shorten, type_name
from pytree2safetensors._tree.printing import array_text
from pytree2safetensors._tree.rule import Rule

_NO_NUMBERS: Final = frozenset({"key", "str"})


def misfit(
    leaf: TemplateLeaf, stored: LeafSpec | None, value: Any, cast: bool, origin: str = ""
) -> str | None:
    """Return why a stored leaf does not fit a template leaf; None if it does.

    `stored` is None for a given value that no file can hold. `value` is this value, or that of a
    stored Python scalar, and `origin` says which leaf this is.
    """
    if stored is None:
        return _not_an_array(value)
    is_traced = isinstance(stored, TracedSpec)  # then JAX decides where it is
    if is_traced and leaf.target != "jax":
        return "the given value is traced, so it can only replace a JAX array"
    reason = _difference(leaf, stored, value, cast=cast, origin=origin)
    if reason is None and leaf.sharding is not None and leaf.target == "jax" and not is_traced:
        reason = misplaced(leaf.sharding, leaf.spec.shape)
    return reason


def _difference(
    leaf: TemplateLeaf, stored: LeafSpec, value: Any, *, cast: bool, origin: str
) -> str | None:
    wanted = leaf.spec
    fits = False
    if wanted.kind == "key" and stored.kind == "array":
        data = (*wanted.shape, *key_shape(wanted.impl, ""))
        fits = stored.dtype == np.uint32 and stored.shape == data
    elif wanted.kind in _NO_NUMBERS or stored.kind in _NO_NUMBERS:
        fits = (wanted.kind, wanted.impl, wanted.shape) == (stored.kind, stored.impl, stored.shape)
    elif wanted.shape == stored.shape:
        fits = _dtype_fits(wanted, stored, value, cast)
    if fits:
        return None
    of = f" ({short_form(value)})" if value is not None else ""
    why = _explanation(wanted, stored, value, cast)
    return (
        f"the template has {show(wanted)}, but the stored leaf{origin} is {show(stored)}{of}{why}"
    )


def _explanation(wanted: LeafSpec, stored: LeafSpec, value: Any, cast: bool) -> str:
    """Say why a leaf does not fit, if its shape and kind do not show it."""
    if stored.kind == "key" and wanted.dtype == np.uint32:
        return f"; put a key in the template, such as jax.random.key(0, impl={stored.impl!r})"
    if wanted.shape != stored.shape or not {wanted.kind, stored.kind}.isdisjoint(_NO_NUMBERS):
        return ""
    if value is not None and _dtype_fits(wanted, stored, None, cast):
        holder = f"a Python {wanted.kind}" if wanted.dtype is None else wanted.dtype
        return f", which {holder} cannot hold"
    return ", which cast=True does not convert" if cast else ""


def _dtype_fits(wanted: LeafSpec, stored: LeafSpec, value: Any, cast: bool) -> bool:
    if wanted.dtype is not None and info_of(wanted.dtype, wanted.shape) is None:
        return False  # an abstract leaf may have any dtype
    ranks = _rank_of(wanted), _rank_of(stored)
    converts = cast and ranks[1] <= ranks[0]
    if wanted.dtype is not None and stored.dtype is not None:
        return converts or wanted.dtype == stored.dtype
    if not converts and ranks[0] != ranks[1] and {*ranks} != {1, 2}:  # signed and unsigned
        return False
    dtype = wanted.dtype
    if dtype is None and wanted.kind in {"float", "complex"}:
        dtype = np.dtype(wanted.kind)
    return dtype is None or value is None or holds_value(dtype, value)


def _rank_of(leaf: LeafSpec) -> int:
    return rank_of(np.dtype(leaf.kind) if leaf.dtype is None else leaf.dtype)


def _not_an_array(value: Any) -> str:
    kind = type(value)
    converts = is_of_other_library(kind) and hasattr(kind, "__array__")
    if converts or isinstance(value, list | tuple):
        return f"the given value is of type {type_name(kind)}; convert it with np.asarray"
    return "the given value is not an array, or is an array without values"


def needs_value(leaf: TemplateLeaf, stored: LeafSpec) -> bool:
    """Return whether the fit depends on the value of a stored Python scalar."""
    return (
        stored.dtype is None
        and stored.kind not in _NO_NUMBERS
        and (
            leaf.spec.dtype is not None
            or (stored.kind == "int" and leaf.spec.kind in {"float", "complex"})
        )
    )


def has_axes(stored: LeafSpec) -> bool:
    """Return whether the axes of a tensor are those of its leaf."""
    return stored.kind == "array" and stored.dtype != np.complex128


def show(leaf: LeafSpec) -> str:
    """Write a leaf without its values for a message."""
    if leaf.kind not in ARRAYS:
        return f"a Python {leaf.kind}"
    return array_text(f"key<{leaf.impl}>" if leaf.kind == "key" else leaf.dtype, leaf.shape)


def predicate(stored: LeafSpec | str | None) -> str:
    """Say what a stored leaf is, without its subject."""
    if isinstance(stored, str):
        return stored
    return f"is {'not an array, or an array without values' if stored is None else show(stored)}"


def origin_of(source: str | View, path: str) -> str:
    """Say where the file has a leaf, if that is not its path."""
    if isinstance(source, str):
        return "" if source == path else f" {shorten(source)}"
    return f" from {joined([*map(shorten, source.names)])}" if source.names else ""


def uneven(names: Iterable[str], available: Mapping[str, Any]) -> str:
    """Return a hint if the tensors of a leaf have different shapes."""
    firsts: dict[tuple[int, ...], str] = {}  # the first name of each shape
    for name in names:
        stored = available[name]
        if isinstance(stored, LeafSpec) and has_axes(stored):
            firsts.setdefault(stored.shape, name)
    if len(firsts) < 2:
        return ""
    one, other, *_ = (f"{shorten(name)} {show(available[name])}" for name in firsts.values())
    return (
        f"; the tensors {one} and {other} have different shapes, and no rule joins such tensors into one "
        "leaf: load them as separate leaves, and concatenate these"
    )


def transposed(leaf: TemplateLeaf, stored: LeafSpec | None, rule: Rule | None) -> str:
    """Return a hint if a rule without a pattern finds a tensor with the reversed shape of the leaf."""
    shape = leaf.spec.shape
    if rule is None or stored is None or shape == stored.shape or shape != stored.shape[::-1]:
        return ""
    axes = "o i" if len(shape) == 2 else " ".join("abcdefghijklmnopqrstuvwxyz"[: len(shape)])
    pattern = f"{axes} -> {' '.join(reversed(axes.split()))}"
    return f"; this is the transpose, so give {rule!r} the pattern {pattern!r}"

"""Leaves of a template that are or hold arrays, although a load cannot give them values.

Specification: *Loading into a template*.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax

from pytree2safetensors._leaves.holders import holders_in, node_instead_of
from pytree2safetensors._leaves.jax_versions import REFERENCE
from pytree2safetensors._leaves.unstorable import is_of_other_library
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._messages import type_name


def held_arrays(leaves: Sequence[Any], needs: Sequence[TemplateLeaf | None]) -> dict[int, str]:
    """Return why leaves that are not data do not fit, by position, if they are or hold arrays."""
    others = [position for position, need in enumerate(needs) if need is None]
    holding = holders_in([leaves[position] for position in others])
    reasons = (
        _reason(leaves[position], *one) for position, *one in zip(others, holding, strict=True)
    )
    return {
        position: f"the template has {reason}"
        for position, reason in zip(others, reasons, strict=True)
        if reason
    }


def _reason(leaf: Any, holds: bool) -> str:
    kind = type_name(type(leaf))
    if holds:
        node = node_instead_of(leaf)
        return f"a {kind}, which holds arrays{f'; {node} is a pytree node' if node else _REGISTER}"
    if _is_reference(leaf):
        return "a reference to an array; put the array that it holds in its place, as ref[...]"
    if is_of_other_library(type(leaf)) and not isinstance(leaf, jax.core.Tracer):
        return f"a {kind}, which is no array of JAX or NumPy; convert it with jnp.asarray(leaf)"
    return ""


def _is_reference(leaf: Any) -> bool:
    """Return whether a leaf is a reference to an array, traced or not."""
    if isinstance(leaf, jax.core.Tracer):
        return hasattr(leaf.aval, "inner_aval")
    return isinstance(leaf, REFERENCE)


_REGISTER: Final = (
    ", but is not a pytree node; register its class, for example with "
    "jax.tree_util.register_dataclass"
)

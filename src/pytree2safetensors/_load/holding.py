"""Template leaves that are or hold arrays, but that a load cannot give values.

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
    others = [n for n, need in enumerate(needs) if need is None]
    holding = holders_in([leaves[n] for n in others])
    reasons = {n: _reason(leaves[n], holds) for n, holds in zip(others, holding, strict=True)}
    return {n: f"the template has {reason}" for n, reason in reasons.items() if reason}


def _reason(leaf: Any, holds: bool) -> str:
    kind = type_name(type(leaf))
    if holds:
        node = node_instead_of(leaf)
        return f"a {kind}, which holds arrays{f'; {node} is a pytree node' if node else _REGISTER}"
    if _is_reference(leaf):
        return "a reference to an array; put the array that it holds in its place, as ref[...]"
    if is_of_other_library(type(leaf)):
        return f"a {kind}, not an array of JAX or NumPy; convert it with jnp.asarray(leaf)"
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

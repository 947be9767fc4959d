"""Objects that hold arrays although they are no pytree nodes.

Specification: *Saving*.
"""

import gc
from collections import deque
from collections.abc import Iterable
from functools import lru_cache, partial
from types import FunctionType, MappingProxyType, MemberDescriptorType, ModuleType, NoneType
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._leaves.describe import PYTHON_SCALARS, converts_to_arrays, describe
from pytree2safetensors._leaves.jax_versions import REFERENCE

# What these hold is code, or says where arrays are.
_OPAQUE: Final = (
    *(type, FunctionType, ModuleType, jax.stages.Compiled),
    *(jax.Array, jax.sharding.Mesh, jax.sharding.Sharding),
)
_ATOMS: Final = frozenset({*PYTHON_SCALARS, bytes, NoneType})
_ITEMS: Final[tuple[Any, ...]] = (list, tuple, set, frozenset, deque)


def holds_arrays(leaf: Any) -> bool:
    """Return whether an object holds arrays in its attributes or items, at any depth.

    Only arrays count that a file could hold. No code of the object's class runs.
    """
    seen = {id(leaf): leaf}  # which also keeps the objects alive, and so their ids
    stack = [leaf]
    while stack:
        for held in _held(stack.pop()):
            if type(held) in _ATOMS or id(held) in seen:
                continue
            if _is_array(held):
                return True
            seen[id(held)] = held
            stack.append(held)
    return False


def _is_array(held: Any) -> bool:
    if isinstance(held, np.ndarray | np.generic):
        return describe([held]) != [None]
    return isinstance(held, (jax.Array, REFERENCE)) or converts_to_arrays(type(held))


def _held(holder: Any) -> Iterable[Any]:
    """Return the attributes and items of an object."""
    kind = type(holder)
    if issubclass(kind, _OPAQUE):
        return []
    if issubclass(kind, np.ndarray):
        return holder.flat if holder.dtype == object else []
    attributes = _attributes(holder)
    if "__wrapped__" in attributes:  # a jitted function, for example
        return []
    return [*attributes.values(), *_items(holder, kind)]


def _attributes(holder: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    slots = _slots(type(holder))  # type: ignore[arg-type] # mypy thinks that no class is hashable
    for name, member in slots.items():
        try:
            found[name] = member.__get__(holder)
        except AttributeError:  # it has no value
            continue
    try:
        return {**found, **object.__getattribute__(holder, "__dict__")}
    except Exception:  # noqa: BLE001 - there is none, or the class has a property of this name
        return found


@lru_cache(maxsize=1024)
def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    """Return the slots of a class and of its bases that are written in Python."""
    return {
        name: member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, MemberDescriptorType)
    }


def _items(holder: Any, kind: type) -> Iterable[Any]:
    if issubclass(kind, dict):
        return dict.values(holder)
    if issubclass(kind, partial):
        return holder.func, holder.args, holder.keywords
    if kind is MappingProxyType:
        return gc.get_referents(holder)  # the mapping that it shows
    base = next((base for base in _ITEMS if issubclass(kind, base)), None)
    return base.__iter__(holder) if base is not None else ()

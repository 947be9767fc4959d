"""Objects that hold arrays but are not pytree nodes.

No code of an object's class runs here: the attributes and items are where Python keeps them. Classes are
known by their ids, because not every class can be hashed.

Specification: *Saving*, *Loading into a template*.
"""

import gc
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import (
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    ModuleType,
    NoneType,
)
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._leaves.describe import PYTHON_SCALARS, info_of
from pytree2safetensors._leaves.jax_versions import REFERENCE
from pytree2safetensors._leaves.unstorable import CONVERSIONS

# These hold code, or describe where arrays are or (in old releases of NumPy) a dtype. Scalars do not
# count as arrays.
_OPAQUE: Final = (
    *(type, FunctionType, ModuleType, jax.stages.Compiled),
    *(jax.sharding.Mesh, jax.sharding.Sharding, np.finfo, np.generic),
)
_ATOMS: Final = frozenset(map(id, (*PYTHON_SCALARS, bytes, NoneType)))
_ARRAYS: Final = (jax.Array, jax.core.Tracer, REFERENCE)
_ITEMS: Final[tuple[Any, ...]] = (list, tuple, set, frozenset, deque)
_NODES: Final[Mapping[type, str]] = {
    np.ndarray: "leaf.tolist()",
    partial: "a jax.tree_util.Partial",
    dict: "dict(leaf)",
    tuple: "tuple(leaf)",
    **dict.fromkeys((list, deque, set, frozenset), "list(leaf)"),
}
_DESCRIPTORS: Final = (GetSetDescriptorType, MemberDescriptorType)  # of a __dict__
_BASES, _VARS = vars(type)["__mro__"], vars(type)["__dict__"]


def holders_in(leaves: Sequence[Any]) -> list[bool]:
    """Return which objects hold arrays in their attributes or items, at any depth.

    Only arrays count that a file could hold. Each object is visited once, however many leaves hold it.
    """
    kinds = _Kinds()
    seen = {id(leaf): leaf for leaf in leaves}  # which also keeps objects alive, and so their ids
    holders: dict[int, list[int]] = defaultdict(list)  # the ids of what holds an object
    found: list[int] = []
    stack = [*seen.values()]
    while stack:
        holder = stack.pop()
        for held in kinds.of(holder).held_by(holder):
            kind = kinds.of(held)
            if kind.is_array(held):
                found.append(id(holder))
            elif not kind.is_opaque:
                holders[id(held)].append(id(holder))
                if id(held) not in seen:
                    seen[id(held)] = held
                    stack.append(held)
    holding: set[int] = set()
    while found:
        one = found.pop()
        if one not in holding:
            holding.add(one)
            found += holders.get(one, ())
    return [id(leaf) in holding for leaf in leaves]


def node_instead_of(leaf: Any) -> str:
    """Write which pytree node can replace an object; "" if its class must be registered."""
    return next((node for base, node in _NODES.items() if isinstance(leaf, base)), "")


class _Kind:
    """What the class of an object says about it."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.is_numpy = issubclass(kind, np.ndarray)
        self.is_opaque = id(kind) in _ATOMS or _is_a(kind, _OPAQUE)
        bases = [_VARS.__get__(base) for base in _BASES.__get__(kind)]
        self.converts = not self.is_opaque and (
            _is_a(kind, _ARRAYS) or any(name in base for base in bases for name in CONVERSIONS)
        )
        # The slots of the bases that are written in Python.
        self.slots: dict[str, MemberDescriptorType] = {
            name: member
            for base in bases
            if "__slots__" in base
            for name, member in base.items()
            if type(member) is MemberDescriptorType
        }
        found = (base.get("__dict__") for base in bases)
        self.dict = next((one for one in found if type(one) in _DESCRIPTORS), None)

    def is_array(self, held: Any) -> bool:
        """Return whether an object of this class is an array that a file could hold."""
        if not self.is_numpy:
            return self.converts
        if issubclass(self.kind, np.ma.MaskedArray):
            return False
        return info_of(np.ndarray.dtype.__get__(held), np.ndarray.shape.__get__(held)) is not None

    def held_by(self, holder: Any) -> Iterable[Any]:
        """Return the attributes and items of an object of this class."""
        if self.is_opaque or (self.converts and not self.is_numpy):
            return []
        if self.is_numpy:
            has_objects = np.ndarray.dtype.__get__(holder).kind == "O"
            return np.ndarray.flat.__get__(holder) if has_objects else []
        attributes = self._attributes(holder)
        if "__wrapped__" in attributes:  # a jitted function, for example
            return []
        return [*attributes.values(), *_items(holder, self.kind)]

    def _attributes(self, holder: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, member in self.slots.items():
            with suppress(AttributeError):  # it has no value
                found[name] = member.__get__(holder)
        if self.dict is not None:
            with suppress(Exception):  # of a proxy that is written in C
                found.update(dict.items(self.dict.__get__(holder)))
        return found


class _Kinds(dict[int, _Kind]):
    """Classes, by their ids."""

    def of(self, held: Any) -> _Kind:
        """Return what is known of the class of an object."""
        kind = type(held)
        found = self.get(id(kind))
        if found is None:
            found = self[id(kind)] = _Kind(kind)
        return found


def _is_a(kind: type, classes: Any) -> bool:
    found = False
    with suppress(Exception):  # an abstract base class asks for the hash of a class
        found = issubclass(kind, classes)
    return found


def _items(holder: Any, kind: type) -> Iterable[Any]:
    if issubclass(kind, dict):
        return dict.values(holder)
    if issubclass(kind, partial):
        members: Any = (partial.func, partial.args, partial.keywords)
        return [member.__get__(holder) for member in members]
    if kind is MappingProxyType:
        return gc.get_referents(holder)  # the mapping that it shows
    base = next((base for base in _ITEMS if issubclass(kind, base)), None)
    return base.__iter__(holder) if base is not None else ()

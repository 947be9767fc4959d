"""The two plain pytree nodes: one for attributes, one for children without keys.

Specification: *Trees and flat dicts*.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, cast

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._tree.keys import GetAttrKey
from pytree2safetensors._tree.printing import Printed, render


class PyTreeContainer:
    """A pytree node with attributes of any names. It stands for a node of an unknown type.

    `container.name` reads and sets attributes, except those with names such as `__name__`.
    `container[name]` works for every name. Attributes never change the behavior of the container.
    `vars(container)` returns a copy of the attributes as a dict, so `T(**vars(container))` makes a
    `T` with these attributes. Containers with the same names have equal treedefs. The order of the
    attributes does not matter.

    Args:
        attrs: The attributes. They are copied.

    Specification: *Trees and flat dicts*.

    >>> container = PyTreeContainer({"scale": 2.0})
    >>> container.bias = 1.0
    >>> jax.tree_util.tree_map(lambda leaf: leaf + 1, container)
    PyTreeContainer(bias=2.0, scale=3.0)
    """

    __module__ = "pytree2safetensors"
    __slots__ = ("__attrs__", "__weakref__")
    __attrs__: dict[str, Any]

    # Not in __init__, because an error would print a container that does not exist yet.
    @checked
    def __new__(cls, attrs: Mapping[str, Any] = {}) -> "PyTreeContainer":
        return container_of(dict(attrs))

    def __getattribute__(self, name: str) -> Any:
        if _is_dunder(name):
            return object.__getattribute__(self, name)
        try:
            return attrs_of(self)[name]
        except KeyError:
            raise AttributeError(f"PyTreeContainer has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_dunder(name):
            raise AttributeError(
                f"set {name!r} with container[{name!r}] = ..., not as an attribute"
            )
        attrs_of(self)[name] = value

    def __delattr__(self, name: str) -> None:
        if _is_dunder(name) or name not in attrs_of(self):
            raise AttributeError(f"PyTreeContainer has no attribute {name!r}")
        del attrs_of(self)[name]

    def __getitem__(self, name: str) -> Any:
        return attrs_of(self)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an attribute name must be a str, not {type(name).__name__}")
        attrs_of(self)[name] = value

    def __delitem__(self, name: str) -> None:
        del attrs_of(self)[name]

    def __contains__(self, name: object) -> bool:
        return name in attrs_of(self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(attrs_of(self)))

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override] # read-only
        return dict(attrs_of(self))

    def __init_subclass__(cls) -> None:
        raise TypeError("PyTreeContainer cannot be subclassed; register your own pytree node")

    def __reduce__(self) -> tuple[object, ...]:
        # Items are set after the container exists, because one may hold the container itself.
        return PyTreeContainer, (), None, None, iter(attrs_of(self).items())

    def __repr__(self) -> str:
        return render(self)

    def __printed__(self) -> Printed:
        attrs = sorted(attrs_of(self).items())
        labels = [f"{name}=" if name.isidentifier() else f"{name!r}: " for name, _ in attrs]
        return Printed("PyTreeContainer(", labels, [value for _, value in attrs], ")")

    def __treescope_repr__(self, path: str | None, subtree_renderer: Callable[..., Any]) -> Any:
        parts: Any = import_module("treescope.repr_lib")
        attrs = dict(sorted(attrs_of(self).items()))
        if all(name.isidentifier() and not name.startswith("__") for name in attrs):
            return parts.render_object_constructor(type(self), attrs, path, subtree_renderer)
        return parts.render_dictionary_wrapper(type(self), attrs, path, subtree_renderer, True)


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


# The slot's own accessors, which work whatever the names of the attributes are.
_attrs_slot = vars(PyTreeContainer)["__attrs__"]
attrs_of = cast(Callable[[PyTreeContainer], dict[str, Any]], _attrs_slot.__get__)
_set_attrs = cast(Callable[[PyTreeContainer, dict[str, Any]], None], _attrs_slot.__set__)


class UnkeyedContainer:
    """A pytree node whose children have an order but no keys.

    Args:
        children: The children, in order.

    Specification: *Trees and flat dicts*.

    >>> jax.tree_util.tree_leaves(UnkeyedContainer([1, 2]))
    [1, 2]
    """

    __module__ = "pytree2safetensors"
    __slots__ = ("__weakref__", "children")
    children: tuple[Any, ...]

    @checked
    def __new__(cls, children: Iterable[Any] = ()) -> "UnkeyedContainer":
        return _unflatten_unkeyed(None, children)

    def __getitem__(self, index: int) -> Any:
        return self.children[index]

    def __len__(self) -> int:
        return len(self.children)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.children)

    def __init_subclass__(cls) -> None:
        raise TypeError("UnkeyedContainer cannot be subclassed; register your own pytree node")

    def __reduce__(self) -> tuple[object, ...]:
        # The state is set after the container exists, because a child may hold the container.
        return UnkeyedContainer, (), (None, {"children": self.children})

    def __repr__(self) -> str:
        return render(self)

    def __printed__(self) -> Printed:
        return Printed("UnkeyedContainer([", [""] * len(self), list(self), "])")

    def __treescope_repr__(self, path: str | None, subtree_renderer: Callable[..., Any]) -> Any:
        parts: Any = import_module("treescope.repr_lib")
        return parts.render_list_wrapper(type(self), self.children, path, subtree_renderer, True)


def container_of(attrs: dict[str, Any]) -> PyTreeContainer:
    """Make a container around `attrs` itself, unchecked."""
    container = object.__new__(PyTreeContainer)
    _set_attrs(container, attrs)
    return container


def _flatten(container: PyTreeContainer) -> tuple[list[Any], tuple[str, ...]]:
    attrs = attrs_of(container)
    names = tuple(sorted(attrs))
    return [attrs[name] for name in names], names


def _flatten_with_keys(
    container: PyTreeContainer,
) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    children, names = _flatten(container)
    return [(GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], names


def _unflatten(names: tuple[str, ...], children: Iterable[Any]) -> PyTreeContainer:
    return container_of(dict(zip(names, children, strict=True)))


def _unflatten_unkeyed(_: None, children: Iterable[Any]) -> UnkeyedContainer:
    container = object.__new__(UnkeyedContainer)
    container.children = tuple(children)
    return container


jax.tree_util.register_pytree_with_keys(PyTreeContainer, _flatten_with_keys, _unflatten, _flatten)
jax.tree_util.register_pytree_node(
    UnkeyedContainer, lambda container: (container.children, None), _unflatten_unkeyed
)

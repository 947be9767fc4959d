"""Cheap checks of the arguments of public functions, with short messages.

Specification: *Errors*.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, Final, ParamSpec, TypeVar

from beartype import beartype
from jax.sharding import Mesh, PartitionSpec, Sharding
from jaxtyping import jaxtyped

from pytree2safetensors._messages import shorten

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a public function, even if type checks are switched off.

    The type checks come later, because their messages may contain a whole tree.
    """
    inner = jaxtyped(function, typechecker=beartype)
    bind = signature(function).bind
    parameters = signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]
    keywords = {p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    where = function.__qualname__.removesuffix(".__new__").removesuffix(".__init__")

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> R:  # beartype 0.17 knows no P.args
        for name, value in zip(positional, args, strict=False):
            check_argument(where, name, value)
        for name, value in kwargs.items():
            check_argument(where, name if name in keywords else f"**{name}", value)
        call = inner
        try:
            bind(*args, **kwargs)
        except TypeError:
            if where == "load_pytree" and len(args) > len(positional):
                raise TypeError(f"{where}: only path is positional; {_WITH_TEMPLATE}") from None
            call = function  # whose own error names the function
        return call(*args, **kwargs)

    return wrapper


def check_argument(where: str, name: str, value: object) -> None:
    """Raise a TypeError that names an argument if its value is of a wrong type."""
    key = "**" if name.startswith("**") else name
    rule = _RULES.get(f"{where} {key}") or _RULES.get(key)
    if rule is not None and not rule[0](value):
        if name in {"**name", "**path", "**pattern"}:  # an axis may have such a name, and a size
            raise TypeError(f"{where}: {name[2:]} is positional, as in Rule(name, path, pattern)")
        name = "a size" if key == "**" else name
        remedy = _REMEDIES.get(f"{where} {name}", "")
        if name == "metadata" and isinstance(value, Mapping):
            remedy = "; json.dumps converts a value to a str, and json.loads converts it back"
        if name == "sharding" and isinstance(value, Mesh | PartitionSpec):
            remedy = "; a jax.sharding.NamedSharding has a mesh and a PartitionSpec"
        elif name == "sharding" and isinstance(value, Mapping | list | tuple):
            remedy = f"; for a tree of shardings, load into a template: {_WITH_SHARDINGS}"
        if name == "path" and _are_paths(value):
            remedy = "; pass one path, such as that of a folder of shards or of its index"
        if name == "path" and isinstance(value, bytes):
            remedy = "; os.fsdecode converts a path to a str, and io.BytesIO converts contents to a file object"
        raise TypeError(f"{where}: {name} must be {rule[1]}, not {_shown(value, rule[0])}{remedy}")


def check_sizes(where: str, **sizes: int) -> None:
    """Raise a ValueError that names a size if it is negative."""
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{where}: {name} must be 0 or more, not {size}")


def _shown(value: object, rule: object) -> str:
    kind = _type_name(value)
    if _is_rule(value):
        return "a Rule; put it in a list"
    if isinstance(value, str):
        return shorten(value, 80)
    if rule == _is_rename and isinstance(value, Sequence) and not isinstance(value, bytes):
        wrong = next(entry for entry in value if not _is_rule(entry))
        return f"a {kind} with an item of type {_type_name(wrong)}"
    if rule in _MAPPINGS and isinstance(value, Mapping):
        for key, entry in value.items():  # pragma: no branch - one of them is wrong
            if not isinstance(key, str):
                return f"a {kind} with a key of type {_type_name(key)}"
            if not isinstance(entry, str) and rule != _has_names:
                return f"a {kind} with a value of type {_type_name(entry)} at {shorten(key)}"
    return kind


def _type_name(value: object) -> str:
    """Name a type, with its module unless it is built in, because NumPy has types such as bool, too."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _is_path_or(method: str) -> Callable[[object], bool]:
    def fits(value: object) -> bool:
        if isinstance(value, str | os.PathLike):
            return True
        # One of their methods identifies the paths of universal_pathlib.
        return any(callable(getattr(value, name, None)) for name in (method, "joinuri"))

    return fits


def _are_paths(value: object) -> bool:
    """Return whether a value is a list of paths, which is not one path."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(item, str | os.PathLike) for item in value)


def _is_size(value: object) -> bool:
    return isinstance(value, Integral | str | None) and not isinstance(value, bool)


def _is_strategy(value: object) -> bool:
    return callable(getattr(value, "flatmap", None))  # without an import of Hypothesis


def _has_names(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _maps_texts(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(text, str) for item in value.items() for text in item)


def _is_metadata(value: object) -> bool:
    return value is None or _maps_texts(value)


def _is_rename(value: object) -> bool:
    if value is None or callable(value):
        return True
    if isinstance(value, Mapping):
        return _maps_texts(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return all(_is_rule(entry) for entry in value)


def _is_rule(value: object) -> bool:
    return type(value).__name__ == "Rule"  # which is above this module


_MAPPINGS: Final = (_has_names, _is_metadata, _is_rename)
_A_PATH: Final = "a path, as a str or an os.PathLike, or a binary file object"
_WITH_TEMPLATE: Final = "load_into_pytree(template, path) loads into a template"
_WITH_SHARDINGS: Final = (
    "jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), "
    "shapes, shardings)"
)
_TARGETS: Final = ("save_pytree path", "save_pytree_async path")
_RULES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "path": (_is_path_or("read"), _A_PATH),
    **dict.fromkeys(_TARGETS, (_is_path_or("write"), _A_PATH)),
    "Rule name": (_is(str, type(None)), "a str with placeholders, or None"),
    "Rule path": (_is(str, type(None)), "a str with placeholders, or None"),
    "Rule pattern": (_is(str), "a str such as 'a b -> b a'"),
    "Rule **": (_is(int), "an int"),
    "metadata": (_is_metadata, "a mapping of strs to strs"),
    **dict.fromkeys(
        ("unsupported", "unexpected"),
        (lambda value: isinstance(value, str) and value in {"raise", "skip"}, "'raise' or 'skip'"),
    ),
    "sharding": (
        lambda value: (  # a mesh can be called, as a decorator
            value is None
            or isinstance(value, Sharding)
            or (callable(value) and not isinstance(value, Mesh))
        ),
        "a sharding, or a function of a spelled key path and a jax.ShapeDtypeStruct",
    ),
    "max_shard_size": (_is_size, "a number of bytes, or a str such as '5GB'"),
    "progress": (lambda value: isinstance(value, bool) or callable(value), "a bool or a function"),
    "separator": (_is(str), "a str such as '.'"),
    "prefix": (_is(str), "a spelled key path, which is a str"),
    "rename": (_is_rename, "a function, a mapping of strs to strs, or a sequence of Rules"),
    "dictionary": (_has_names, "a mapping of names, which are strs, to leaves"),
    **{
        where: (_is_strategy, f"a Hypothesis strategy, such as {example}")
        for where, example in {
            "arrays shapes": "hypothesis.strategies.just((2, 3))",
            "leaves arrays": "arrays()",
            "keypaths keys": "keys()",
            "pytrees leaves": "leaves()",
        }.items()
    },
    "arrays dtypes": (
        lambda value: value is None or _is_strategy(value),
        "a Hypothesis strategy, such as hypothesis.strategies.just('float32')",
    ),
    "nodes": (_is(Collection), "a collection of types, such as [dict, list]"),
    **dict.fromkeys(
        ("min_size", "max_size", "max_depth"),
        (lambda value: isinstance(value, int) and not isinstance(value, bool), "an int"),
    ),
    "attrs": (_has_names, "a mapping of names, which are strs, to values"),
    "children": (_is(Iterable), "an iterable"),
    **dict.fromkeys(
        ("durable", "checksum", "mmap", "verbose", "strict", "cast", "flat"), (_is(bool), "a bool")
    ),
}
_REMEDIES: Final = {
    **dict.fromkeys(_TARGETS, "; the tree comes first, the path second"),
    **dict.fromkeys(
        ("load_into_pytree path", "explain path"), "; the template comes first, the path second"
    ),
    "set_weights dictionary": "; the template comes first, the dictionary second",
}

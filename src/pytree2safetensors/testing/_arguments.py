"""Cheap checks of the arguments of strategies, when these are made and not when a test draws.

Specification: *Errors*.
"""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from inspect import signature
from typing import Any, Final, ParamSpec, TypeVar

from hypothesis.strategies import SearchStrategy

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function that makes a strategy."""
    bind = signature(function).bind

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        try:
            given = bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the function's own error names it
        for name, value in given.items():
            _check(function.__name__, name, value)
        return function(*args, **kwargs)

    return wrapper


def _check(where: str, name: str, value: object) -> None:
    fits, what = _RULES[name]
    if not fits(value):
        raise TypeError(f"{where}: {name} must be {what}, not {type(value).__name__}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{where}: {name} must be 0 or more, not {value}")


def _is_strategy(value: object) -> bool:
    return isinstance(value, SearchStrategy)


def _is_strategy_or_none(value: object) -> bool:
    return value is None or _is_strategy(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RULES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "dtypes": (
        _is_strategy_or_none,
        "a Hypothesis strategy, such as hypothesis.strategies.just('float32')",
    ),
    "shapes": (_is_strategy, "a Hypothesis strategy, such as hypothesis.strategies.just((2, 3))"),
    "arrays": (_is_strategy, "a Hypothesis strategy, such as arrays()"),
    "leaves": (_is_strategy, "a Hypothesis strategy, such as leaves()"),
    "keys": (_is_strategy, "a Hypothesis strategy, such as keys()"),
    "nodes": (
        lambda value: isinstance(value, Collection),
        "a collection of types, such as [dict, list]",
    ),
    **dict.fromkeys(("min_size", "max_size", "max_depth"), (_is_size, "an int")),
}

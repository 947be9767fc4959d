"""Renaming: where the leaves of a tree are in a file with other names.

Specification: *Rules*.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pytree2safetensors._leaves.regions import Shape
from pytree2safetensors._leaves.routes import Routes, routes_of
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.paths import add_prefix
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.rule_index import RuleIndex

if TYPE_CHECKING:
    Rename: TypeAlias = Callable[[str], str] | Mapping[str, str] | Sequence[Rule]
else:
    # beartype draws from Python's global random generator to check an item of a Sequence.
    Rename = Callable[[str], str] | Mapping[str, str] | Collection[Rule]


def rules_in(rename: Rename | None) -> Sequence[Rule] | None:
    """Return the rules, if `rename` has rules."""
    if rename is None or isinstance(rename, Mapping) or callable(rename):
        return None
    if not all(isinstance(rule, Rule) for rule in rename):
        raise TypeError("rename= is a function, a mapping of names or a sequence of Rules")
    return rename


def renamed(
    rename: Rename | None,
    paths: Sequence[str],
    shapes: Sequence[Shape | None],
    *,
    complete: bool,
    prefix: str = "",
) -> Routes:
    """Find out where each leaf is in a file.

    Args:
        rename: Rules, names or a function; by default, names are key paths.
        paths: The spelled key paths of all leaves.
        shapes: The shapes of the leaves; None for leaves that are not arrays.
        complete: Whether leaves that a rule cuts from one tensor must all be there.
        prefix: The prefix of names that `rename` does not give.

    Raises:
        TypeError: `rename` gives a name that is not a str.
        ValueError: A rule with a dotted path matches two leaves of one dotted path.
    """
    rules = rules_in(rename)
    if rules is not None:
        return routes_of(RuleIndex(rules), paths, shapes, complete=complete)
    names: list[str] = []
    for path in paths:
        if callable(rename):
            name = rename(path)
        elif isinstance(rename, Mapping) and path in rename:
            name = rename[path]
        else:
            name = add_prefix(prefix, path)
        if not isinstance(name, str):
            raise TypeError(
                f"rename= gives {shorten(path)} a name of type {type(name).__name__}, "
                "but a name must be a str"
            )
        names.append(name)
    return Routes([*names], [None] * len(names), range(len(names)), [])

"""Strategies for trees of every kind of node."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytree2safetensors._arguments import check_sizes, checked
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer
from pytree2safetensors._tree.keys import DictKey
from pytree2safetensors._tree.spelling import spell_key
from pytree2safetensors.testing._arrays import Draw
from pytree2safetensors.testing._keys import keys, literals, numbers, texts
from pytree2safetensors.testing._leaves import leaves
from pytree2safetensors.testing._nodes import NODES, Keyed, Nothing, Pair, Record, Unkeyed


@checked
def pytrees(
    leaves: SearchStrategy[Any] = leaves(),  # noqa: B008 - strategies have no state
    *,
    nodes: Collection[type] = NODES,
    min_size: int = 0,
    max_depth: int = 4,
) -> SearchStrategy[Any]:
    """Generate trees with every kind of node that is common in JAX programs.

    The nodes are dicts with keys of every kind, `OrderedDict`s, `defaultdict`s, lists, tuples,
    `None`, namedtuples, a registered dataclass, classes registered with keys and without, and the
    two containers. They are nested, and may be empty. A tree may also be a single leaf.

    Args:
        leaves: A strategy for the leaves.
        nodes: The types of the nodes: some of `NODES`, such as `SELF_DESCRIBING`.
        min_size: The smallest number of children of a node. Nodes that always have fewer, such as
            `None`, are left out.
        max_depth: The largest number of nested nodes. It is small by default, so that failures are
            readable.

    Raises:
        ValueError: `nodes` has one that is not in `NODES`, or a number is negative.

    Specification: *Trees and flat dicts*.

    >>> from hypothesis import given
    >>> from hypothesis import strategies as st
    >>> @given(pytrees(st.just(0), nodes=[list], max_depth=2))
    ... def test_tree(tree):
    ...     assert type(tree) in (list, int)
    >>> test_tree()
    """
    check_sizes("pytrees", min_size=min_size, max_depth=max_depth)
    unknown = [kind for kind in nodes if kind not in NODES]
    if unknown:
        raise ValueError(f"pytrees: nodes must be some of NODES, and these are not: {unknown}")
    kinds = tuple(
        kind for kind in NODES if kind in nodes and _SIZES.get(kind, min_size) >= min_size
    )
    return _trees(leaves, kinds, min_size, max_depth)


@st.composite
def _trees(draw: Draw, leaves: SearchStrategy[Any], kinds: Any, min_size: int, depth: int) -> Any:
    if not depth:
        return draw(leaves)
    choices = _choices(leaves, kinds, min_size, depth)
    return draw(choices[draw(st.integers(0, len(choices) - 1))])


@lru_cache(maxsize=256)
def _choices(
    leaves: SearchStrategy[Any], kinds: Any, min_size: int, depth: int
) -> list[SearchStrategy[Any]]:
    """Return the strategies for a tree, about a quarter of them for a leaf; it shrinks to the first."""
    # Cached, because a strategy takes longer to analyze its parts than to draw.
    children = _trees(leaves, kinds, min_size, depth - 1)
    nodes = [_BUILDERS[kind](children, min_size) for kind in kinds]
    return [leaves] * (len(nodes) // 3 + 1) + nodes


_SIZES: Final[Mapping[type, int]] = {type(None): 0, Nothing: 0, Pair: 2, Record: 2}
_Children: TypeAlias = SearchStrategy[Any]


def _most(least: int) -> int:
    """Return the largest number of children of a node, small so that a tree has few leaves."""
    return max(4, least)


def _dicts(children: _Children, least: int) -> SearchStrategy[dict[Any, Any]]:
    # JAX sorts the keys of a dict, so they must be comparable.
    sortable: Sequence[SearchStrategy[Any]] = (
        texts(),
        st.integers(),  # they are far more frequent than the floats and bools below
        numbers(),
        st.binary(max_size=8),
        st.tuples(st.integers(), texts()),
    )
    dicts = [
        st.dictionaries(kind, children, min_size=least, max_size=_most(least)) for kind in sortable
    ]
    if least < 2:
        dicts.append(st.dictionaries(literals(), children, min_size=least, max_size=1))
    return st.one_of(dicts)


def _ordered_dicts(children: _Children, least: int) -> SearchStrategy[Any]:
    # JAX does not sort these, so they may have keys of any kinds.
    pairs = st.dictionaries(texts() | literals(), children, min_size=least, max_size=_most(least))
    return pairs.map(OrderedDict).filter(_flattens)


def _default_dicts(children: _Children, least: int) -> SearchStrategy[Any]:
    factories = st.sampled_from([None, list, int])
    return st.builds(defaultdict, factories, _dicts(children, least)).filter(_flattens)


def _flattens(tree: dict[Any, Any]) -> bool:
    """Return whether JAX can flatten a dict; from 0.4.36 to 0.9 it cannot if a key is None."""
    return None not in tree or _makes_none_keys()


@cache
def _makes_none_keys() -> bool:
    try:
        DictKey(None)
    except TypeError:  # pragma: no cover - JAX 0.4.36 to 0.9
        return False
    return True


def _lists(children: _Children, least: int) -> SearchStrategy[list[Any]]:
    return st.lists(children, min_size=least, max_size=_most(least))


def _containers(children: _Children, least: int) -> SearchStrategy[Any]:
    attrs = st.dictionaries(texts(), children, min_size=least, max_size=_most(least))
    return st.builds(PyTreeContainer, attrs)


def _keyed(children: _Children, least: int) -> SearchStrategy[Any]:
    return st.builds(
        Keyed,
        st.dictionaries(keys().map(spell_key), children, min_size=least, max_size=_most(least)),
    )


_BUILDERS: Final[Mapping[type, Callable[[_Children, int], SearchStrategy[Any]]]] = {
    dict: _dicts,
    OrderedDict: _ordered_dicts,
    defaultdict: _default_dicts,
    list: _lists,
    tuple: lambda children, least: _lists(children, least).map(tuple),
    PyTreeContainer: _containers,
    UnkeyedContainer: lambda children, least: st.builds(UnkeyedContainer, _lists(children, least)),
    type(None): lambda _, __: st.none(),
    Nothing: lambda _, __: st.just(Nothing()),
    Pair: lambda children, _: st.builds(Pair, children, children),
    Record: lambda children, _: st.builds(Record, children, children),
    Keyed: _keyed,
    Unkeyed: lambda children, least: st.builds(Unkeyed, _lists(children, least)),
}

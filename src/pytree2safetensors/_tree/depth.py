"""Limits of trees: how deep JAX can flatten one, and the errors for trees that are too deep or cannot be sorted.

Specification: *Trees and flat dicts*.
"""

from _thread import allocate_lock, start_new_thread
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final

import jax

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import node_at
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer

DEEP: Final = 200  # levels that JAX can flatten for certain
TOO_DEEP: Final = 10_050  # levels that are refused; before Python 3.14, no JAX can flatten them

# Levels of the stack that JAX needs to flatten a node; it calls Python functions for most types.
_STACK: Final[dict[type, int]] = {
    **dict.fromkeys((dict, list, tuple, type(None)), 1),
    **dict.fromkeys((OrderedDict, defaultdict, PyTreeContainer, UnkeyedContainer), 5),
}
_STACK_OF_OTHERS: Final = 50


class DepthCheck:
    """Raises an error for nodes of a tree that are too deep for JAX to flatten.

    It finds the limit with lists. If a node with a Python function were too deep, JAX would lose
    count of the stack, and every later call in this thread would raise a RecursionError.
    """

    def __init__(self) -> None:
        self.limit = 0  # how many nested lists JAX can flatten; 0 until that is needed

    def check(self, depth: int, kind: type, name: str, *, has_children: bool = True) -> None:
        """Raise an error for a node that is too deep; the root is at depth 1."""
        if depth < DEEP:
            return
        self.limit = self.limit or _most_lists()
        if depth - 1 + max(_STACK.get(kind, _STACK_OF_OTHERS), 1 + has_children) > self.limit:
            raise too_deep(name)


def deep_structure(
    tree: Any, structure: Callable[[Any], Any] = jax.tree_util.tree_structure
) -> Any:
    """Return the treedef of a tree that is as deep as JAX can flatten, with an empty stack.

    The thread does not come from `threading`, because such threads have frames of their own.
    """
    result: list[Any] = []
    ended = allocate_lock()
    ended.acquire()

    def work() -> None:  # pragma: no cover - coverage sees only the threads of `threading`
        try:
            result.append(structure(tree))
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            result.append(error)
        finally:
            ended.release()

    start_new_thread(work, ())
    ended.acquire()
    try:
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]
    finally:
        result.clear()  # the traceback would keep itself, and the frames above with their trees


def _most_lists() -> int:
    """Find how many nested lists JAX can flatten."""
    fits, fails = 0, TOO_DEEP
    while fails - fits > 1:
        middle = (fits + fails) // 2
        lists: list[Any] = []
        for _ in range(middle - 1):
            lists = [lists]
        try:
            deep_structure(lists)
            fits = middle
        except (SystemError, RecursionError):
            fails = middle
    return fits


def too_deep(name: str) -> TreeStructureError:
    """Make the error for a tree that is cyclic or too deep."""
    return TreeStructureError(
        f"the tree below {node_at(name)} is cyclic, or nested deeper than JAX can flatten; "
        "flatten it into fewer levels"
    )


def unsortable(name: str, keys: Iterable[Any]) -> TreeStructureError:
    """Make the error for a dict whose keys JAX cannot sort."""
    kinds = ", ".join(sorted({type(key).__name__ for key in keys}))
    return TreeStructureError(
        f"JAX cannot sort the keys of the dict at {node_at(name)}, of these types: {kinds}; "
        "use keys that compare with each other"
    )

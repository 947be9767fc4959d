"""Trees from the names of other programs, which join the keys of a leaf with a separator.

Specification: *Loading*.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.depth import DEEP, DepthCheck
from pytree2safetensors._tree.unflatten import MAX_GAPS

_DIGITS: Final = re.compile(r"([0-9]{1,18})")  # at most what a 64-bit integer holds
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}")


def natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key for text: the numbers in it compare by value."""
    parts = _DIGITS.split(text)
    return [(int(part), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def build_separated(leaves: Mapping[str, Any], separator: str, file: str) -> Any:
    """Build a tree of dicts, with lists where all keys are indices, from names with a separator.

    Raises:
        TreeStructureError: Two names have the same place, or the tree is too deep or has too many gaps.
    """
    try:
        return _build(leaves, separator)
    except TreeStructureError as error:
        raise TreeStructureError(
            f"the names in {file} do not form a tree: {error}; load_abstract(..., flat=True) lists them"
        ) from None


def _build(leaves: Mapping[str, Any], separator: str) -> Any:
    if [*leaves] == [""]:
        return leaves[""]
    names = {tuple(name.split(separator)): name for name in leaves}
    depth = DepthCheck()
    root: dict[str, Any] = {}
    nodes = [root]  # parents before children
    for keys in sorted(names, key=lambda keys: [*map(natural, keys)]):
        if len(keys) > DEEP:
            depth.check(len(keys), dict, names[keys])
        node = root
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                # A leaf that is here already has the key "" in the new node.
                node[key] = {"": node[key]} if key in node else {}
                nodes.append(node[key])
            node = node[key]
        if keys[-1] in node:
            above = separator.join(keys[:-1])
            raise TreeStructureError(
                f"{shorten(above)} and {shorten(names[keys])} are at the same place in the tree"
            )
        node[keys[-1]] = leaves[names[keys]]
    return _with_lists(nodes)


def _with_lists(nodes: list[dict[str, Any]]) -> Any:
    """Make lists of the nodes whose keys are indices; the first node is the root."""
    finished: dict[int, Any] = {}  # by the identity of a node
    gaps = 0
    for node in reversed(nodes):
        for key, child in node.items():
            if isinstance(child, dict):
                node[key] = finished[id(child)]
        if node and all(map(_INDEX.fullmatch, node)):
            by_index = {int(key): child for key, child in node.items()}
            length = max(by_index) + 1
            gaps += length - len(by_index)
            if gaps > MAX_GAPS:
                raise TreeStructureError(
                    f"a list would have {length} elements, and the tree would have more than {MAX_GAPS} gaps"
                )
            finished[id(node)] = [by_index.get(index) for index in range(length)]
        else:
            finished[id(node)] = node
    return finished[id(nodes[0])]

"""Printing of trees: structure, shapes and dtypes, never the values of arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytree2safetensors._messages import shorten

_WIDTH = 88
_DECIMAL = 256  # larger ints, in bits, print in hexadecimal
_MOST_NODES = 10_000  # of a tree that is printed, which may be cyclic


@dataclass
class Printed:
    """A node to print: brackets, and the label of each child."""

    opening: str
    labels: list[str]
    children: list[Any]
    closing: str
    flat: str | None = None  # the node on one line, if that is short enough


def _printed_leaf(leaf: Any) -> str:
    """Print a leaf on one line: `float32[3,4]` if it has a shape and a dtype."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if isinstance(leaf, np.generic) or shape is None or dtype is None:
        return _value(leaf)
    return array_text(dtype, shape)


def array_text(dtype: object, shape: Iterable[int]) -> str:
    """Write the dtype and the shape of an array: `float32[3,4]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def _value(leaf: Any) -> str:
    if type(leaf) is str:
        return shorten(leaf, _WIDTH // 2)
    if type(leaf) is int and leaf.bit_length() > _DECIMAL:
        digits = hex(leaf)  # Python does not write a large int in decimal
        return digits if len(digits) <= _WIDTH else f"{digits[: _WIDTH // 2]}... (an int)"
    return repr(leaf)


def render(tree: Any) -> str:
    """Print a tree, with each node on one line if it fits, and indented otherwise."""
    root = Printed("", [""], [tree], "")
    nodes = [root]
    for node in nodes:  # grows during the loop: parents first
        for position, child in enumerate(node.children):
            opened = _open(child) if len(nodes) < _MOST_NODES else None
            node.children[position] = opened or (
                _printed_leaf(child) if len(nodes) < _MOST_NODES else "..."
            )
            if opened is not None:
                nodes.append(opened)
    for node in reversed(nodes):  # children first
        node.flat = _on_one_line(node)
    return root.flat if root.flat is not None else "\n".join(_lines(root))


def _open(tree: Any) -> Printed | None:
    kind = type(tree)
    if hasattr(kind, "__printed__"):  # a container, which knows its parts
        printed: Printed = kind.__printed__(tree)
        return printed
    if isinstance(tree, dict):
        opening, closing = ("{", "}") if kind is dict else (f"{kind.__name__}({{", "})")
        return Printed(opening, [f"{key!r}: " for key in tree], list(tree.values()), closing)
    if kind is list:
        return Printed("[", [""] * len(tree), list(tree), "]")
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Printed(f"{kind.__name__}(", [f"{name}=" for name in tree._fields], list(tree), ")")
    if kind is tuple:
        return Printed("(", [""] * len(tree), list(tree), ",)" if len(tree) == 1 else ")")
    return None


def _on_one_line(node: Printed) -> str | None:
    parts: list[str] = []
    for label, child in zip(node.labels, node.children, strict=True):
        shown = child.flat if isinstance(child, Printed) else child
        if shown is None or "\n" in shown:
            return None
        parts.append(label + shown)
    line = node.opening + ", ".join(parts) + node.closing
    return line if len(line) <= _WIDTH or not parts else None


def _lines(root: Printed) -> list[str]:
    lines: list[str] = []
    pending: list[tuple[int, str, Any, str]] = [(0, "", root.children[0], "")]
    while pending:
        indent, label, child, after = pending.pop()
        if not isinstance(child, Printed) or child.flat is not None:
            shown = child.flat if isinstance(child, Printed) else child
            lines.append(f"{'  ' * indent}{label}{shown}{after}")
            continue
        lines.append(f"{'  ' * indent}{label}{child.opening}")
        pending.append((indent, child.closing.lstrip(","), "", after))
        pending.extend(
            (indent + 1, *labelled, ",")
            for labelled in zip(reversed(child.labels), reversed(child.children), strict=True)
        )
    return lines

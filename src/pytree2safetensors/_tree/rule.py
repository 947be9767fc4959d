"""Rules: which tensors of a file make which leaves of a tree, and how their axes correspond.

A rule has two sides, the file's and the tree's. The axes of a side are those of its array and those
that the placeholders of its name number. Both sides have the same axes: an axis that numbers names
on one side and belongs to the array on the other stacks arrays, or cuts one.

Specification: *Rules*.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple, NoReturn

from pytree2safetensors._arguments import checked
from pytree2safetensors._tree.patterns import Dims, merged, read_pattern, spread
from pytree2safetensors._tree.placeholders import (
    ANY_TEXT,
    SPELLED,
    Binding,
    Side,
    axes_of,
    fill,
    holes_of,
    read_side,
    with_free_texts,
    with_labels,
)


def _fixed(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("the mapping of sizes does not support item assignment")


class _Sizes(dict[str, int]):
    """Sizes that cannot be changed; a dict, so that `dataclasses.asdict` works."""

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _fixed

    def __reduce__(self) -> tuple[type, tuple[dict[str, int]]]:
        return dict, ({**self},)


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Rule:
    """One correspondence between tensors of a file and leaves of a tree, in both directions.

    Args:
        name: The name of a tensor, with placeholders; None for leaves that are not in the file.
        path: The key path of a leaf, with placeholders, spelled or dotted; None for tensors that are
            not used. A placeholder that a rule has several times, such as {*}, stands for the same
            number or text everywhere. Only in a rule without a name or a path may the texts differ.
        pattern: The axes of the tensor and those of the leaf, in einops notation; "" if they are the
            same.
        sizes: The sizes of axes that do not follow from the shape of the leaf or from labels.

    Raises:
        ValueError: An argument is invalid, or the two sides do not have the same axes.

    Specification: *Rules*.

    >>> rule = Rule("h.{l}.{p:q,k,v}_proj.weight", "layers.{p}", "(h d) e -> l e h d")
    >>> kernel = np.zeros((2, 6, 4, 8))  # two layers, four heads
    >>> {name: leaf.shape for name, leaf in pytree2dict({"layers": {"q": kernel}}, rename=[rule]).items()}
    {'h.0.q_proj.weight': (32, 6), 'h.1.q_proj.weight': (32, 6)}
    """

    __module__ = "pytree2safetensors"
    name: str | None
    path: str | None
    pattern: str
    sizes: Mapping[str, int]

    @checked
    def __init__(
        self, name: str | None, path: str | None, pattern: str = "", /, **sizes: int
    ) -> None:
        vars(self).update(name=name, path=path, pattern=pattern, sizes=_Sizes(sizes))
        parse_rule(self)

    def __reduce__(self) -> tuple[Callable[..., "Rule"], tuple[str | None, str | None, str]]:
        return partial(Rule, **self.sizes), (self.name, self.path, self.pattern)

    def __repr__(self) -> str:
        parts = [repr(self.name), repr(self.path), *([repr(self.pattern)] if self.pattern else [])]
        return f"Rule({', '.join([*parts, *(f'{k}={v!r}' for k, v in self.sizes.items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and _key(self) == _key(other)

    def __hash__(self) -> int:
        return hash(_key(self))


def _key(rule: Rule) -> tuple[object, ...]:
    return rule.name, rule.path, rule.pattern, frozenset(rule.sizes.items())


class ParsedRule(NamedTuple):
    """What a rule means: its sides and their axes."""

    name: Side | None
    path: Side | None
    left: Dims  # the axes of the tensor
    right: Dims  # the axes of the leaf
    counts: Mapping[str, int]  # the sizes from labels and `sizes`
    stacked: tuple[str, ...]  # the axes that number tensors and belong to the leaf
    cut: tuple[str, ...]  # the axes that number leaves and belong to the tensor

    def dims(self, rank: int) -> tuple[Dims, Dims] | None:
        """Return the axes of tensor and leaf for a leaf of this rank; None if the rank does not fit."""
        right = spread(self.right, rank)
        if right is None:
            return None
        return spread(self.left, len(self.left) + rank - len(self.right)) or (), right

    def names(self, binding: Binding, sizes: Mapping[str, int]) -> Iterator[str]:
        """Yield the names of the tensors of a leaf; the last of the stacked axes changes fastest."""
        side = self.name or ()
        if not self.stacked:
            yield fill(side, binding)
            return
        for count in product(*(range(sizes[axis]) for axis in self.stacked)):
            numbers = dict(zip(self.stacked, count, strict=True))
            yield fill(side, Binding({**binding.indices, **numbers}, binding.text))

    def names_among(self, there: Collection[str], binding: Binding) -> list[str]:
        """Return those names of a leaf's tensors that are there, without the sizes of its axes.

        On each axis, the numbers end where a name is missing. Each name is filled in a few times at
        most, even if several numbers give the same name.
        """
        side = self.name or ()
        first = {**binding.indices, **dict.fromkeys(self.stacked, 0)}
        name = fill(side, Binding(first, binding.text))
        found = {name: first} if name in there else {}
        for axis in self.stacked:
            last = found  # the names whose number on this axis is the highest so far
            for number in range(1, self.counts.get(axis, len(there))):
                following = ({**indices, axis: number} for indices in last.values())
                named = {fill(side, Binding(more, binding.text)): more for more in following}
                last = {n: more for n, more in named.items() if n not in found and n in there}
                if not last:
                    break
                found.update(last)
        return [*found]


def parse_rule(rule: Rule) -> ParsedRule:
    """Find out what a rule means.

    Raises:
        ValueError: The rule is invalid. The message begins with the rule.
    """
    try:
        return _parse(rule)
    except ValueError as error:
        raise ValueError(f"{rule!r}: {error}") from None


def _parse(rule: Rule) -> ParsedRule:
    name = None if rule.name is None else read_side(rule.name)
    path = None if rule.path is None else read_side(rule.path)
    if name is None and path is None:
        raise ValueError("it has neither a name nor a path")
    _check_matched(name, path)
    name, path, labels = _labelled(name, path)
    left, right = read_pattern(rule.pattern) if rule.pattern else ((), ())
    if name is None or path is None:
        if rule.pattern or rule.sizes:
            raise ValueError("it needs a name and a path to have a pattern or sizes")
        name, path = name and with_free_texts(name), path and with_free_texts(path)
        return ParsedRule(name, path, (), (), {}, (), ())
    in_file, in_tree = _axes(name, left, "file"), _axes(path, right, "tree")
    _check_sides(in_file, in_tree, rule.pattern)
    _check_sizes(rule.sizes, in_file, labels)
    counts = {**labels, **rule.sizes}
    left, right = merged(left, right, counts)
    _check_sizes_given(right, counts)
    named, numbered = axes_of(name), axes_of(path)
    stacked = tuple(axis for axis in named if axis not in numbered)
    cut = tuple(axis for axis in numbered if axis not in named)
    return ParsedRule(name, path, left, right, counts, stacked, cut)


def _check_matched(name: Side | None, path: Side | None) -> None:
    """Check the side that texts are matched with: the path, or the name if the path is None."""
    labels: dict[str, tuple[str, ...]] = {}
    for hole in holes_of((name if path is None else path) or ()):
        if hole.axis is None:
            hint = (
                "only a rule with a path can have sums"
                if path is None
                else "sums belong in the name"
            )
            raise ValueError(f"{{{hole.text}}} is not a single axis; {hint}")
        if hole.labels and labels.setdefault(hole.axis, hole.labels) != hole.labels:
            raise ValueError(f"{hole.axis!r} has two lists of labels, of which one is needed")
        if hole.axis == SPELLED and (path is None or len(path) > 1):
            raise ValueError("{=} is the whole path of a leaf; for any text, write {*}")


def _labelled(
    name: Side | None, path: Side | None
) -> tuple[Side | None, Side | None, dict[str, int]]:
    """Copy to each side the labels that only the other has. Also return the number of labels."""
    in_name, in_path = (
        {hole.axis or "": hole.labels for hole in holes_of(side or ()) if hole.labels}
        for side in (name, path)
    )
    for axis in in_name.keys() & in_path.keys():
        if len(in_name[axis]) != len(in_path[axis]):
            raise ValueError(
                f"{axis!r} has {len(in_name[axis])} labels in the name, "
                f"and {len(in_path[axis])} in the path"
            )
    counts = {axis: len(labels) for axis, labels in {**in_name, **in_path}.items()}
    return (
        name and with_labels(name, {**in_path, **in_name}),
        path and with_labels(path, {**in_name, **in_path}),
        counts,
    )


def _axes(side: Side, dims: Dims, which: str) -> list[str]:
    """Return all axes of one side. Raise an error if an axis is there twice."""
    found = axes_of(side)
    named = set(found)
    for axis in (axis for dim in dims for axis in dim):
        if axis in found:
            where = "name" if which == "file" else "path"
            places = f"in its {where} and in its pattern" if axis in named else "in its pattern"
            raise ValueError(f"{axis!r} is on the side of the {which} twice, {places}")
        found.append(axis)
    return found


def _check_sides(in_file: list[str], in_tree: list[str], pattern: str) -> None:
    unspaced = not any(" " in side.strip() for side in pattern.split("->"))
    for here, there, which, example in (
        (in_file, in_tree, "file", "... -> {} ..."),
        (in_tree, in_file, "tree", "{} ... -> ..."),
    ):
        alone = next((axis for axis in here if axis not in there), None)
        if alone is None:
            continue
        if alone in {ANY_TEXT, SPELLED}:
            raise ValueError(f"{{{alone}}} is only on the side of the {which}")
        hint = ""
        if not pattern:
            hint = f"; to stack or cut arrays, give a pattern such as {example.format(alone)!r}"
        elif unspaced and len(alone) > 1:  # as in einsum
            hint = "; spaces separate axes, as in 'o i -> i o'"
        raise ValueError(f"{alone!r} is only on the side of the {which}{hint}")


def _check_sizes(sizes: Mapping[str, int], axes: list[str], labels: Mapping[str, int]) -> None:
    for axis, size in sizes.items():
        if axis not in axes:
            raise ValueError(f"{axis}= is the size of an axis that it does not have")
        if type(size) is not int or size < 1:
            raise ValueError(f"{axis}= is a positive int, not {size!r}")
        if labels.get(axis, size) != size:
            raise ValueError(f"{axis}={size}, and {axis!r} has {labels[axis]} labels")


def _check_sizes_given(right: Dims, counts: Mapping[str, int]) -> None:
    """Raise an error if the sizes of the axes of a dimension of the leaf are ambiguous."""
    for dim in right:
        unknown = [axis for axis in dim if axis not in counts]
        if len(unknown) > 1:
            example = ", ".join(f"{axis}=2" for axis in " ".join(unknown[1:]).split())
            raise ValueError(
                f"the size of the leaf's axis ({' '.join(dim)}) does not determine those of "
                f"{', '.join(unknown[:-1])} and {unknown[-1]}; give sizes, as in {example}"
            )

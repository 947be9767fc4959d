"""Families: the views of leaves that a rule cuts from the same tensors.

Specification: *Rules*.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from pytree2safetensors._leaves.regions import Shape
from pytree2safetensors._leaves.views import View
from pytree2safetensors._messages import plural, shorten
from pytree2safetensors._tree.placeholders import Binding, fill
from pytree2safetensors._tree.rule import ParsedRule, Rule

_Piece: TypeAlias = tuple[list[str], str | None]  # axes that are cut, and the next axis


class Lost(NamedTuple):
    """Why a leaf has no place in a file."""

    reason: str
    binding: Binding = Binding({})  # of the rule's path


class _Problem(Exception):
    """Why leaves have no views."""


class _Joined(NamedTuple):
    """An axis of a tensor on which leaves are adjacent."""

    starts: Mapping[tuple[int, ...], int]
    size: int


class Family:
    """The leaves that a rule cuts from the same tensors, or one leaf if it cuts none."""

    def __init__(
        self,
        rule: Rule,
        parsed: ParsedRule,
        indices: Sequence[tuple[int, ...]],
        shapes: Sequence[Shape | None],
        binding: Binding,
    ) -> None:
        self.rule, self.parsed, self.binding = rule, parsed, binding
        self.indices = [dict(zip(parsed.cut, found, strict=True)) for found in indices]
        self.sizes = [_sizes_of(rule, parsed, shape) for shape in shapes]
        fitting = [n for n, sizes in enumerate(self.sizes) if not isinstance(sizes, str)]
        rank = len(shapes[fitting[0]] or ()) if fitting else 0
        self.left, self.right = parsed.dims(rank) or ((), ())
        self.counts = {
            axis: parsed.counts.get(axis) or 1 + max(found[axis] for found in self.indices)
            for axis in parsed.cut
        }

    def views(self, complete: bool) -> list[View | Lost]:
        """Return the views of the leaves, without names."""
        pieces = [list(self._pieces(dim)) for dim in self.left]
        try:
            self._check_counts()
            if complete:
                self._check_complete(self.parsed.cut)
            self._check_same({axis for found in pieces for run, axis in found if run})
            joined = {
                axis: self._joined(run, axis)
                for found in pieces
                for run, axis in found
                if run and axis is not None
            }
        except _Problem as problem:
            reasons = (s if isinstance(s, str) else str(problem) for s in self.sizes)
            return [Lost(reason, self.binding) for reason in reasons]
        return [
            Lost(sizes, self.binding)
            if isinstance(sizes, str)
            else self._view(indices, sizes, pieces, joined)
            for indices, sizes in zip(self.indices, self.sizes, strict=True)
        ]

    def _view(
        self,
        indices: Mapping[str, int],
        sizes: Mapping[str, int],
        pieces: Sequence[Sequence[_Piece]],
        joined: Mapping[str, _Joined],
    ) -> View:
        stacked = self.parsed.stacked
        place = {axis: position for position, axis in enumerate(stacked)}
        fine: list[int] = []
        region: list[tuple[int, int]] = []
        stored: list[int] = []
        for dim in pieces:
            before = len(fine)
            for run, axis in dim:
                if axis is None:
                    fine += [self.counts[name] for name in run]
                    region += [(indices[name], indices[name] + 1) for name in run]
                    continue
                starts, size = joined.get(axis, _Joined({(): 0}, sizes[axis]))
                start = starts[tuple(indices[name] for name in run)]
                place[axis] = len(stacked) + len(fine)
                fine.append(size)
                region.append((start, start + sizes[axis]))
            stored.append(math.prod(fine[before:]))
        axes = tuple(tuple(place[axis] for axis in dim) for dim in self.right)
        counts = tuple(sizes[axis] for axis in stacked)
        return View((), tuple(stored), counts, tuple(fine), tuple(region), axes)

    def _pieces(self, dim: tuple[str, ...]) -> Iterator[_Piece]:
        """Yield the axes of a group that are not cut, each with the cut axes before it."""
        run: list[str] = []
        for axis in dim:
            if axis in self.parsed.cut:
                run.append(axis)
            else:
                yield run, axis
                run = []
        if run:
            yield run, None

    def _joined(self, run: Sequence[str], axis: str) -> _Joined:
        """Return where the leaves start on an axis after axes that are cut."""
        found: dict[tuple[int, ...], int] = {}
        for indices, sizes in self._fitting():
            key = tuple(indices[name] for name in run)
            if found.setdefault(key, sizes[axis]) != sizes[axis]:
                raise _Problem(f"{self.rule!r} cuts a tensor into leaves that differ in {axis}")
        lengths = set(found.values())
        if len(lengths) > 1:
            self._check_complete(run)
            keys = sorted(found)
            starts = accumulate((found[key] for key in keys), initial=0)
            return _Joined(dict(zip(keys, starts, strict=False)), sum(found.values()))
        length, count = lengths.pop(), 1  # missing leaves have the same length
        starts_of = dict.fromkeys(found, 0)
        for position in reversed(range(len(run))):
            for key in found:
                starts_of[key] += key[position] * count * length
            count *= self.counts[run[position]]
        return _Joined(starts_of, count * length)

    def _fitting(self) -> Iterator[tuple[Mapping[str, int], Mapping[str, int]]]:
        """Yield the indices and sizes of leaves that have the axes of the rule."""
        for indices, sizes in zip(self.indices, self.sizes, strict=True):
            if not isinstance(sizes, str):
                yield indices, sizes

    def _check_counts(self) -> None:
        """Check that no leaf has a number outside the size in the rule."""
        for axis, count in self.counts.items():
            most = max(indices[axis] for indices in self.indices)
            if most >= count:
                raise _Problem(
                    f"{self.rule!r} gives {axis} the size {count}, and there is {axis}={most}"
                )

    def _check_same(self, joined: Collection[str | None]) -> None:
        """Check that leaves have the same sizes, except on axes on which they are joined."""
        first: Mapping[str, int] = {}
        for _, sizes in self._fitting():
            first = first or sizes
            for axis in {**first, **sizes}:
                if axis not in joined and sizes.get(axis) != first.get(axis):
                    raise _Problem(
                        f"{self.rule!r} cuts a tensor into leaves that differ in {axis}: "
                        f"{first.get(axis, 'none')} and {sizes.get(axis, 'none')}"
                    )

    def _check_complete(self, axes: Sequence[str]) -> None:
        """Check that all leaves of a tensor exist."""
        there = {
            tuple(found[axis] for axis in axes): isinstance(sizes, str)
            for found, sizes in zip(self.indices, self.sizes, strict=True)
        }
        for indices in _numbers([self.counts[axis] for axis in axes]):
            if there.get(indices) is not False:
                numbers = {**self.indices[0], **dict(zip(axes, indices, strict=True))}
                binding = Binding({**self.binding.indices, **numbers}, self.binding.text)
                path = shorten(fill(self.parsed.path or (), binding))
                problem = "does not fit the rule" if indices in there else "is not there"
                raise _Problem(f"{self.rule!r} cuts a tensor, and its part {path} {problem}")


def _numbers(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the indices of an array, in order. Unlike `product`, make no list of them."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for others in _numbers(counts[1:]):
            yield first, *others


def _sizes_of(rule: Rule, parsed: ParsedRule, shape: Shape | None) -> Mapping[str, int] | str:
    """Return the sizes of the axes of a leaf, or the reason why it does not fit."""
    if shape is None:
        return f"{rule!r} rearranges axes, and this leaf is not an array of numbers"
    dims = parsed.dims(len(shape))
    if dims is None:
        fixed = sum(dim != ("...",) for dim in parsed.right)
        least = "at least " if fixed < len(parsed.right) else ""
        return f"it has {plural(len(shape), 'axis', 'axes')}, and {rule!r} gives it {least}{fixed}"
    found: dict[str, int] = {}
    for dim, size in zip(dims[1], shape, strict=True):
        given = {axis: parsed.counts[axis] for axis in dim if axis in parsed.counts}
        count = math.prod(given.values())
        rest = [axis for axis in dim if axis not in given]
        if size % count if rest else size != count:
            listed = ", ".join(f"{axis}={number}" for axis, number in given.items()) or "1"
            return f"it has shape {list(shape)}, and under {rule!r}, an axis of {size} is made of {listed}"
        found |= given
        found |= dict.fromkeys(rest, size // count)
    return found

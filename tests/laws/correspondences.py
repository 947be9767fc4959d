"""Random rules, with files and trees that correspond element by element.

A correspondence is drawn as its axes. The rule is spelled from them for the library, and the oracle
here works with the axes alone: it knows neither patterns nor placeholders.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytree2safetensors._tree.rule import Rule

Env = Mapping[str, int]  # an index on each axis
Groups = Sequence[Sequence[str]]
DTYPES = ["int32", "bool", "uint8", "float16"]  # which the oldest safetensors knows, too


@dataclass
class Correspondence:
    """A rule, and the axes that it is spelled from."""

    rule: Rule
    sizes: dict[str, int]  # of each axis; of an axis that joins leaves, the size that most have
    labels: dict[str, list[str]]
    name: list[str]  # the axes of the name
    path: list[str]  # the axes of the path
    left: Groups
    right: Groups
    joined: dict[tuple[str, tuple[int, ...]], int]  # sizes of axes that join leaves of unequal size
    runs: dict[str, list[str]]  # which axes come before those
    stem: str
    dotted: bool
    offset: int  # added to the first axis of the name
    is_sum: bool  # the name has the sum of its first two axes, so several numbers give one name
    dtype: str

    def size(self, axis: str, env: Env) -> int:
        """The size of an axis in a leaf."""
        run = self.runs.get(axis)
        if run is None:
            return self.sizes[axis]
        return self.joined.get((axis, tuple(env[name] for name in run)), self.sizes[axis])

    def envs(self, axes: Sequence[str], given: Env) -> Iterator[dict[str, int]]:
        """All indices on some axes, the last one the fastest."""
        ranges = (range(self.size(axis, given)) for axis in axes)
        for numbers in product(*ranges):
            yield {**given, **dict(zip(axes, numbers, strict=True))}

    def leaves(self) -> Iterator[tuple[str, dict[str, int], tuple[int, ...]]]:
        """Each leaf: its spelled path, its indices and its shape."""
        for env in self.envs(self.path, {}):
            shape = tuple(math.prod(self.size(axis, env) for axis in dim) for dim in self.right)
            yield self.path_of(env), env, shape

    def path_of(self, env: Env) -> str:
        """The spelled path of a leaf."""
        return self.stem + "".join(f"@{axis}@{self.shown(axis, env)}" for axis in self.path)

    def shown(self, axis: str, env: Env) -> str:
        """How a name or path shows an index."""
        return self.labels[axis][env[axis]] if axis in self.labels else str(env[axis])

    def name_of(self, env: Env) -> str:
        """The name of a tensor."""
        shown = [self.shown(axis, env) for axis in self.name]
        if self.offset or self.is_sum:
            shown[0] = str(sum(env[axis] for axis in self.name[: 1 + self.is_sum]) + self.offset)
        pairs = [*zip(self.name, shown, strict=True)]
        if self.is_sum:
            del pairs[1]
        return ".".join(["t", *(f"{axis}.{text}" for axis, text in pairs)])

    def positions(self, dim: Sequence[str], given: Env) -> list[tuple[int, ...]]:
        """The indices on the axes of a group in the order in which the tensor has them."""
        found: list[dict[str, int]] = [{}]
        for axis in dim:
            found = [
                {**env, axis: number}
                for env in found
                for number in range(self.size(axis, {**given, **env}))
            ]
        return [tuple(env[axis] for axis in dim) for env in found]

    def elements(self, env: Env) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
        """For each element of a leaf: its index, the name of its tensor, and its index there."""
        axes = [axis for dim in self.right for axis in dim]
        places = [self.positions(dim, env) for dim in self.left]
        right = [self.positions(dim, env) for dim in self.right]
        for full in self.envs(axes, env):
            mine = tuple(
                found.index(tuple(full[axis] for axis in dim))
                for dim, found in zip(self.right, right, strict=True)
            )
            there = tuple(
                found.index(tuple(full[axis] for axis in dim))
                for dim, found in zip(self.left, places, strict=True)
            )
            yield mine, self.name_of(full), there

    def file(self) -> dict[str, NDArray[Any]]:
        """Tensors for all leaves, whose elements differ as far as the dtype has values."""
        found: dict[str, NDArray[Any]] = {}
        count = 0
        for env in self.envs(self.path, {}):
            shape = tuple(len(self.positions(dim, env)) for dim in self.left)
            stacked = [axis for axis in self.name if axis not in self.path]
            for full in self.envs(stacked, env):
                if self.name_of(full) not in found:
                    values = np.arange(count, count + math.prod(shape)).astype(self.dtype)
                    found[self.name_of(full)] = values.reshape(shape)
                    count += values.size
        return found

    def tree(self, file: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The leaves that a file makes, by spelled path."""
        found = {}
        for path, env, shape in self.leaves():
            leaf = np.zeros(shape, self.dtype)
            for mine, name, there in self.elements(env):
                leaf[mine] = file[name][there]
            found[path] = leaf
        return found

    def agree(self, tree: Mapping[str, NDArray[Any]]) -> bool:
        """Whether leaves have the same bits where they are the same element of a tensor."""
        found: dict[tuple[str, tuple[int, ...]], bytes] = {}
        return all(
            found.setdefault((name, there), tree[path][mine].tobytes())
            == tree[path][mine].tobytes()
            for path, env, _ in self.leaves()
            for mine, name, there in self.elements(env)
        )


_LABELS = ("q", "kv", "", "a.b", "0", "10", "x_")


@st.composite
def correspondences(draw: Any, *, max_size: int = 3) -> Correspondence:
    """Rules with a pattern: stacking, cutting, joining, merging and permuting axes."""
    arrays = list("abcd"[: draw(st.integers(0, 4))])
    stacked = list("st"[: draw(st.integers(0, 2))])
    cut = list("uv"[: draw(st.integers(0, 2))])
    shared = list("w"[: draw(st.integers(0, 1))])
    numbered = [*stacked, *cut, *shared]
    sizes = {axis: draw(st.integers(1, max_size)) for axis in [*arrays, *numbered]}
    dotted_path = draw(st.booleans())
    labels = {
        axis: draw(st.permutations(_LABELS))[: sizes[axis]]
        for axis in numbered
        if draw(st.booleans())
    }
    left = draw(_groups([*arrays, *cut]))
    right = draw(_groups([*arrays, *stacked]))
    told: dict[str, int] = {}
    for dim in right:
        unknown = [axis for axis in dim if axis not in labels]
        told |= {axis: sizes[axis] for axis in unknown[: max(0, len(unknown) - 1)]}
    for axis in arrays:  # their sizes may be 0
        if axis not in told and draw(st.integers(0, 9)) == 0:
            sizes[axis] = 0
    runs = {
        dim[end]: run
        for dim in left
        for end, axis in enumerate(dim)
        if axis not in cut and (run := _run_before(dim, end, cut))
    }
    joined = {
        (axis, key): draw(st.integers(0 if draw(st.integers(0, 4)) == 0 else 1, max_size))
        for axis, run in runs.items()
        if axis not in told and draw(st.booleans())
        for key in product(*(range(sizes[name]) for name in run))
    }
    for axis in cut:  # their sizes may follow from the number of leaves
        if axis not in labels and draw(st.booleans()):
            told[axis] = sizes[axis]
    name = draw(st.permutations([*stacked, *shared]))
    path = draw(st.permutations([*cut, *shared]))
    offset = draw(st.integers(0, 2)) if name and name[0] not in labels else 0
    is_sum = len(name) > 1 and not labels.keys() & {*name[:2]} and draw(st.integers(0, 3)) == 0
    doubled = [
        axis
        for axis in arrays
        if axis not in told and sizes[axis] and axis not in runs and draw(st.booleans())
    ]

    def spelled(dims: Groups) -> str:
        written = [
            [f"{axis}1 {axis}2" if axis in doubled else axis for axis in dim] for dim in dims
        ]
        return " ".join(
            dim[0] if len(dim) == 1 and " " not in dim[0] else f"({' '.join(dim)})" if dim else "1"
            for dim in written
        )

    def hole(axis: str, in_name: bool) -> str:
        if in_name and axis == name[0] and (offset or is_sum):
            terms = [*name[: 1 + is_sum], *([str(offset)] if offset else [])]
            return f"{{{'+'.join(terms)}}}"
        own = axis in labels and (in_name or axis not in name)
        return f"{{{axis}:{','.join(labels[axis])}}}" if own else f"{{{axis}}}"

    separator = "." if dotted_path else "@"
    stem = "tree" if dotted_path else "@tree"
    rule = Rule(
        ".".join(["t", *(f"{a}.{hole(a, True)}" for a in name if not (is_sum and a == name[1]))]),
        stem + "".join(f"{separator}{axis}{separator}{hole(axis, False)}" for axis in path),
        f"{spelled(left)} -> {spelled(right)}",
        **told,
    )
    found = {axis: [*listed] for axis, listed in labels.items()}
    return Correspondence(
        rule,
        sizes,
        found,
        name,
        path,
        left,
        right,
        joined,
        runs,
        "@tree",
        dotted_path,
        offset,
        is_sum,
        draw(st.sampled_from(DTYPES)),
    )


def _run_before(dim: Sequence[str], end: int, cut: Sequence[str]) -> list[str]:
    start = end
    while start and dim[start - 1] in cut:
        start -= 1
    return [*dim[start:end]]


@st.composite
def _groups(draw: Any, axes: Sequence[str]) -> list[list[str]]:
    """The axes in any order, some of them grouped, and axes of size 1 between them."""
    found: list[list[str]] = [[]] if draw(st.integers(0, 9)) == 0 else []
    for axis in draw(st.permutations(axes)):
        if found and draw(st.integers(0, 2)) == 0:
            found[-1].append(axis)
        else:
            found.append([axis])
    return found


@st.composite
def regions(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Regions of an array."""
    found = []
    for size in shape:
        start = draw(st.integers(0, size))
        found.append((start, draw(st.integers(start, size))))
    return tuple(found)


@st.composite
def partitions(draw: Any, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Regions that have each element of an array once, as the shards of a sharding do."""
    cuts = []
    for size in shape:
        inner = draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else set()
        ends = [0, *sorted(inner), size]
        cuts.append([*pairwise(ends)])
    return [tuple(found) for found in product(*cuts)]


@st.composite
def shardings(draw: Any, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """Shardings of an array over some of the devices, replicated ones among them."""
    devices = draw(st.permutations(jax.devices()))
    parts: list[int] = []
    for size in shape:
        room = len(devices) // math.prod(parts)
        choices = [n for n in range(1, room + 1) if size % n == 0] or [1]
        parts.append(draw(st.sampled_from(choices)))
    copies = draw(st.integers(1, len(devices) // math.prod(parts)))
    count = copies * math.prod(parts)
    names = [f"axis{number}" for number in range(len(shape))]
    mesh = jax.sharding.Mesh(np.array(devices[:count]).reshape(copies, *parts), ("copy", *names))
    spec = jax.sharding.PartitionSpec(*names)  # type: ignore[no-untyped-call] # JAX gives it no types
    return jax.sharding.NamedSharding(mesh, spec)

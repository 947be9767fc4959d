"""Comparisons: how two files differ, leaf by leaf and bit by bit, in little memory."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._cli.contents import contents
from pytree2safetensors._cli.summary import Leaf, kind_text, leaves_of, with_value, with_values
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import FileFormatError, KeyPathError, errors_of
from pytree2safetensors._format.tensor import COMPLEX128, TensorInfo
from pytree2safetensors._leaves.decode import from_bytes
from pytree2safetensors._leaves.spec import ARRAYS, spec_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._storage.locations import PathLike
from pytree2safetensors._tree.paths import above
from pytree2safetensors._tree.spelling import INDEX, ITEM, UNKEYED


class Values(NamedTuple):
    """How the values of two arrays differ.

    Attributes:
        elements: How many elements an array has.
        differing: How many of them differ in any bit.
        largest: The largest finite absolute difference.
        not_finite: How many differences are not finite, such as those of NaN.
    """

    elements: int
    differing: int = 0
    largest: float | None = None
    not_finite: int = 0

    def plus(self, other: "Values") -> "Values":
        """Add up two parts of one array."""
        known = [found.largest for found in (self, other) if found.largest is not None]
        return Values(
            self.elements,
            self.differing + other.differing,
            max(known, default=None),
            self.not_finite + other.not_finite,
        )


Aspect: TypeAlias = Literal["missing", "added", "kind", "dtype", "shape", "values"]


class Difference(NamedTuple):
    """A leaf that differs.

    Attributes:
        name: Its spelled name.
        aspects: What differs.
        before: The leaf of the first file, if it has one.
        after: The leaf of the second file, if it has one.
        values: How arrays of the same dtype and shape differ.
    """

    name: str
    aspects: list[Aspect]
    before: Leaf | None
    after: Leaf | None
    values: Values | None = None


class Change(NamedTuple):
    """A metadata entry, or a node by its kind, that differs. None stands for what a file lacks."""

    name: str
    before: str | None
    after: str | None


class Comparison(NamedTuple):
    """All differences between two files."""

    leaves: list[Difference]
    nodes: list[Change]
    metadata: list[Change]
    compared: int  # leaves that both files have

    @property
    def same(self) -> bool:
        """Return whether nothing differs."""
        return not (self.leaves or self.nodes or self.metadata)


def compare_files(first: PathLike, second: PathLike) -> Comparison:
    """Compare two files leaf by leaf, bit by bit, in little memory.

    Raises:
        Pytree2SafetensorsError: One is damaged.
        OSError: One cannot be read.
    """
    with collector_paused(), open_checkpoint(first) as old, open_checkpoint(second) as new:
        before = {leaf.name: leaf for leaf in leaves_of(old)}
        after = {leaf.name: leaf for leaf in leaves_of(new)}
        common = (name for name in old.places if name in new.places)
        alike = [name for name in common if not _aspects(before[name], after[name])]
        found = [*_value_differences(alike, before, after, old, new)]
        rest = [_without(alike, before, old), _without(alike, after, new)]
        for name in rest[0].keys() | rest[1].keys():
            found += _differences(name, rest[0].get(name), rest[1].get(name))
        return Comparison(
            sorted(found, key=attrgetter("name")),
            _node_changes(old, new),
            _changes(old.own_metadata(), new.own_metadata()),
            len(before.keys() & after.keys()),
        )


def _without(
    names: Iterable[str], leaves: Mapping[str, Leaf], checkpoint: OpenCheckpoint
) -> dict[str, Leaf]:
    """Return the other leaves, with the values of small ones."""
    left = dict(leaves)
    for name in names:
        del left[name]
    return {leaf.name: leaf for leaf in with_values(left.values(), checkpoint)}


def _node_changes(old: OpenCheckpoint, new: OpenCheckpoint) -> list[Change]:
    names = old.note.nodes.keys() | new.note.nodes.keys()
    return _changes(_kinds_of(names, old), _kinds_of(names, new))


def _kinds_of(names: set[str], checkpoint: OpenCheckpoint) -> dict[str, str]:
    """Return the kinds of nodes. Those that are not noted follow from the names of children."""
    noted = checkpoint.note.nodes
    kinds = {name: kind_text(noted[name]) for name in names & noted.keys()}
    others = names - noted.keys()
    if "" in others and not checkpoint.infos and not noted:
        kinds[""] = "dict"
    for name in [*checkpoint.infos, *noted] if others else []:
        with suppress(KeyPathError):  # a foreign name
            for path, segment in above(name):
                if path in others:
                    kinds.setdefault(path, _kind_above(segment))
    return kinds


def _kind_above(segment: str) -> str:
    if segment.startswith(UNKEYED):
        return "UnkeyedContainer"
    return {ITEM: "dict", INDEX: "list"}.get(segment[0], "PyTreeContainer")


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    names = sorted(before.keys() | after.keys())
    changes = (Change(name, before.get(name), after.get(name)) for name in names)
    return [change for change in changes if change.before != change.after]


def _aspects(before: Leaf, after: Leaf) -> list[Aspect]:
    """List what differs between two leaves, apart from values."""
    aspects: list[Aspect] = []
    if before.kind != after.kind:
        aspects.append("kind")
    elif (before.dtype, before.weak) != (after.dtype, after.weak):
        aspects.append("dtype")
    if before.shape != after.shape:
        aspects.append("shape")
    return aspects


def _differences(name: str, before: Leaf | None, after: Leaf | None) -> Iterator[Difference]:
    """Yield how two leaves differ, or nothing. Those of small leaves have their values."""
    if before is None or after is None:
        yield Difference(name, ["added" if before is None else "missing"], before, after)
        return
    aspects = _aspects(before, after)
    if not aspects and (before.value, before.bits) != (after.value, after.bits):
        aspects = ["values"]
    if aspects:
        yield Difference(name, aspects, before, after)


def _value_differences(
    names: Sequence[str],
    before: Mapping[str, Leaf],
    after: Mapping[str, Leaf],
    old: OpenCheckpoint,
    new: OpenCheckpoint,
) -> Iterator[Difference]:
    """Yield how leaves differ that both files have and that are alike apart from values."""
    with contents(old, names) as first, contents(new, names) as second:
        for (name, pieces), (_, others) in zip(first, second, strict=True):
            info, a, b = old.infos[name], before[name], after[name]
            values: Values | None = None
            differs = False
            for piece, other in zip(pieces, others, strict=True):
                if np.array_equal(piece, other):
                    continue
                differs = True
                if a.is_small:
                    a, b = with_value(a, info, piece), with_value(b, new.infos[name], other)
                if a.kind in ARRAYS:
                    found = _compare_pieces(name, info, piece, other, (old.label, new.label))
                    values = found if values is None else values.plus(found)
            if differs:
                yield Difference(name, ["values"], a, b, values)


def _compare_pieces(
    name: str,
    info: TensorInfo,
    piece: NDArray[np.uint8],
    other: NDArray[np.uint8],
    files: tuple[str, str],
) -> Values:
    with errors_of(files[0]):
        a = items(name, info, piece)
    with errors_of(files[1]):
        b = items(name, info, other)
    differ = (piece.reshape(len(a), -1) != other.reshape(len(b), -1)).any(axis=1)
    a, b = a[differ], b[differ]
    is_packed = _is_packed(info)  # so only bytes can be compared
    elements = info.nbytes if is_packed else math.prod(info.array_shape)
    if a.dtype.kind == "b" or isinstance(info.kind, list) or is_packed:
        return Values(elements, len(a))  # bools and keys have no distance
    distances = _distances(a, b)
    finite = distances[np.isfinite(distances)]
    largest = finite.max().item() if finite.size else None
    return Values(elements, len(a), largest, len(a) - finite.size)


def items(name: str, info: TensorInfo, piece: NDArray[np.uint8]) -> NDArray[Any]:
    """View a piece of a tensor as its values, or as bytes if its dtype is packed."""
    if isinstance(info.kind, list):
        words: NDArray[Any] = piece.view("<u4")
        return words
    if _is_packed(info):
        return piece
    dtype = spec_of(info, "").dtype
    if dtype is None:  # a Python scalar
        return piece
    count = len(piece) // dtype.itemsize
    shape = (count, 2) if info.kind in COMPLEX128 else (count,)
    return from_bytes(piece, info._replace(shape=shape), name)


def _is_packed(info: TensorInfo) -> bool:
    """Return whether the format has the dtype, but NumPy does not."""
    try:
        spec_of(info, "")
    except FileFormatError:
        return not isinstance(info.kind, list)
    return False


def _distances(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Compute the absolute differences, exactly for integers."""
    if a.dtype.kind in "iu":
        high, low = np.maximum(a, b), np.minimum(a, b)
        exact: NDArray[Any] = high.astype(np.uint64) - low.astype(np.uint64)  # modulo 2**64
        return exact
    is_complex = a.dtype.kind == "c"
    wide = np.complex128 if is_complex else np.float64
    with np.errstate(all="ignore"):
        gaps = a.astype(wide) - b.astype(wide)
        # NumPy's abs of a complex number may be wrong in the last digit.
        distances: NDArray[Any] = np.hypot(gaps.real, gaps.imag) if is_complex else np.abs(gaps)
    return distances

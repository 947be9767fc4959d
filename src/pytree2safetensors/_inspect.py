"""Inspection: what a file holds, how two files differ, and whether a file is sound."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._digest import DIGESTS, METADATA, digest_tensor
from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    shorten,
)
from pytree2safetensors._keypath import below
from pytree2safetensors._leaf import COMPLEX128, Form, logical
from pytree2safetensors._load import names_below
from pytree2safetensors._source import PathLike
from pytree2safetensors._store import Store, open_store
from pytree2safetensors._structure import NOTE
from pytree2safetensors._trie import Kind, build
from pytree2safetensors._values import from_bytes, python_value

_PIECE: Final = 8 << 20  # bytes that are read at once; a multiple of every item size


# --- what a file holds ------------------------------------------------------------------------


class Leaf(NamedTuple):
    """A leaf as a header describes it.

    Attributes:
        name: Its spelled name.
        kind: "array", "key", "str", or the type of a Python scalar.
        dtype: The dtype of an array, as JAX calls it, or the implementation of a key.
        shape: The shape of an array.
        nbytes: The bytes of its tensor.
        weak: Whether it is weakly typed.
        value: What lives in the header itself: a str, or the hexadecimal of a large int.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    weak: bool = False
    value: str | None = None

    @property
    def type(self) -> str:
        """The type on a few characters: `float32[3,4]`."""
        if self.kind not in {"array", "key"}:
            return self.kind
        dtype = f"key<{self.dtype}>" if self.kind == "key" else self.dtype
        return f"{dtype}[{','.join(map(str, self.shape))}]{' weak' if self.weak else ''}"


class Summary(NamedTuple):
    """What a file holds, from its header.

    Attributes:
        leaves: The leaves, sorted by name.
        nodes: The nodes that the note speaks of.
        metadata: The metadata, without the entries of this package.
        files: How many files these are.
        file_bytes: Their size.
        digests: Whether there is a digest of each tensor.
    """

    leaves: list[Leaf]
    nodes: Mapping[str, Kind]
    metadata: Mapping[str, str]
    files: int
    file_bytes: int
    digests: bool


def summarise_file(path: PathLike, prefix: str = "") -> Summary:
    """Read the header of a file, and nothing else.

    Raises:
        Pytree2SafetensorsError: The file is damaged, or has nothing at `prefix`.
        OSError: The file cannot be read.
    """
    with collector_paused(), open_store(path) as store:
        names = set(names_below(store, prefix).values())
        leaves = [leaf for leaf in _leaves(store) if leaf.name in names]
        nodes = store.note.nodes
        nodes = {path: nodes[path] for path in nodes if below(prefix, path) is not None}
        return Summary(
            leaves,
            nodes,
            _foreign_metadata(store),
            len(store.sources),
            sum(source.size for source in store.sources),
            store.digests is not None,
        )


def _foreign_metadata(store: Store) -> dict[str, str]:
    ours = {NOTE, DIGESTS, METADATA}
    return {key: store.metadata[key] for key in store.metadata if key not in ours}


def _leaves(store: Store) -> Iterator[Leaf]:
    """The leaves, in order. A dtype is looked up once, whatever the number of tensors."""
    known: dict[tuple[str, str], Leaf] = {}
    for name in sorted(store.forms):
        form = store.forms[name]
        if isinstance(form.kind, list):
            yield _describe(name, form)
            continue
        described = known.get((form.dtype, form.kind or ""))
        if described is None:
            described = known[form.dtype, form.kind or ""] = _describe(name, form)
        kind, dtype, weak = described.kind, described.dtype, described.weak
        shape = form.shape if kind == "array" else ()
        if dtype == "complex128":
            shape = shape[:-1]
        yield Leaf(name, kind, dtype, shape, form.nbytes, weak)


def _describe(name: str, form: Form) -> Leaf:
    try:
        # The name is for messages alone, and would defeat the caches.
        found = logical(form, "")
    except FileFormatError:  # what JAX cannot load here is shown as it is stored
        return Leaf(name, "array", form.dtype, form.shape, form.nbytes)
    dtype = found.impl if found.dtype is None else found.dtype.name
    value = form.kind[1] if isinstance(form.kind, list) and not form.dtype else None
    return Leaf(name, found.kind, dtype, found.shape, form.nbytes, found.weak, value)


# --- how two files differ ---------------------------------------------------------------------


class Values(NamedTuple):
    """How the values of two arrays differ.

    Attributes:
        elements: How many elements an array has.
        differing: How many of them differ in some bit.
        largest: The largest absolute difference among those that have a finite one.
        not_finite: How many differ without one, as NaN does from everything.
    """

    elements: int
    differing: int = 0
    largest: float | None = None
    not_finite: int = 0

    def plus(self, other: "Values") -> "Values":
        """Both together, of two parts of one array."""
        known = [found.largest for found in (self, other) if found.largest is not None]
        return Values(
            self.elements,
            self.differing + other.differing,
            max(known, default=None),
            self.not_finite + other.not_finite,
        )


Aspect = Literal["missing", "added", "kind", "dtype", "shape", "values"]


class Difference(NamedTuple):
    """A leaf that differs: how, what it was, and what it is.

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
    """An entry of the metadata, or a node of the note, that differs; None where there is none."""

    name: str
    before: str | None
    after: str | None


class Comparison(NamedTuple):
    """How two files differ."""

    leaves: list[Difference]
    nodes: list[Change]
    metadata: list[Change]
    compared: int  # leaves that both files have

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.leaves or self.nodes or self.metadata)


def compare_files(first: PathLike, second: PathLike) -> Comparison:
    """Compare two files leaf by leaf, bit by bit, in little memory.

    Raises:
        Pytree2SafetensorsError: One is damaged.
        OSError: One cannot be read.
    """
    with collector_paused(), open_store(first) as old, open_store(second) as new:
        before = {leaf.name: leaf for leaf in _leaves(old)}
        after = {leaf.name: leaf for leaf in _leaves(new)}
        found: list[Difference] = []
        for name in sorted(before.keys() | after.keys()):
            difference = _compare(name, before.get(name), after.get(name), old, new)
            if difference is not None:
                found.append(difference)
        return Comparison(
            found,
            _changes(_spelled_kinds(old.note.nodes), _spelled_kinds(new.note.nodes)),
            _changes(_foreign_metadata(old), _foreign_metadata(new)),
            len(before.keys() & after.keys()),
        )


def _spelled_kinds(nodes: Mapping[str, Kind]) -> dict[str, str]:
    return {path: kind_text(nodes[path]) for path in nodes}


def kind_text(kind: Kind) -> str:
    """A node's kind on one line."""
    return kind if isinstance(kind, str) else f"{kind[0]}({', '.join(kind[1])})"


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    names = sorted(before.keys() | after.keys())
    changes = (Change(name, before.get(name), after.get(name)) for name in names)
    return [change for change in changes if change.before != change.after]


def _compare(
    name: str, before: Leaf | None, after: Leaf | None, old: Store, new: Store
) -> Difference | None:
    if before is None or after is None:
        return Difference(name, ["added" if before is None else "missing"], before, after)
    aspects: list[Aspect] = []
    if before.kind != after.kind:
        aspects.append("kind")
    elif (before.dtype, before.weak) != (after.dtype, after.weak):
        aspects.append("dtype")
    if before.shape != after.shape:
        aspects.append("shape")
    if aspects:
        return Difference(name, aspects, before, after)
    if before.kind in {"array", "key"}:
        values = _compare_values(name, old, new)
        return Difference(name, ["values"], before, after, values) if values.differing else None
    old_value, new_value = _value(name, old), _value(name, new)
    if old_value == new_value:
        return None
    before, after = before._replace(value=old_value), after._replace(value=new_value)
    return Difference(name, ["values"], before, after)


def _value(name: str, store: Store) -> str:
    """A Python scalar or str as text, the same for the same bits alone."""
    form = store.forms[name]
    if isinstance(form.kind, list):
        return str(form.kind[1])
    raw = np.concatenate([*_pieces(store, name)])
    text = repr(python_value(from_bytes(raw, form, name), form))
    return f"{text} (bits {raw[::-1].tobytes().hex()})" if "nan" in text else text


def _pieces(store: Store, name: str) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in order."""
    source, offset = store.places[name]
    nbytes = store.forms[name].nbytes
    for start in range(0, nbytes, _PIECE):
        yield np.frombuffer(source.read(offset + start, min(_PIECE, nbytes - start)), np.uint8)


def _compare_values(name: str, old: Store, new: Store) -> Values:
    form = old.forms[name]
    found = Values(math.prod(form.shape[:-1] if form.kind in COMPLEX128 else form.shape))
    if _is_packed(form):
        found = Values(form.nbytes)  # its bytes are all that can be compared
    for piece, other in zip(_pieces(old, name), _pieces(new, name), strict=True):
        if not np.array_equal(piece, other):
            found = found.plus(_compare_pieces(name, form, piece, other))
    return found


def _compare_pieces(
    name: str, form: Form, piece: NDArray[np.uint8], other: NDArray[np.uint8]
) -> Values:
    a, b = _items(name, form, piece), _items(name, form, other)
    differ = (piece.reshape(len(a), -1) != other.reshape(len(b), -1)).any(axis=1)
    a, b = a[differ], b[differ]
    if a.dtype.kind == "b" or isinstance(form.kind, list) or _is_packed(form):
        return Values(0, len(a))  # truth, random bits: differences mean nothing
    distances = _distances(a, b)
    finite = distances[np.isfinite(distances)]
    largest = finite.max().item() if finite.size else None
    return Values(0, len(a), largest, len(a) - finite.size)


def _items(name: str, form: Form, piece: NDArray[np.uint8]) -> NDArray[Any]:
    """The values in a piece of a tensor; the bytes themselves where it is packed."""
    if isinstance(form.kind, list):
        words: NDArray[Any] = piece.view("<u4")
        return words
    if _is_packed(form):
        return piece
    dtype = logical(form, "").dtype
    if dtype is None:  # a Python scalar
        return piece
    count = len(piece) // dtype.itemsize
    shape = (count, 2) if form.kind in COMPLEX128 else (count,)
    return from_bytes(piece, form._replace(shape=shape), name)


def _is_packed(form: Form) -> bool:
    """Whether the format knows the dtype, and NumPy does not."""
    try:
        logical(form, "")
    except FileFormatError:
        return not isinstance(form.kind, list)
    return False


def _distances(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The absolute differences, exact for integers."""
    if a.dtype.kind in "iu":
        high, low = np.maximum(a, b), np.minimum(a, b)
        exact: NDArray[Any] = high.astype(np.uint64) - low.astype(np.uint64)  # modulo 2**64
        return exact
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        distances: NDArray[Any] = np.abs(a.astype(wide) - b.astype(wide))
    return distances


# --- whether a file is sound ------------------------------------------------------------------


class Verdict(NamedTuple):
    """Whether a file is sound.

    Attributes:
        opened: Whether the header is sound, so that the data could be read.
        tensors: How many tensors were read.
        nbytes: How many bytes these have.
        digests: Whether each had a digest to match.
        problems: What is broken.
        remarks: What is not, and good to know.
    """

    opened: bool
    tensors: int
    nbytes: int
    digests: bool
    problems: list[str]
    remarks: list[str]


def verify_file(path: PathLike) -> Verdict:
    """Check the structure of a file, and read all of it.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        store = open_store(path)
    except Pytree2SafetensorsError as error:
        return Verdict(False, 0, 0, False, [str(error)], [])
    with store:
        problems: list[str] = []
        remarks = [*_tree_remarks(store, problems)]
        for name in store.places:
            problems.extend(_tensor_problems(store, name, remarks))
        nbytes = sum(store.forms[name].nbytes for name in store.places)
        digests = store.digests is not None
        return Verdict(True, len(store.places), nbytes, digests, problems, remarks)


def _tree_remarks(store: Store, problems: list[str]) -> Iterable[str]:
    """Check that names and note make a tree. That names alone make none is no damage."""
    leaves = dict.fromkeys(store.forms, 0)
    try:
        build(leaves, store.note.nodes, store.label)
    except FileFormatError as error:
        problems.append(str(error))
    except (KeyPathError, TreeStructureError) as error:
        try:
            build(leaves, {})
        except (KeyPathError, TreeStructureError):
            yield f"it loads only into a template: {error}"
        else:
            problems.append(f"the note contradicts the names: {error}")


def _tensor_problems(store: Store, name: str, remarks: list[str]) -> Iterable[str]:
    form = store.forms[name]
    try:
        logical(form, "")
    except FileFormatError:
        try:
            logical(form, name)  # again, for its message names the tensor
        except FileFormatError as error:
            remarks.append(str(error))
    try:
        pieces = _checked_pieces(store, name)
        if store.digests is None:
            for _ in pieces:
                pass
        elif digest_tensor(name, form, pieces) != store.digests[name]:
            yield f"{shorten(name)} does not match its digest: its data are damaged"
    except FileFormatError as error:
        yield str(error)


def _checked_pieces(store: Store, name: str) -> Iterator[NDArray[np.uint8]]:
    form = store.forms[name]
    for piece in _pieces(store, name):
        _items(name, form, piece)  # refuses values beyond a dtype of less than a byte
        yield piece


# --- for programs -----------------------------------------------------------------------------


def summary_json(file: str, summary: Summary) -> dict[str, Any]:
    """What `show --json` prints."""
    return {
        "file": file,
        "files": summary.files,
        "file_bytes": summary.file_bytes,
        "tensor_bytes": sum(leaf.nbytes for leaf in summary.leaves),
        "digests": summary.digests,
        "metadata": dict(summary.metadata),
        "nodes": dict(summary.nodes),
        "leaves": [_leaf_json(leaf) for leaf in summary.leaves],
    }


def _leaf_json(leaf: Leaf) -> dict[str, Any]:
    found: dict[str, Any] = {"name": leaf.name, "kind": leaf.kind}
    if leaf.kind in {"array", "key"}:
        found |= {"dtype": leaf.dtype, "shape": list(leaf.shape), "weak": leaf.weak}
    found["bytes"] = leaf.nbytes
    if leaf.value is not None:
        found["value"] = leaf.value
    return found


def comparison_json(first: str, second: str, comparison: Comparison) -> dict[str, Any]:
    """What `diff --json` prints."""
    return {
        "files": [first, second],
        "same": comparison.same,
        "leaves": [
            {
                "name": found.name,
                "differs": found.aspects,
                "before": found.before and _leaf_json(found.before),
                "after": found.after and _leaf_json(found.after),
                "values": found.values and found.values._asdict(),
            }
            for found in comparison.leaves
        ],
        "nodes": [change._asdict() for change in comparison.nodes],
        "metadata": [change._asdict() for change in comparison.metadata],
    }


def verdict_json(file: str, verdict: Verdict) -> dict[str, Any]:
    """What `verify --json` prints."""
    return {"file": file, "sound": not verdict.problems, **verdict._asdict()}


def to_json(content: dict[str, Any]) -> str:
    """JSON that any parser takes: strict, and in ASCII."""
    return json.dumps(content, indent=1, allow_nan=False)

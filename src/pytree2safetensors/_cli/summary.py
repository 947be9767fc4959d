"""Summaries: what a file holds, from its header."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pytree2safetensors._cli.terminal import plain
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.spec import spec_of
from pytree2safetensors._load.api import names_below
from pytree2safetensors._load.checkpoint import OpenCheckpoint, open_checkpoint
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._tree.keypath import strip_prefix
from pytree2safetensors._types import Kind


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
    with collector_paused(), open_checkpoint(path) as store:
        names = set(names_below(store, prefix).values())
        leaves = [leaf for leaf in leaves_of(store) if leaf.name in names]
        nodes = store.note.nodes
        nodes = {path: nodes[path] for path in nodes if strip_prefix(prefix, path) is not None}
        return Summary(
            leaves,
            nodes,
            store.own_metadata(),
            len(store.sources),
            sum(source.size for source in store.sources),
            store.digests is not None,
        )


def leaves_of(store: OpenCheckpoint) -> Iterator[Leaf]:
    """The leaves, in order. A dtype is looked up once, whatever the number of tensors."""
    known: dict[tuple[str, str], Leaf] = {}
    for name in sorted(store.infos):
        info = store.infos[name]
        if isinstance(info.kind, list):
            yield _describe(name, info)
            continue
        described = known.get((info.dtype, info.kind or ""))
        if described is None:
            described = known[info.dtype, info.kind or ""] = _describe(name, info)
        kind, dtype, weak = described.kind, described.dtype, described.weak
        shape = info.shape if kind == "array" else ()
        if dtype == "complex128":
            shape = shape[:-1]
        yield Leaf(name, kind, dtype, shape, info.nbytes, weak)


def _describe(name: str, info: TensorInfo) -> Leaf:
    try:
        # The name is for messages alone, and would defeat the caches.
        found = spec_of(info, "")
    except FileFormatError:  # what JAX cannot load here is shown as it is stored and noted
        noted = " ".join(map(plain, info.kind)) if isinstance(info.kind, list) else info.kind
        dtype = f"{info.dtype} ({noted})" if noted else info.dtype
        return Leaf(name, "array", dtype, info.shape, info.nbytes)
    dtype = found.impl if found.dtype is None else found.dtype.name
    value = info.kind[1] if isinstance(info.kind, list) and not info.dtype else None
    return Leaf(name, found.kind, dtype, found.shape, info.nbytes, found.weak, value)


def kind_text(kind: Kind) -> str:
    """A node's kind on one line."""
    return kind if isinstance(kind, str) else f"{kind[0]}({', '.join(kind[1])})"


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
        "leaves": [leaf_json(leaf) for leaf in summary.leaves],
    }


def leaf_json(leaf: Leaf) -> dict[str, Any]:
    """A leaf, in what any command prints."""
    found: dict[str, Any] = {"name": leaf.name, "kind": leaf.kind}
    if leaf.kind in {"array", "key"}:
        found |= {"dtype": leaf.dtype, "shape": list(leaf.shape), "weak": leaf.weak}
    found["bytes"] = leaf.nbytes
    if leaf.value is not None:
        found["value"] = leaf.value
    return found

"""Summaries: what is in a file, from its header; and the values of small leaves."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._cli.contents import contents
from pytree2safetensors._cli.terminal import plain
from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.tensor import SCALARS, TensorInfo
from pytree2safetensors._leaves.decode import from_bytes, python_value
from pytree2safetensors._leaves.spec import ARRAYS, spec_of
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.prefixes import names_below
from pytree2safetensors._tree.paths import strip_prefix
from pytree2safetensors._tree.printing import array_text
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
        value: The value as text, if it is in the header or was read: a str is itself.
        bits: The bits of a value with a NaN, or of a bool whose byte is above 1, in hexadecimal.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    weak: bool = False
    value: str | None = None
    bits: str = ""

    @property
    def type(self) -> str:
        """Return the printed form of the type: `float32[3,4]`."""
        if self.kind not in ARRAYS:
            return self.kind
        dtype = f"key<{self.dtype}>" if self.kind == "key" else self.dtype
        return array_text(dtype, self.shape) + (" weak" if self.weak else "")

    @property
    def parameters(self) -> int:
        """Return how many elements an array has; 0 for everything else."""
        return math.prod(self.shape) if self.kind == "array" else 0

    @property
    def is_small(self) -> bool:
        """Return whether the value fits on a line: a str, a Python scalar or a 0-d array."""
        return self.kind in {"str", *SCALARS} or (self.kind == "array" and not self.shape)


class Summary(NamedTuple):
    """What is in a file, from its header.

    Attributes:
        leaves: The leaves, sorted by name.
        nodes: The nodes that are in the note.
        metadata: The metadata, without the entries of this package.
        files: The number of files.
        file_bytes: Their size in bytes.
        digests: Whether there is a digest of each tensor.
    """

    leaves: list[Leaf]
    nodes: Mapping[str, Kind]
    metadata: Mapping[str, str]
    files: int
    file_bytes: int
    digests: bool


def summarize(checkpoint: OpenCheckpoint, prefix: str = "") -> Summary:
    """Summarize a checkpoint, or what is below `prefix`.

    Raises:
        Pytree2SafetensorsError: The file has nothing at `prefix`, or `prefix` is not a key path.
    """
    names = set(names_below(checkpoint, prefix).values())
    nodes = checkpoint.note.nodes
    return Summary(
        [leaf for leaf in leaves_of(checkpoint) if leaf.name in names],
        {path: nodes[path] for path in nodes if strip_prefix(prefix, path) is not None},
        checkpoint.own_metadata(),
        len(checkpoint.sources),
        sum(source.size for source in checkpoint.sources),
        checkpoint.digests is not None,
    )


def leaves_of(checkpoint: OpenCheckpoint) -> Iterator[Leaf]:
    """Describe the leaves, sorted by name."""
    known: dict[tuple[str, str], Leaf] = {}  # to look a dtype up once, not for each tensor
    for name in sorted(checkpoint.infos):
        info = checkpoint.infos[name]
        if isinstance(info.kind, list):
            yield _describe(name, info)
            continue
        described = known.get((info.dtype, info.kind or ""))
        if described is None:
            described = known[info.dtype, info.kind or ""] = _describe(name, info)
        kind, dtype, weak = described.kind, described.dtype, described.weak
        shape = info.array_shape if kind == "array" else ()
        yield Leaf(name, kind, dtype, shape, info.nbytes, weak)


def _describe(name: str, info: TensorInfo) -> Leaf:
    try:
        found = spec_of(info, name)
    except FileFormatError:  # JAX cannot load it here: show what is stored and noted
        noted = " ".join(map(plain, info.kind)) if isinstance(info.kind, list) else info.kind
        dtype = f"{info.dtype} ({noted})" if noted else info.dtype
        return Leaf(name, "array", dtype, info.shape, info.nbytes)
    dtype = found.impl if found.dtype is None else found.dtype.name
    value = info.kind[1] if isinstance(info.kind, list) and not info.dtype else None
    return Leaf(name, found.kind, dtype, found.shape, info.nbytes, found.weak, value)


def with_values(leaves: Iterable[Leaf], checkpoint: OpenCheckpoint) -> list[Leaf]:
    """Read the values of small leaves. Other leaves and unreadable values stay as they are."""
    found = {leaf.name: leaf for leaf in leaves}
    unread = [leaf.name for leaf in found.values() if leaf.is_small and leaf.value is None]
    with contents(checkpoint, unread) as tensors:
        for name, [raw] in tensors:
            found[name] = with_value(found[name], checkpoint.infos[name], raw)
    return [*found.values()]


def with_value(leaf: Leaf, info: TensorInfo, raw: NDArray[np.uint8]) -> Leaf:
    """Describe a small leaf with the value that its bytes have, if it can be read."""
    try:
        values = from_bytes(raw, info, leaf.name)
    except FileFormatError:  # a dtype that is unknown here, or bits beyond it
        return leaf
    text = str(values[()]) if leaf.kind == "array" else repr(python_value(values, info))
    is_other_bool = values.dtype.kind == "b" and raw[0] > 1  # which says True, too
    bits = raw[::-1].tobytes().hex() if "nan" in text or is_other_bool else ""
    return leaf._replace(value=text, bits=bits)


def kind_text(kind: Kind) -> str:
    """Write a node's kind on one line."""
    return kind if isinstance(kind, str) else f"{kind[0]}({', '.join(kind[1])})"


def leaf_json(leaf: Leaf) -> dict[str, Any]:
    """Make the object for a leaf that `--json` prints, whatever the command."""
    found: dict[str, Any] = {"name": leaf.name, "kind": leaf.kind}
    if leaf.kind in ARRAYS:
        found |= {"dtype": leaf.dtype, "shape": list(leaf.shape), "weak": leaf.weak}
    found["bytes"] = leaf.nbytes
    if leaf.value is not None:
        found["value"] = _decimal(leaf.value) if leaf.kind == "int" else leaf.value
    if leaf.bits:
        found["bits"] = leaf.bits
    return found


def _decimal(value: str) -> str:
    """Write an int in decimal digits, unless these are more than Python converts."""
    with suppress(ValueError):
        return str(int(value, 0))
    return value

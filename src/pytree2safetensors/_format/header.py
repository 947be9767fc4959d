"""The layout of a safetensors file: names, dtypes, shapes and offsets, computed without I/O.

Specification: *Files*.
"""

import math
import re
from collections.abc import Collection, Mapping
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Final, NamedTuple

import numpy as np

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._format.note import is_reserved
from pytree2safetensors._format.strict_json import read_json, read_json_at
from pytree2safetensors._format.tensor import BITS, TensorInfo

MAX_HEADER: Final = 100_000_000  # bytes, as safetensors' own parser
MAX_SHARD_HEADER: Final = 25_000_000  # bytes, as the Hub's own reader
MAX_DIMENSIONS: Final = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
LENGTH_BYTES: Final = 8  # of the little-endian header length that begins a file
_BEST: Final = 256  # the alignment that GPUs and their copy engines want
_GOOD: Final = 64  # the alignment that JAX needs to take memory over
_PAGE: Final = 4096
_PAGED: Final = 1 << 20  # bytes of data: from here on they begin on a page
_METADATA: Final = "__metadata__"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tensors(NamedTuple):
    """The tensors of a file, and where each starts in the data."""

    names: list[str]
    infos: list[TensorInfo]
    starts: list[int]

    @property
    def size(self) -> int:
        """Return the size of the data in bytes, if the tensors are in the order of their data."""
        return self.starts[-1] + self.infos[-1].nbytes if self.names else 0

    def keep(self, names: Collection[str]) -> "Tensors":
        """Keep only the tensors with these names."""
        if len(names) == len(self.names):
            return self
        rows = [row for row in zip(*self, strict=True) if row[0] in names]
        return Tensors(*map(list, zip(*rows, strict=True))) if rows else Tensors([], [], [])


class Plan(NamedTuple):
    """The layout of a file to write: the bytes before the data, and the tensors in order."""

    head: bytes
    order: list[str]
    size: int  # of the data, in bytes


def plan(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], limit: int | None = None
) -> Plan:
    """Lay out a file. The same tensors and metadata always give the same bytes.

    The header has `limit` bytes at most, or what the format allows. The head is as long with other
    metadata of the same lengths, such as digests not known yet.
    """
    order = in_order(infos)
    pieces = _metadata_pieces(metadata)
    tails = _tails(infos)
    size, start = 0, "0"
    for name in order:
        info = infos[name]
        size += info.nbytes
        stop = str(size)
        pieces.append(f"{quote(name)}{tails[id(info)]}{start},{stop}]}}")
        start = stop
    header = "{" + ",".join(pieces) + "}"
    return Plan(_padded(header, size, MAX_HEADER if limit is None else limit), order, size)


def _metadata_pieces(metadata: Mapping[str, str]) -> list[str]:
    items = ",".join(f"{quote(key)}:{quote(metadata[key])}" for key in sorted(metadata))
    return [f'"{_METADATA}":{{{items}}}'] if metadata else []


def _tails(infos: Mapping[str, TensorInfo]) -> dict[int, str]:
    """Write the part of each entry between name and offsets, once for tensors that share it."""
    unique = {id(info): info for info in infos.values()}
    return {key: _tail(info.dtype, info.shape) for key, info in unique.items()}


def _tail(dtype: str, shape: tuple[int, ...]) -> str:
    sizes = ",".join(map(str, shape))
    return f':{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['


def in_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Sort the names of tensors in the order of their data."""
    # Tensors that keep the alignment come first; the others follow by falling item size, so that
    # each is aligned for its own dtype.
    groups: dict[int, list[str]] = {}
    for name, info in infos.items():
        size = info.nbytes
        rank = 0 if not size % _BEST else 1 if not size % _GOOD else 10 - BITS[info.dtype] // 8
        groups.setdefault(rank, []).append(name)
    return [name for rank in sorted(groups) for name in sorted(groups[rank])]


def entry_length(name: str, info: TensorInfo, start: int) -> int:
    """Return the length of a tensor's entry in a header, with the comma or brace after it."""
    offsets = f"{start},{start + info.nbytes}]}},"
    return len(quote(name)) + len(_tail(info.dtype, info.shape)) + len(offsets)


def empty_length(metadata: Mapping[str, str]) -> int:
    """Return the length of a header without any tensor."""
    return len("{") + sum(len(piece) + len(",") for piece in _metadata_pieces(metadata))


def padded_length(length: int, size: int) -> int:
    """Return the length of a header with its padding, for data of this size in bytes."""
    multiple = _PAGE if size >= _PAGED else _BEST
    return -(-(LENGTH_BYTES + length) // multiple) * multiple - LENGTH_BYTES


def _padded(header: str, size: int, limit: int) -> bytes:
    length = padded_length(len(header), size)
    if length > limit:
        remedy = (
            "save with max_shard_size=, which gives each file a part of the tensors"
            if limit == MAX_HEADER
            else "shorten the names of its tensors"
        )
        raise FileFormatError(
            f"the header would take {length:,} bytes, and the format allows {limit:,}; {remedy}"
        )
    return length.to_bytes(LENGTH_BYTES, "little") + header.ljust(length).encode("ascii")


def header_length(head: bytes, file: str) -> int:
    """Read the length of the header in bytes, from the first eight bytes of a file."""
    if len(head) < LENGTH_BYTES:
        raise FileFormatError(f"{file} has {len(head)} bytes and is not a safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER:
        raise FileFormatError(
            f"{file} is not a safetensors file{_guess(head)}: it begins with a header length of "
            f"{length:,} bytes, and the format allows {MAX_HEADER:,}"
        )
    return length


def check_header(length: int, file_size: int, file: str) -> None:
    """Raise an error if a file is shorter than its header."""
    if LENGTH_BYTES + length > file_size:
        raise FileFormatError(
            f"{file} is truncated: its header should take {length:,} bytes, and the file has "
            f"{file_size:,}"
        )


def check_data(size: int, data_size: int, file: str) -> None:
    """Raise an error if a file has less or more data than its header describes."""
    if size != data_size:
        problem = "is truncated" if size > data_size else "has bytes after its data"
        least = "" if size > data_size else "at least "  # streams are not read to their end
        raise FileFormatError(
            f"{file} {problem}: its header describes {size:,} bytes of data, and "
            f"{least}{data_size:,} follow it"
        )


_MAGIC: Final = {
    b"PK": "a zip archive",
    b"\x80": "a pickle",
    b"\x93NUMPY": "NumPy's",
    b"version ": "a pointer of Git LFS: fetch the file itself",
    b"<": "a web page",
}


def _guess(head: bytes) -> str:
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f" (it looks like {kind})"
    return ""


def parse(header: bytes, file: str) -> tuple[Tensors, dict[str, str]]:
    """Read and check a header.

    Args:
        header: The bytes after the length.
        file: The name of the file in messages.

    Returns:
        The tensors in the order of their data, and the metadata.

    Raises:
        FileFormatError: The header breaks the format.
    """
    if header[:1] != b"{":
        raise FileFormatError(
            f"{file} is not a safetensors file: its header does not begin with {{"
        )
    try:
        text = header.decode()
    except UnicodeDecodeError:
        raise FileFormatError(f"the header of {file} is not valid UTF-8") from None
    tensors, metadata = _read_compact(text) or _read(text, file)
    return _without_holes(tensors, file), metadata


def _without_holes(tensors: Tensors, file: str) -> Tensors:
    """Sort tensors in the order of their data, and check that nothing is between them."""
    stops = [start + info.nbytes for _, info, start in zip(*tensors, strict=True)]
    if tensors.starts == [0, *stops][:-1]:
        return tensors
    rows = sorted(zip(*tensors, strict=True), key=lambda row: (row[2], row[1].nbytes))
    position = 0
    for name, info, start in rows:
        if start != position:
            found = "a hole before" if start > position else "an overlap at"
            raise FileFormatError(f"{file} has {found} the data of {shorten(name)}")
        position = start + info.nbytes
    names, infos, starts = map(list, zip(*rows, strict=True))
    return Tensors(names, infos, starts)


# A tensor as this package and safetensors write it: without spaces, in this order, and with a name
# that JSON does not escape.
_TENSOR: Final = re.compile(
    r',"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]{1,20})","shape":\[([0-9,]*)\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,18}),(0|[1-9][0-9]{0,18})\]\}'
)
_FIRST: Final = f'{{"{_METADATA}":'


def _read_compact(text: str) -> tuple[Tensors, dict[str, str]] | None:
    """Read a header of the usual form quickly; return None for other forms and for errors."""
    known: dict[tuple[str, str], TensorInfo] = {}  # by dtype and shape as text
    infos: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    try:
        rest = "," + text[1:]
        if text.startswith(_FIRST):
            pairs, end = read_json_at(text, len(_FIRST))
            metadata, rest = _metadata(pairs, ""), text[end:]
        parts = _TENSOR.split(rest)
        names, starts, stops = parts[1::6], [*map(int, parts[4::6])], [*map(int, parts[5::6])]
        between = parts[::6]
        unique = len({_METADATA, *names}) > len(names)
        if between.pop().rstrip(" ") != "}" or any(between) or not unique:
            return None
        looks = zip(parts[2::6], parts[3::6], strict=True)
        for name, look, start, stop in zip(names, looks, starts, stops, strict=True):
            info = known.get(look)
            if info is None:
                content = {"dtype": look[0], "shape": read_json(f"[{look[1]}]", "")}
                info = known[look] = _form(name, content | {"data_offsets": [start, stop]}, "")
            elif stop - start != info.nbytes:
                return None
            infos.append(info)
    except FileFormatError:  # `_read` has the better message
        return None
    return Tensors(names, infos, starts), metadata


def _read(text: str, file: str) -> tuple[Tensors, dict[str, str]]:
    """Read a header of any form."""
    pairs = read_json(text, f"the header of {file}", keep_pairs=True, fractions=True)
    metadata = _metadata(next((value for name, value in pairs if name == _METADATA), None), file)
    tensors = Tensors([], [], [])
    known: dict[TensorInfo, TensorInfo] = {}  # one object for equal tensors
    for name, content in pairs:
        if name != _METADATA:
            fields = dict(content) if type(content) is tuple else {}
            info = _form(name, fields, file)
            tensors.names.append(name)
            tensors.infos.append(known.setdefault(info, info))
            tensors.starts.append(fields["data_offsets"][0])
    return tensors, metadata


def _metadata(content: Any, file: str) -> dict[str, str]:
    if content is None:
        return {}
    if type(content) is not tuple or not all(isinstance(value, str) for _, value in content):
        raise FileFormatError(f"the metadata of {file} does not map names to strings")
    if any(_SURROGATE.search(text) for item in content for text in item):
        raise FileFormatError(f"the metadata of {file} holds a lone surrogate")
    return dict(content)


def _form(name: str, content: dict[str, Any], file: str) -> TensorInfo:
    """Read and check the entry of one tensor."""
    if not name.isascii() and _SURROGATE.search(name):
        raise FileFormatError(f"{file} has the name {shorten(name)}, which holds a lone surrogate")
    match content:
        case {"dtype": str(dtype), "shape": list(sizes), "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise FileFormatError(
                f"{file} describes {shorten(name)} without a proper dtype, shape and data_offsets"
            )
    if dtype not in BITS:
        raise FileFormatError(f"{file} gives {shorten(name)} the unknown dtype {shorten(dtype)}")
    if len(sizes) > MAX_DIMENSIONS:
        raise FileFormatError(
            f"{file} gives {shorten(name)} {len(sizes):,} dimensions, and NumPy arrays have at "
            f"most {MAX_DIMENSIONS}"
        )
    if not all(type(size) is int and 0 <= size < 2**64 for size in sizes):
        raise FileFormatError(f"{file} gives {shorten(name)} a shape that is not a list of sizes")
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop < 2**64:
        raise FileFormatError(f"{file} gives {shorten(name)} offsets that are not a range")
    bits = math.prod(sizes) * BITS[dtype]
    if bits != 8 * (stop - start):
        raise FileFormatError(
            f"{file} gives {shorten(name)} {stop - start:,} bytes, and its dtype {dtype} with its "
            f"shape {sizes if len(sizes) <= 8 else '...'} another size"
        )
    if not bits and math.prod(size for size in sizes if size) * BITS[dtype] >= 2**66:
        # The tensor is empty, but no array can have this shape.
        raise FileFormatError(
            f"{file} gives {shorten(name)} a shape that is beyond what memory can address"
        )
    return TensorInfo(dtype, tuple(sizes), stop - start)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise an error if the format cannot hold a caller's metadata."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata map strs to strs, and {key!r} to {value!r} does not")
        if is_reserved(key):
            raise FileFormatError(
                f"the metadata may not set {shorten(key)}, which this package writes itself; "
                "choose another name"
            )
        if _SURROGATE.search(key) or _SURROGATE.search(value):
            raise FileFormatError(
                f"the metadata entry {shorten(key)} holds a lone surrogate, which has no UTF-8 form"
            )

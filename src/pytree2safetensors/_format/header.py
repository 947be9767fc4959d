"""The header of a safetensors file: reading and checking it, without I/O. `layout` writes it.

Specification: *Files*.
"""

import math
import re
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import numpy as np

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.strict_json import read_json, read_json_at
from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._messages import shorten

MAX_HEADER: Final = 100_000_000  # bytes, as safetensors' own parser
MAX_DIMENSIONS: Final = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
LENGTH_BYTES: Final = 8  # of the little-endian header length that begins a file
METADATA: Final = "__metadata__"
SURROGATE = re.compile("[\ud800-\udfff]")


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


def header_length(head: bytes, file: str) -> int:
    """Read the length of the header in bytes, from the first eight bytes of a file."""
    if len(head) < LENGTH_BYTES:
        raise FileFormatError(f"{file} has {len(head)} bytes and is not a safetensors file")
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise FileFormatError(
            f"{file} is not a safetensors file{_guess(head)}: it begins with a header length of "
            f"{length:,} bytes, and the format allows {MAX_HEADER:,}"
        )
    return length


def check_header(length: int, file_size: int, file: str) -> None:
    """Raise an error if a file is shorter than its header."""
    if LENGTH_BYTES + length > file_size:
        other = _guess_by(length)
        problem = f"is not a safetensors file{other}" if other else "is truncated"
        remedy = "" if other else f"; {_WHOLE}"
        raise FileFormatError(
            f"{file} {problem}: its header should take {length:,} bytes, and the file has "
            f"{file_size:,}{remedy}"
        )


def check_data(size: int, data_size: int, file: str) -> None:
    """Raise an error if a file has less or more data than its header describes."""
    if size != data_size:
        problem = "is truncated" if size > data_size else "has bytes after its data"
        least = "" if size > data_size else "at least "  # streams are not read to their end
        remedy = f"; {_WHOLE}" if size > data_size else ""
        raise FileFormatError(
            f"{file} {problem}: its header describes {size:,} bytes of data, and "
            f"{least}{data_size:,} follow it{remedy}"
        )


_WHOLE: Final = "copy or download it again"
# What begins archives, as of torch.save, and gzip files, often with zeros after it.
_COMPRESSED: Final = (b"PK\x03\x04", b"\x1f\x8b\x08")
_MAGIC: Final = {
    b"PK": "a zip archive",
    b"\x1f\x8b": "gzip data: decompress it",
    b"\x80": "a pickle",
    b"\x93NUMPY": "NumPy's",
    b"\x89HDF": "HDF5",
    b"GGUF": "GGUF",
    b"version ": "a pointer of Git LFS: fetch the file itself",
    b"<": "a web page",
}


def _guess(head: bytes) -> str:
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f" (it looks like {kind})"
    return ""


def _guess_by(length: int) -> str:
    """Guess what a file is by its header length, which is allowed and may be that of a safetensors file."""
    head = length.to_bytes(LENGTH_BYTES, "little").rstrip(b"\0")
    return _guess(head) if head in _COMPRESSED else ""


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
            f"{file} is not a safetensors file{_guess_by(len(header))}: its header does not begin with {{"
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
            found = "a gap before" if start > position else "an overlap at"
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
_FIRST: Final = f'{{"{METADATA}":'


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
        unique = len({METADATA, *names}) > len(names)
        if between.pop().rstrip(" ") != "}" or any(between) or not unique:
            return None
        looks = zip(parts[2::6], parts[3::6], strict=True)
        for name, look, start, stop in zip(names, looks, starts, stops, strict=True):
            info = known.get(look)
            if info is None:
                dtype, shape = look
                sizes = [*map(int, shape.split(","))] if shape else []
                if ",".join(map(str, sizes)) != shape:
                    return None
                info = known[look] = _info(name, dtype, sizes, start, stop, "")
            elif stop - start != info.nbytes:
                return None
            infos.append(info)
    except (FileFormatError, ValueError):  # `_read` has the better message
        return None
    return Tensors(names, infos, starts), metadata


def _read(text: str, file: str) -> tuple[Tensors, dict[str, str]]:
    """Read a header of any form."""
    pairs = read_json(text, f"the header of {file}", keep_pairs=True, fractions=True)
    metadata = _metadata(next((value for name, value in pairs if name == METADATA), None), file)
    tensors = Tensors([], [], [])
    # One object for equal tensors. Text is the key: with tuples of integers, a file could make all
    # hashes equal.
    known: dict[str, TensorInfo] = {}
    for name, content in pairs:
        if name != METADATA:
            fields = dict(content) if type(content) is tuple else {}
            info = _entry(name, fields, file)
            tensors.names.append(name)
            tensors.infos.append(known.setdefault(f"{info.dtype}{info.shape}", info))
            tensors.starts.append(fields["data_offsets"][0])
    return tensors, metadata


def _metadata(content: Any, file: str) -> dict[str, str]:
    if content is None:
        return {}
    if type(content) is not tuple or not all(isinstance(value, str) for _, value in content):
        raise FileFormatError(f"the metadata of {file} does not map names to strings")
    if any(SURROGATE.search(text) for item in content for text in item):
        raise FileFormatError(f"the metadata of {file} holds a lone surrogate")
    return dict(content)


def _entry(name: str, content: dict[str, Any], file: str) -> TensorInfo:
    """Read and check the entry of one tensor."""
    if not name.isascii() and SURROGATE.search(name):
        raise FileFormatError(f"{file} has the name {shorten(name)}, which holds a lone surrogate")
    match content:
        case {"dtype": str(dtype), "shape": list(sizes), "data_offsets": [int(start), int(stop)]}:
            return _info(name, dtype, sizes, start, stop, file)
    raise FileFormatError(
        f"{file} describes {shorten(name)} without a proper dtype, shape and data_offsets"
    )


def _info(name: str, dtype: str, sizes: list[Any], start: int, stop: int, file: str) -> TensorInfo:
    """Check what the entry of one tensor says."""
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
            f"{file} gives {shorten(name)} {stop - start:,} bytes, but its dtype {dtype} and "
            f"shape {sizes if len(sizes) <= 8 else '...'} take another size"
        )
    if not bits and math.prod(size for size in sizes if size) * BITS[dtype] >= 2**66:
        # The tensor is empty, but no array can have this shape.
        raise FileFormatError(
            f"{file} gives {shorten(name)} a shape that is beyond what memory can address"
        )
    return TensorInfo(dtype, tuple(sizes), stop - start)

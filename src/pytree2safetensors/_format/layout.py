"""The layout of a file: where its tensors go, the bytes before their data, and which names and metadata fit.

Specification: *Files*, *Sharded folders*.
"""

from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as quote
from typing import Final, NamedTuple

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.header import LENGTH_BYTES, MAX_HEADER, METADATA, SURROGATE
from pytree2safetensors._format.note import is_reserved
from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._messages import shorten

MAX_SHARD_HEADER: Final = 25_000_000  # bytes, as the Hub's own reader
_BEST: Final = 256  # the alignment that GPUs and their copy engines want
_GOOD: Final = 64  # the alignment that JAX needs to take memory over
_PAGE: Final = 4096
_PAGED: Final = 1 << 20  # bytes: data of at least this size start on a page


class Layout(NamedTuple):
    """The layout of a file to write: the bytes before the data, and the tensors in order."""

    head: bytes
    order: list[str]
    size: int  # of the data, in bytes


def lay_out(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], limit: int | None = None
) -> Layout:
    """Lay out a file. The same tensors and metadata always give the same bytes.

    The header has at most `limit` bytes, or what the format allows. Other metadata of the same
    lengths, such as placeholders for digests, give a head of the same length.
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
    head = _padded(header, size, MAX_HEADER if limit is None else limit, metadata)
    return Layout(head, order, size)


def _metadata_pieces(metadata: Mapping[str, str]) -> list[str]:
    items = ",".join(f"{quote(key)}:{quote(metadata[key])}" for key in sorted(metadata))
    return [f'"{METADATA}":{{{items}}}'] if metadata else []


def _tails(infos: Mapping[str, TensorInfo]) -> dict[int, str]:
    """Write the part of each entry between name and offsets, once for tensors that share it."""
    unique = {id(info): info for info in infos.values()}
    return {key: _tail(info) for key, info in unique.items()}


def _tail(info: TensorInfo) -> str:
    sizes = ",".join(map(str, info.shape))
    return f':{{"dtype":"{info.dtype}","shape":[{sizes}],"data_offsets":['


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
    return len(quote(name)) + len(_tail(info)) + len(offsets)


def empty_length(metadata: Mapping[str, str]) -> int:
    """Return the length of a header without any tensor."""
    return len("{") + sum(len(piece) + len(",") for piece in _metadata_pieces(metadata))


def padded_length(length: int, size: int) -> int:
    """Return the length of a header with its padding, for data of this size in bytes."""
    multiple = _PAGE if size >= _PAGED else _BEST
    return -(-(LENGTH_BYTES + length) // multiple) * multiple - LENGTH_BYTES


def _padded(header: str, size: int, limit: int, metadata: Mapping[str, str]) -> bytes:
    length = padded_length(len(header), size)
    if length > limit:
        other = (
            "save with max_shard_size=, which gives each file a part of the tensors"
            if limit == MAX_HEADER
            else "shorten the names of its tensors"
        )
        raise FileFormatError(
            f"the header would take {length:,} bytes, and the format allows {limit:,}; "
            f"{remedy(metadata, limit, other)}"
        )
    return length.to_bytes(LENGTH_BYTES, "little") + header.ljust(length).encode("ascii")


def remedy(metadata: Mapping[str, str], limit: int, other: str) -> str:
    """Say what to do about a header or an index that is too long: `other`, if tensors make it so long."""
    given = {key: value for key, value in metadata.items() if not is_reserved(key)}
    length = empty_length(given)
    if length > limit // 2:
        return f"shorten the metadata, which take {length:,} of them"
    if empty_length(metadata) > limit // 2:
        return "save parts of the tree apart, or shorten its strings"
    return other


def check_name(name: str, path: str) -> None:
    """Raise an error if the header cannot hold the name under which the leaf at `path` is stored."""
    if name == METADATA:
        reason = "the header uses for the metadata"
    elif SURROGATE.search(name):
        reason = "holds a lone surrogate and has no UTF-8 form"
    else:
        return
    raise FileFormatError(
        f"{shorten(path)} would be stored as {shorten(name)}, a name that {reason}; "
        "give it another name"
    )


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise an error if the format cannot hold a caller's metadata."""
    for key, value in metadata.items():
        if is_reserved(key):
            raise FileFormatError(
                f"the metadata may not set {shorten(key)}, which this package writes itself; "
                "choose another name"
            )
        if SURROGATE.search(key) or SURROGATE.search(value):
            raise FileFormatError(
                f"the metadata entry {shorten(key)} holds a lone surrogate, which has no UTF-8 form"
            )

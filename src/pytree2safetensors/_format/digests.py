"""Digests: what `checksum=True` keeps of each tensor and of the metadata.

Specification: *Digests*.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._format.strict_json import read_json
from pytree2safetensors._format.tensor import TensorInfo

DIGESTS: Final = "pytree2safetensors.sha256"  # the entry of the metadata, for tensors,
METADATA: Final = "pytree2safetensors.sha256.metadata"  # and for all other metadata
_DIGITS: Final = 32  # hexadecimal: half of SHA-256, against accidents


def digest_tensor(name: str, info: TensorInfo, pieces: Iterable[Any]) -> str:
    """The digest of a tensor: over its name, dtype, shape and bytes."""
    head = json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":"))
    state = hashlib.sha256(head.encode())
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()[:_DIGITS]


def digest_metadata(metadata: Mapping[str, str]) -> str:
    """The digest of all metadata but itself."""
    rest = {key: value for key, value in metadata.items() if key != METADATA}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def add_digests(metadata: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the digests of tensors, and with a digest of it all."""
    entry = json.dumps(tensors, sort_keys=True, separators=(",", ":"))
    added = {**metadata, DIGESTS: entry}
    return {**added, METADATA: digest_metadata(added)}


def read_digests(
    metadata: Mapping[str, str], names: Iterable[str], file: str
) -> Mapping[str, str] | None:
    """The digests of a file's tensors, after checking that of its metadata; None without any."""
    found = [key for key in (DIGESTS, METADATA) if key in metadata]
    if not found:
        return None
    # Each of the two entries vouches for the other's name.
    if len(found) == 1 or metadata[METADATA] != digest_metadata(metadata):
        raise FileFormatError(
            f"the metadata of {file} do not match their digest: the file is damaged; "
            "restore it from a copy"
        )
    tensors = read_json(metadata[DIGESTS], f"the digests of {file}")
    if not isinstance(tensors, dict) or not all(isinstance(d, str) for d in tensors.values()):
        raise FileFormatError(f"the digests of {file} do not map names to digests")
    differing = sorted(set(tensors) ^ set(names))
    if differing:
        raise FileFormatError(
            f"{file} has tensors and digests that differ at {shorten(differing[0])}: "
            "the file is damaged; restore it from a copy"
        )
    return tensors


def check_digest(
    name: str, info: TensorInfo, pieces: Iterable[Any], digests: Mapping[str, str], file: str
) -> None:
    """Refuse a tensor whose bytes are not those that were saved."""
    if digest_tensor(name, info, pieces) != digests[name]:
        raise FileFormatError(
            f"{shorten(name)} in {file} does not match its digest: its data are damaged; "
            "restore the file from a copy"
        )

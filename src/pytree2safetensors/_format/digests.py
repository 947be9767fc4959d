"""Digests: what `checksum=True` stores for each tensor and for the metadata.

Specification: *Digests*.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.strict_json import read_json, write_json
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._messages import shorten

DIGESTS: Final = "pytree2safetensors.sha256"  # the metadata entry with the digests of tensors
METADATA_DIGEST: Final = "pytree2safetensors.sha256.metadata"  # with that of all other metadata
BLOCK: Final = 16 << 20  # bytes of a tensor that are hashed together; the last block may be shorter
ALONE: Final = 1 << 18  # bytes: threads are slower for smaller blocks
_DIGITS: Final = 32  # hexadecimal: half of SHA-256 is enough to detect accidents


def block_bounds(nbytes: int) -> list[tuple[int, int]]:
    """List where the blocks of a tensor start and stop; an empty tensor has none."""
    return [(start, min(start + BLOCK, nbytes)) for start in range(0, nbytes, BLOCK)]


def hash_block(data: Any) -> bytes:
    """Compute the SHA-256 of one block. It releases the GIL, so threads can share the work."""
    return hashlib.sha256(data).digest()


def hash_blocks(pieces: Iterable[Any]) -> list[bytes]:
    """Compute the SHA-256 of each block of a tensor whose bytes come in pieces of any size."""
    hashes: list[bytes] = []
    state, room = hashlib.sha256(), BLOCK  # of the block that is not full yet
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while len(rest):
            part, rest = rest[:room], rest[room:]
            state.update(part)
            room -= len(part)
            if not room:
                hashes.append(state.digest())
                state, room = hashlib.sha256(), BLOCK
    return [*hashes, state.digest()] if room < BLOCK else hashes


def digest_tensor(name: str, info: TensorInfo, hashes: Iterable[bytes]) -> str:
    """Compute the digest of a tensor: over its name, dtype, shape, and the hash of each block."""
    head = write_json([name, info.dtype, list(info.shape)])
    return hashlib.sha256(b"".join([head.encode(), *hashes])).hexdigest()[:_DIGITS]


def blank_digests(names: Iterable[str]) -> dict[str, str]:
    """Make placeholders for digests that are not known yet; they have the same length."""
    return dict.fromkeys(names, "0" * _DIGITS)


def digest_metadata(metadata: Mapping[str, str]) -> str:
    """Compute the digest of all other metadata."""
    rest = {key: value for key, value in metadata.items() if key != METADATA_DIGEST}
    return hashlib.sha256(write_json(rest).encode()).hexdigest()[:_DIGITS]


def add_digests(metadata: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    """Add the digests of tensors, and the digest of all metadata."""
    added = {**metadata, DIGESTS: write_json(tensors)}
    return {**added, METADATA_DIGEST: digest_metadata(added)}


def read_digests(
    metadata: Mapping[str, str], names: Iterable[str], file: str
) -> Mapping[str, str] | None:
    """Check the digest of the metadata, and return the digests of the tensors, or None."""
    found = [key for key in (DIGESTS, METADATA_DIGEST) if key in metadata]
    if not found:
        return None
    # Each of the two entries is only valid with the other.
    if len(found) == 1 or metadata[METADATA_DIGEST] != digest_metadata(metadata):
        raise FileFormatError(
            f"the metadata of {file} does not match its digest: the file is damaged; "
            "restore it from a copy"
        )
    tensors = read_json(metadata[DIGESTS], f"the table of digests of {file}")
    if not isinstance(tensors, dict) or not all(isinstance(d, str) for d in tensors.values()):
        raise FileFormatError(f"the digests of {file} do not map names to digests")
    differing = sorted(set(tensors) ^ set(names))
    if differing:
        raise FileFormatError(
            f"the digests of {file} do not name exactly its tensors (for example {shorten(differing[0])}): "
            "the file is damaged; restore it from a copy"
        )
    return tensors


def check_digest(
    name: str, info: TensorInfo, hashes: Iterable[bytes], digests: Mapping[str, str], file: str
) -> None:
    """Raise an error if the bytes of a tensor are not those that were saved."""
    if digest_tensor(name, info, hashes) != digests[name]:
        raise FileFormatError(
            f"{shorten(name)} in {file} does not match its digest: its data is damaged; "
            "restore the file from a copy"
        )

"""Shards and their index: names, sizes, and the text of an index.

Specification: *Sharded folders*, *Saving*.
"""

import json
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from operator import index
from typing import Any, Final, SupportsIndex

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.header import MAX_HEADER, SURROGATE
from pytree2safetensors._format.layout import (
    MAX_SHARD_HEADER,
    empty_length,
    entry_length,
    in_order,
    padded_length,
    remedy,
)
from pytree2safetensors._format.note import is_reserved
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._messages import shorten

STEM: Final = "model"  # of file names, if the path is a folder
SUFFIX: Final = ".safetensors"
TOTAL_SIZE: Final = "total_size"  # an entry of the index's metadata that is not a caller's
# The index of what diffusers calls a variant is model.safetensors.index.fp16.json.
INDEX_NAME: Final = re.compile(r"(.*)\.safetensors\.index(\.[^.]+)?\.json", re.DOTALL)
SHARD_NAME: Final = re.compile(r"(.*)-[0-9]{5,}-of-[0-9]{5,}\.safetensors", re.DOTALL)
_LEADS_AWAY: Final = re.compile(r"[/\\\0]")  # characters of names in other folders, on some system
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B)\s*", re.ASCII | re.IGNORECASE)
_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: SupportsIndex | str) -> int:
    """Parse a number of bytes, such as "5GB".

    Raises:
        ValueError: It is not a number of bytes.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(
                f"max_shard_size={shorten(size)} is not a size; write a number of bytes, or a decimal "
                f"number and one of the units {', '.join(_UNITS)}, as in '5GB'"
            )
        size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    limit = index(size)
    if limit < 1:
        raise ValueError(f"max_shard_size is {limit}; a shard holds at least one byte")
    return limit


def into_shards(
    infos: Mapping[str, TensorInfo], limit: int, metadata: Mapping[str, str]
) -> list[list[str]]:
    """Divide tensors into shards as huggingface_hub does, and further to limit their headers.

    Args:
        infos: The tensors.
        limit: The largest size in bytes of a shard that has several tensors.
        metadata: The metadata in the header of each shard.

    Returns:
        The names of the tensors of each shard.
    """
    shards: list[list[str]] = []
    filling: list[str] = []
    size, empty = 0, empty_length(metadata)
    length = empty
    for name in in_order(infos):
        info = infos[name]
        if info.nbytes > limit:  # it gets its own shard
            shards.append([name])
            continue
        longer = length + entry_length(name, info, size)
        larger = size + info.nbytes
        if filling and (larger > limit or padded_length(longer, larger) > MAX_SHARD_HEADER):
            shards.append(filling)
            filling, longer, larger = [], empty + entry_length(name, info, 0), info.nbytes
        filling.append(name)
        length, size = longer, larger
    return [*shards, filling] if filling else shards


def write_index(metadata: Mapping[str, str], weights: Mapping[str, str], total: int) -> bytes:
    """Write an index as huggingface_hub does."""
    content = {"metadata": {**metadata, TOTAL_SIZE: total}, "weight_map": weights}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    if len(text) > MAX_HEADER:
        raise FileFormatError(
            f"the index would take {len(text):,} bytes, and readers allow {MAX_HEADER:,}; "
            f"{remedy(metadata, MAX_HEADER, 'save parts of the tree apart')}"
        )
    return text.encode("ascii")


def index_name(stem: str) -> str:
    """Return the name of the index of shards with this stem."""
    return f"{stem}{SUFFIX}.index.json"


def check_stem(stem: str) -> None:
    """Raise an error if an index cannot name shards with this stem."""
    if not _is_plain(stem + SUFFIX):
        raise FileFormatError(
            f"shards cannot have the stem {shorten(stem)}, because an index names files in a way that "
            "every system understands; choose a name of Unicode characters without a backslash"
        )


def stem_of(name: str) -> str | None:
    """Return the stem of a shard's name; None if it is not the name of a shard."""
    match = SHARD_NAME.fullmatch(name)
    return None if match is None else match[1]


def read_weight_map(content: Any, label: str) -> dict[str, set[str]]:
    """Check the weight map of an index, and return the names of the tensors in each shard."""
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise FileFormatError(
            f"the index {label} has no weight_map from names of tensors to names of files"
        )
    shards: dict[str, set[str]] = {}
    for name, shard in content.items():
        if shard not in shards:
            if not _is_plain(shard):
                raise FileFormatError(
                    f"the index {label} places {shorten(name)} in {shorten(shard)}, which is not "
                    "the plain name of a file in its folder"
                )
            shards[shard] = set()
        shards[shard].add(name)
    return shards


def _is_plain(name: str) -> bool:
    """Return whether a name can only be that of a file in the same folder, on every system."""
    return not (
        name in {"", ".", ".."}
        or _LEADS_AWAY.search(name)
        or SURROGATE.search(name)
        or os.path.splitdrive(name)[0]
    )


def read_index_metadata(content: dict[str, Any], label: str) -> dict[str, str]:
    """Read the metadata of all shards. Ignore the numbers that other programs add."""
    if "metadata" not in content and len(content) > 1:
        raise FileFormatError(
            f"the index {label} has other entries but no metadata: copy it again, or add "
            '"metadata": null to it if it needs none'
        )
    metadata = content.get("metadata")
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise FileFormatError(f"the metadata of the index {label} is not a JSON object")
    found: dict[str, str] = {}
    for key, value in metadata.items():
        if isinstance(value, str) and key != TOTAL_SIZE:
            found[key] = value
        elif is_reserved(key):
            raise FileFormatError(f"the index {label} has {shorten(key)}, which is not a string")
    try:
        "".join([*found, *found.values()]).encode()
    except UnicodeEncodeError:
        raise FileFormatError(f"the metadata of the index {label} holds a lone surrogate") from None
    return found


def split_path(path: str, *, is_folder: bool) -> tuple[str, str]:
    """Return the folder that a path means, and the stem of the file names in it."""
    folder, name = os.path.split(path)
    if not name:
        return folder or os.curdir, STEM
    if is_folder:
        return path, STEM
    found = INDEX_NAME.fullmatch(name)
    if found is not None and found[2] is None:
        return folder or os.curdir, found[1]
    if name.endswith(SUFFIX):
        return folder or os.curdir, name[: -len(SUFFIX)]
    return path, STEM

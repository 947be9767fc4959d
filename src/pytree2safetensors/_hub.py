"""The layout of model hubs: a folder of shards and their index."""

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from decimal import Decimal
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Final, NamedTuple

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._file import TEMPORARY, Writable, absolute, named
from pytree2safetensors._folder import Part, replace_together
from pytree2safetensors._layout import LENGTH_BYTES, MAX_HEADER, Plan, in_order, plan
from pytree2safetensors._leaf import Form
from pytree2safetensors._progress import Progress
from pytree2safetensors._source import PathLike, Source, identity, open_source, shut
from pytree2safetensors._structure import is_reserved, read_json

_STEM: Final = "model"  # of the names, where a path is a folder
_SUFFIX: Final = ".safetensors"
_TOTAL: Final = "total_size"  # the entry of an index that is no metadata
# Of what diffusers calls a variant, the index is model.safetensors.index.fp16.json.
_INDEX: Final = re.compile(r"(.*)\.safetensors\.index(\.[^.]+)?\.json", re.DOTALL)
_SHARD: Final = re.compile(r"(.*)-[0-9]{5,}-of-[0-9]{5,}\.safetensors", re.DOTALL)
_LEADS_AWAY: Final = re.compile(r"[/\\\0]")  # from the folder, on some system
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B)\s*", re.ASCII | re.IGNORECASE)
_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


# --- saving -----------------------------------------------------------------------------------


def save(
    forms: Mapping[str, Form],
    metadata: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    path: PathLike | Writable,
    *,
    max_shard_size: int | str,
    durable: bool,
    report: Progress | None,
) -> None:
    """Save tensors as shards and their index, or as one file where that is enough.

    Args:
        forms: The tensors.
        metadata: The metadata of them all.
        pieces: Gives the bytes of a file that is laid out.
        path: The folder, or a file in it whose stem the names begin with.
        max_shard_size: How many bytes of tensors a shard has at most, if it has more than one.
        durable: Whether the files have reached the disk when this returns.
        report: What to call with bytes written, and bytes altogether.

    Raises:
        ValueError: The size is none, or the path is a file object.
        FileFormatError: The metadata or the index are beyond what the format allows.
        OSError: The files cannot be written.
    """
    limit = parse_size(max_shard_size)
    path = check_path(path)
    if _TOTAL in metadata:
        raise FileFormatError(
            f"the metadata may not set {_TOTAL!r}, which an index of shards says itself; "
            "choose another name"
        )
    folder, stem = _split_path(os.fsdecode(path))
    shards = split(forms, limit)
    parts, rival = (
        _single(forms, metadata, pieces, stem)
        if len(shards) <= 1
        else _sharded(forms, metadata, pieces, stem, shards)
    )
    kept = {part.name for part in parts}

    def stale(found: Iterable[str]) -> list[str]:
        older = sorted(name for name in found if _stem_of(name) == stem and name not in kept)
        return [rival, *older] if rival in found else older

    try:
        replace_together(folder, parts, stale, durable=durable, progress=report)
    except OSError as error:
        raise named(error, path) from error


def _single(
    forms: Mapping[str, Form],
    metadata: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    stem: str,
) -> tuple[list[Part], str]:
    """The one file, and the name that may not stand beside it."""
    planned = plan(forms, metadata)
    return [_part(stem + _SUFFIX, planned, pieces)], _index_of(stem)


def _sharded(
    forms: Mapping[str, Form],
    metadata: Mapping[str, str],
    pieces: Callable[[Plan], Iterable[memoryview]],
    stem: str,
    shards: list[list[str]],
) -> tuple[list[Part], str]:
    """The shards and their index, and the name that may not stand beside them."""
    own = {key: metadata[key] for key in metadata if key == "format"}
    parts: list[Part] = []
    weights: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}{_SUFFIX}"
        weights.update(dict.fromkeys(names, shard))
        planned = plan({name: forms[name] for name in names}, own)
        parts.append(_part(shard, planned, pieces))
    total = sum(form.nbytes for form in forms.values())
    index = write_index(metadata, weights, total)
    parts.append(Part(_index_of(stem), len(index), [memoryview(index)]))
    return parts, stem + _SUFFIX


def _part(name: str, planned: Plan, pieces: Callable[[Plan], Iterable[memoryview]]) -> Part:
    return Part(name, len(planned.head) + planned.size, pieces(planned))


def check_path(path: PathLike | Writable) -> PathLike:
    """The path itself; what is none can be no folder."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"max_shard_size= writes a folder, and {type(path).__name__} is none")
    if not os.fsdecode(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    return path


def parse_size(size: int | str) -> int:
    """The number of bytes that "5GB" means.

    Raises:
        ValueError: It means none.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(
                f"max_shard_size={shorten(size)} is no size; write a number of bytes, or a decimal "
                f"number and one of the units {', '.join(_UNITS)}, as in '5GB'"
            )
        size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if isinstance(size, bool) or size < 1:
        raise ValueError(f"max_shard_size is {size!r}, and a shard takes at least one byte")
    return size


def split(forms: Mapping[str, Form], limit: int) -> list[list[str]]:
    """The names of the tensors of each shard, as huggingface_hub divides them."""
    shards: list[list[str]] = []
    filling: list[str] = []
    size = 0
    for name in in_order(forms):
        nbytes = forms[name].nbytes
        if nbytes > limit:  # alone in its shard, and the one being filled goes on
            shards.append([name])
            continue
        if size + nbytes > limit:
            shards.append(filling)
            filling, size = [], 0
        filling.append(name)
        size += nbytes
    return [*shards, filling] if filling else shards


def write_index(metadata: Mapping[str, str], weights: Mapping[str, str], total: int) -> bytes:
    """The text of an index, as huggingface_hub spells it."""
    entries = {key: quote(text) for key, text in metadata.items()} | {_TOTAL: str(total)}
    places = {name: quote(shard) for name, shard in weights.items()}
    text = f'{{\n  "metadata": {_object(entries)},\n  "weight_map": {_object(places)}\n}}\n'
    if len(text) > MAX_HEADER:
        raise FileFormatError(
            f"the index would take {len(text):,} bytes, and readers allow {MAX_HEADER:,}; "
            "save parts of the tree apart"
        )
    return text.encode("ascii")


def _object(entries: Mapping[str, str]) -> str:
    lines = ",\n".join(f"    {quote(key)}: {entries[key]}" for key in sorted(entries))
    return f"{{\n{lines}\n  }}"


def _split_path(path: str) -> tuple[str, str]:
    """The folder that a path means, and the stem of the names in it."""
    folder, name = os.path.split(path)
    if not name or os.path.isdir(path):
        return path if name else folder or os.curdir, _STEM
    index = _INDEX.fullmatch(name)
    if index is not None and index[2] is None:
        return folder or os.curdir, index[1]
    if name.endswith(_SUFFIX):
        return folder or os.curdir, name[: -len(_SUFFIX)]
    return path, _STEM


def _index_of(stem: str) -> str:
    return f"{stem}{_SUFFIX}.index.json"


def _stem_of(name: str) -> str | None:
    """The stem of a shard's name; None where a name is none of a shard."""
    match = _SHARD.fullmatch(name)
    return None if match is None else match[1]


# --- loading ----------------------------------------------------------------------------------


class Index(NamedTuple):
    """An index that was read: where the tensors are, and the metadata of them all."""

    path: str
    label: str  # what messages call it
    metadata: dict[str, str]
    shards: dict[str, set[str]]  # the names of the files to those of their tensors
    source: Source  # stays open, so that no other file looks the same
    status: tuple[int, ...]

    def is_current(self) -> bool:
        """Whether no save has replaced it since."""
        try:
            return self.status == _status(self.path)
        except OSError:
            return False

    def open(self, shard: str) -> Source:
        """Open a shard. As a hub's cache is made of symbolic links, these are followed."""
        path = self._path_of(shard)
        if not os.path.isfile(path):  # which a pipe is not: opening one would wait
            raise FileFormatError(
                f"{self.label} names the shard {shorten(shard)}, which is missing; "
                "copy the folder again, whole"
            )
        return open_source(path)

    def shut(self, shard: str, source: Source) -> Source:
        """A shard that is open only while it is read."""
        return shut(absolute(self._path_of(shard)), source)

    def _path_of(self, shard: str) -> str:
        return os.path.join(os.path.dirname(self.path), shard)

    def check(self, shard: str, names: Iterable[str]) -> None:
        """Refuse a shard that has other tensors than the index says."""
        differing = sorted(self.shards[shard].symmetric_difference(names))
        if differing:
            verb = "lacks" if differing[0] in self.shards[shard] else "has"
            raise FileFormatError(
                f"the shard {shorten(shard)} {verb} {shorten(differing[0])}, and {self.label} says "
                "otherwise; copy the folder again, whole"
            )


def is_index(path: str) -> bool:
    """Whether a path names an index, and no safetensors file that is called like one."""
    if not path.endswith(".json") or not os.path.isfile(path):
        return path.endswith(".json")
    try:
        source = open_source(path)
    except OSError:  # a save may be replacing it
        return True
    with closing(source):
        head = bytes(source.read(0, min(LENGTH_BYTES + 1, source.size)))
    # As the length of a header, eight characters of JSON are beyond what the format allows.
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES:] != b"{" or length > MAX_HEADER


def locate(path: str) -> str:
    """The file that a path means: itself, its index, or in a folder the index or the one file.

    Raises:
        FileFormatError: The folder has none, or several.
        OSError: The folder cannot be read.
    """
    if not os.path.isdir(path):
        index = path + ".index.json"  # of what was saved as this path, and took several shards
        saved = path.endswith(_SUFFIX) and not os.path.lexists(path)
        return index if saved and _has_parts(index) else path
    names = os.listdir(path)
    indexes = sorted(filter(_INDEX.fullmatch, names))
    if _index_of(_STEM) in indexes:
        indexes = [_index_of(_STEM)]
    single = _STEM + _SUFFIX
    if indexes:
        rivals = {single, indexes[0].rpartition(_SUFFIX + ".index")[0] + _SUFFIX}
        found = [*indexes, *sorted(rivals.intersection(names))]
    elif single in names:
        found = [single]
    else:
        _check_not_cut_short(path, sorted(filter(_SHARD.fullmatch, names)))
        found = sorted(name for name in names if name.endswith(_SUFFIX))
    if len(found) > 1:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise FileFormatError(
            f"the folder {shorten(path)} has {', '.join(map(shorten, found[:5]))}{more}; "
            "name the one to load"
        )
    if not found:
        _check_not_cut_short(path, [name for name in names if name.startswith(TEMPORARY)])
        raise FileFormatError(f"the folder {shorten(path)} has no safetensors file and no index")
    return os.path.join(path, found[0])


def _has_parts(index: str) -> bool:
    """Whether there is an index, or shards that lack it."""
    return os.path.isfile(index) or bool(_shards_beside(index))


def _shards_beside(index: str) -> list[str]:
    """The shards that belong to an index by their names, whether it is there or not."""
    folder, stem = _split_path(index)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if _stem_of(name) == stem)


def _check_not_cut_short(folder: str, shards: list[str]) -> None:
    """Say so where there are shards, finished or not, and no index."""
    if shards:
        raise FileFormatError(
            f"the folder {shorten(folder)} has {shorten(shards[0])} and no index: a save was cut "
            "short or is under way, or the index was not copied; save or copy it again"
        )


def read_index(path: str) -> Index:
    """Read an index, trusting nothing in it; its source is the caller's to close.

    Raises:
        FileFormatError: It is no index, or names what is not in its folder.
        OSError: It cannot be read.
    """
    try:
        status = _status(path)
        source = open_source(path)
    except FileNotFoundError:
        _check_not_cut_short(os.path.dirname(path) or os.curdir, _shards_beside(path))
        raise
    label = source.label
    try:
        content = _read_content(source)
        shards = _read_shards(content.get("weight_map"), label)
        return Index(path, label, _read_metadata(content, label), shards, source, status)
    except BaseException:
        source.close()
        raise


def _status(path: str) -> tuple[int, ...]:
    """What differs between a file and another that takes its place, or between before and after."""
    status = os.stat(path)
    return *identity(status), status.st_ctime_ns


def _read_content(source: Source) -> dict[str, Any]:
    if source.measure(MAX_HEADER) > MAX_HEADER:
        raise FileFormatError(
            f"{source.label} has {source.size:,} bytes, and an index has at most {MAX_HEADER:,}"
        )
    try:
        text = source.read(0, source.size).decode()
    except UnicodeDecodeError:
        raise FileFormatError(f"the index {source.label} is not valid UTF-8") from None
    content = read_json(text, f"the index {source.label}", fractions=True)
    if not isinstance(content, dict):
        raise FileFormatError(f"the index {source.label} is no JSON object")
    return content


def _read_shards(content: Any, label: str) -> dict[str, set[str]]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise FileFormatError(f"the index {label} has no weight_map of names to names of files")
    shards: dict[str, set[str]] = {}
    for name, shard in content.items():
        if shard not in shards:
            if not _is_plain(shard):
                raise FileFormatError(
                    f"the index {label} places {shorten(name)} in {shorten(shard)}, which is no "
                    "plain name of a file in its folder"
                )
            shards[shard] = set()
        shards[shard].add(name)
    return shards


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder; on any system, but for drives."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return not (name in {"", ".", ".."} or _LEADS_AWAY.search(name) or os.path.splitdrive(name)[0])


def _read_metadata(content: dict[str, Any], label: str) -> dict[str, str]:
    """The metadata of all shards. Other programs add numbers, which say nothing of the tensors."""
    if "metadata" not in content and len(content) > 1:
        raise FileFormatError(f"the index {label} has another entry in place of its metadata")
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FileFormatError(f"the metadata of the index {label} are no JSON object")
    found: dict[str, str] = {}
    for key, value in metadata.items():
        if isinstance(value, str) and key != _TOTAL:
            found[key] = value
        elif is_reserved(key):
            raise FileFormatError(f"the index {label} has {shorten(key)}, which is no string")
    try:
        "".join([*found, *found.values()]).encode()
    except UnicodeEncodeError:
        raise FileFormatError(f"the metadata of the index {label} hold a lone surrogate") from None
    return found

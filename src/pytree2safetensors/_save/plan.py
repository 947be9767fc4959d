"""The plan of a save: its files, where everything is in them, and where digests go.

A plan is plain data, computed once and without I/O. A file, a folder, a stream and several processes
carry out the same plan.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.digests import add_digests, blank_digests
from pytree2safetensors._format.index import (
    SUFFIX,
    TOTAL_SIZE,
    check_stem,
    index_name,
    into_shards,
    write_index,
)
from pytree2safetensors._format.layout import MAX_SHARD_HEADER, lay_out
from pytree2safetensors._format.note import FORMAT
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._save.contents import Contents


class FilePlan(NamedTuple):
    """A safetensors file to write.

    Attributes:
        name: Its name in the folder; "" if the save is one file.
        head: The bytes before the data. If they contain digests, these are placeholders, and
            `sealed` returns the final bytes, which have the same length.
        tensors: The names of its tensors, in the order of their data.
        size: The size of the file in bytes.
    """

    name: str
    head: bytes
    tensors: list[str]
    size: int

    def starts(self, infos: Mapping[str, TensorInfo]) -> list[int]:
        """Return where each tensor starts, in bytes from the start of the file."""
        sizes = (infos[name].nbytes for name in self.tensors)
        return [*accumulate(sizes, initial=len(self.head))][:-1]


class SavePlan(NamedTuple):
    """What a save writes.

    Attributes:
        infos: The tensors.
        metadata: The metadata of them all, without digests.
        files: The safetensors files, in the order in which they are written.
        index_name: The name of the index, which is written last; "" for a save of one file.
        checksum: Whether the metadata has a digest of each tensor.
    """

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    files: list[FilePlan]
    index_name: str
    checksum: bool

    def sealed(self, digests: Mapping[str, str] | None = None) -> bytes:
        """Return the head of a single file, or the index, with digests.

        If no digests are given, zeros take their place, so that the length is known in advance.
        """
        metadata = self.metadata
        if self.checksum:
            metadata = add_digests(metadata, digests or blank_digests(self.infos))
        if not self.index_name:
            return lay_out(self.infos, metadata).head
        places = {name: file.name for file in self.files for name in file.tensors}
        total = sum(info.nbytes for info in self.infos.values())
        return write_index(metadata, places, total)


def plan_file(contents: Contents, *, checksum: bool, name: str = "") -> SavePlan:
    """Plan one file."""
    infos, _, metadata = contents
    whole = add_digests(metadata, blank_digests(infos)) if checksum else metadata
    head, tensors, size = lay_out(infos, whole)
    file = FilePlan(name, head, tensors, len(head) + size)
    return SavePlan(infos, metadata, [file], "", checksum)


def plan_folder(contents: Contents, stem: str, limit: int, *, checksum: bool) -> SavePlan:
    """Plan shards of at most `limit` bytes of tensors and their index, or one file if that is enough."""
    infos, _, metadata = contents
    check_stem(stem)
    if TOTAL_SIZE in metadata:
        raise FileFormatError(
            f"the metadata may not set {TOTAL_SIZE!r}, which the index of shards sets itself; "
            "choose another name"
        )
    own = {key: metadata[key] for key in metadata if key in FORMAT}  # of each shard
    shards = into_shards(infos, limit, own)
    if len(shards) <= 1:
        return plan_file(contents, checksum=checksum, name=stem + SUFFIX)
    files = []
    for number, names in enumerate(shards, 1):
        head, tensors, size = lay_out({name: infos[name] for name in names}, own, MAX_SHARD_HEADER)
        name = f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}"
        files.append(FilePlan(name, head, tensors, len(head) + size))
    return SavePlan(infos, metadata, files, index_name(stem), checksum)

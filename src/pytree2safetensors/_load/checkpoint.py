"""An open checkpoint: a file or a folder of shards, checked and ready to read.

Specification: *The note*, *Digests*, *Loading*.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from itertools import repeat

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import FileFormatError, KeyPathError, UnreadableLeaf, errors_of
from pytree2safetensors._format.digests import read_digests
from pytree2safetensors._format.header import Tensors
from pytree2safetensors._format.note import NOTE, Note, is_reserved, read_note
from pytree2safetensors._format.tensor import TensorInfo, check_kind
from pytree2safetensors._leaves.spec import LeafSpec, spec_of
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.remote_file import RemoteSource, check_together
from pytree2safetensors._tree.claims import check_nodes
from pytree2safetensors._tree.keypath import string2keypath

_STARTS = 256  # shards in a store whose first bytes are kept: at most 25.6 MB


class OpenCheckpoint:
    """A file or a folder of shards: its tensors and where they are, metadata, and the note.

    Attributes:
        label: Its name in messages.
        infos: How each leaf is stored, by name, including leaves without a tensor.
        places: The source and the offset of each tensor, in the order of their data.
        metadata: The metadata as stored.
        note: The kinds of nodes and leaves.
        digests: The digest of each tensor, if the file has digests.
    """

    def __init__(self, label: str, sources: Iterable[ByteSource]) -> None:
        self.label = label
        self.sources = list(sources)
        self.infos: dict[str, TensorInfo] = {}
        self.places: dict[str, tuple[ByteSource, int]] = {}
        self._specs: dict[int, LeafSpec | str] = {}
        self.metadata: dict[str, str] = {}
        self.note = Note({}, {})
        self.digests: Mapping[str, str] | None = None

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with closing(self):
            if kind is None:
                for source in self.sources:
                    source.check()
                check_together(self.sources)

    def close(self) -> None:
        """Close all sources, even if one of them raises an error."""
        with ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)

    @property
    def in_flight(self) -> int:
        """Return how many reads to have in progress; 0 if the number of cores decides."""
        return max((source.in_flight for source in self.sources), default=0)

    @collector_paused()
    def add(self, source: ByteSource, start: int, tensors: Tensors) -> None:
        """Add the tensors of a file whose data starts at `start`."""
        if len(self.sources) > _STARTS and isinstance(source, RemoteSource):
            source.forget_start()
        offsets = [start + begin for begin in tensors.starts]
        self.infos.update(zip(tensors.names, tensors.infos, strict=True))
        self.places.update(zip(tensors.names, zip(repeat(source), offsets), strict=True))

    @collector_paused()
    def add_metadata(self, metadata: dict[str, str]) -> None:
        """Check the metadata against the tensors, and add it."""
        self.metadata = metadata
        self.digests = read_digests(metadata, self.infos, self.label)
        self.note = read_note(metadata.get(NOTE), self.label)
        for name, kind in self.note.leaves.items():
            info = self.infos.get(name)
            if isinstance(kind, list) and kind[0] in {"int", "str"}:
                if info is not None:
                    raise FileFormatError(
                        f"{self.label} has a tensor {shorten(name)}, but its note says that it has no tensor"
                    )
                _check_path(name, self.label)
                self.infos[name] = TensorInfo("", (), 0, kind)
            elif info is None:
                raise FileFormatError(
                    f"the note of {self.label} names {shorten(name)}, which is not a tensor"
                )
            else:
                with errors_of(self.label):
                    check_kind(kind, info.dtype, info.shape, name)
                self.infos[name] = info._replace(kind=kind)
        check_nodes(self.note.nodes, self.infos, self.label)

    def own_metadata(self) -> dict[str, str]:
        """Return the metadata without the entries of this package, except `format`."""
        return {key: value for key, value in self.metadata.items() if not is_reserved(key)}

    def spec_of(self, name: str) -> LeafSpec:
        """Return the leaf with this name, without its values."""
        found = self.spec_or_reason(name)
        if isinstance(found, str):
            raise FileFormatError(f"in {self.label}, {shorten(name)} {found}")
        return found

    def spec_or_reason(self, name: str) -> LeafSpec | str:
        """Return the leaf with this name, or why it cannot be loaded."""
        info = self.infos[name]
        found = self._specs.get(id(info))  # equal tensors share their info
        if found is None:
            with errors_of(self.label):
                try:
                    found = spec_of(info, name)
                except UnreadableLeaf as error:
                    found = error.reason
            self._specs[id(info)] = found
        return found


def _check_path(name: str, label: str) -> None:
    """Raise an error if a leaf in the note has a name that no save writes."""
    try:
        string2keypath(name)
    except KeyPathError as error:
        raise FileFormatError(f"the note of {label} has an impossible leaf: {error}") from None

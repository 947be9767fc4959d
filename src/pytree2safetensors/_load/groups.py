"""Groups: small tensors that follow each other in the file are read as one.

Those of one dtype and shape, at equal distances, are the rows of one NumPy array, because rows are
faster to make than arrays.

Specification: *Loading*.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from pytree2safetensors._format.header import MAX_DIMENSIONS
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.slots import Batch, Rows, Slot, Wanted
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._storage.byte_source import ByteSource


class _Form:
    """What equal tensors that become equal leaves share."""

    def __init__(self, info: TensorInfo, leaf: TemplateLeaf, is_small: bool) -> None:
        self.info, self.leaf, self.nbytes, self.is_small = info, leaf, info.nbytes, is_small


_Small: TypeAlias = tuple[int, int, _Form]  # its offset in the file, and the position of its leaf


def plan_groups(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    keeps_memory: Callable[[TemplateLeaf], bool],
    limit: int,
) -> tuple[list[Batch], list[tuple[int, Wanted]]]:
    """Plan small plain arrays; return their batches, and the other leaves with their positions."""
    files, others = _small_tensors(checkpoint, wanted, keeps_memory)
    batches: list[Batch] = []
    slots: list[Slot] = []
    size = 0
    for tensors in files.values():
        for nbytes, rows in _groups(sorted(tensors), limit):
            size = -(-size // ALIGNMENT) * ALIGNMENT
            if size + nbytes > limit and slots:
                batches.append(Batch(slots, size))
                slots, size = [], 0
            name = wanted[rows[0].positions[0]].name
            slots.append(Slot(name, rows[0].info, None, size, nbytes, [], rows=rows))
            size += nbytes
    if slots:
        batches.append(Batch(slots, size))
    return batches, others


def _small_tensors(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    keeps_memory: Callable[[TemplateLeaf], bool],
) -> tuple[Mapping[ByteSource, list[_Small]], list[tuple[int, Wanted]]]:
    """Divide leaves into small plain arrays for the default device, by file, and others."""
    infos, places = checkpoint.infos, checkpoint.places
    digested = checkpoint.digests is not None  # digests are of single tensors
    forms: dict[tuple[int, int], _Form] = {}
    files: defaultdict[ByteSource, list[_Small]] = defaultdict(list)
    others: list[tuple[int, Wanted]] = []
    form: _Form | None = None
    for position, want in enumerate(wanted):
        source, leaf = want
        if isinstance(source, str):
            info = infos[source]
            if form is None or info is not form.info or leaf is not form.leaf:
                key = id(info), id(leaf)
                form = forms.get(key)
                if form is None:
                    is_small = not digested and _is_small(info, leaf) and not keeps_memory(leaf)
                    form = forms[key] = _Form(info, leaf, is_small)
            if form.is_small:
                file, offset = places[source]
                files[file].append((offset, position, form))
                continue
        others.append((position, want))
    return files, others


def _is_small(info: TensorInfo, leaf: TemplateLeaf) -> bool:
    plain = info.kind is None and leaf.spec.kind == "array" and leaf.target == "jax"
    placed = leaf.sharding is not None or leaf.format is not None
    has_rows = len(info.shape) < MAX_DIMENSIONS  # rows are an array with another axis
    return plain and not placed and has_rows and 0 < info.nbytes < TAKEN_OVER


def _groups(tensors: Iterable[_Small], limit: int) -> Iterator[tuple[int, list[Rows]]]:
    """Yield the bytes of each group of at most `limit` bytes, and its rows; there is at least one."""
    found: list[Rows] = []
    last: dict[_Form, Rows] = {}
    start, stop = 0, -1  # of the group in the file
    for offset, position, form in tensors:
        if offset > stop or offset + form.nbytes - start > limit:
            if found:
                yield stop - start, found
            start, found, last = offset, [], {}
        place = offset - start
        rows = last.get(form)
        if rows is None or place != rows.start + rows.step * len(rows.positions):
            if rows is None or len(rows.positions) > 1:
                rows = last[form] = Rows(form.info, place)
                found.append(rows)
            else:
                rows.step = place - rows.start
        rows.positions.append(position)
        stop = offset + form.nbytes
    yield stop - start, found

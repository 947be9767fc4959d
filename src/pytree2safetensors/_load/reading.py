"""The reader: it executes the plan of a load in bounded batches.

Arrays on the host keep the memory that their batch is read into; data for other devices goes through
a ring of bounded size.

Specification: *Loading*, *Loading into a template*.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import Pytree2SafetensorsError
from pytree2safetensors._leaves.placement import is_on_host
from pytree2safetensors._leaves.staging import default_device
from pytree2safetensors._leaves.to_jax import is_mapped
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.ahead import Ahead, Staged
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.eager import check_interrupt, eagerly
from pytree2safetensors._load.finishing import Finisher
from pytree2safetensors._load.plan import plan_batches, separated
from pytree2safetensors._load.ranges import Place, mapped
from pytree2safetensors._load.shardings import other_memory
from pytree2safetensors._load.slots import Batch, Use, Wanted
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._load.verifying import check_digests
from pytree2safetensors._storage.byte_source import PIECE, Read, joined_reads
from pytree2safetensors._storage.progress import Progress, Report, closing_bar
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.threads import Task, workers

T = TypeVar("T")
R = TypeVar("R")

_BATCH: Final = 64 << 20  # bytes in memory that a single leaf can keep alive
_COPIED_BATCH: Final = 8 << 20  # bytes, if JAX makes a copy of what rules rearrange
_STAGED_BATCH: Final = 32 << 20  # bytes to transfer to other devices at once
_READERS: Final = 4  # threads; more do not help with fresh memory
_STAGED_READERS: Final = 12  # threads for reused memory; more threads slow each other down
_STAGED_PIECE: Final = 12 << 20  # bytes of one read there, long enough for the threads to overlap


def read_leaves(
    checkpoint: OpenCheckpoint, wanted: Sequence[Wanted], *, mmap: bool, progress: Progress | None
) -> list[Any]:
    """Read leaves.

    Raises:
        FileFormatError: The file changed, or its data contradicts its header or digests.
        OSError: The file cannot be read.
        RuntimeError: JAX makes no arrays here.
    """
    try:
        return eagerly(lambda: _read_leaves(checkpoint, wanted, mmap, progress))
    except Exception as error:
        if isinstance(error, OSError | Pytree2SafetensorsError) or not is_mapped():
            raise
        raise RuntimeError(
            "JAX makes no arrays in a function that jax.shard_map or jax.pmap runs without "
            "jax.jit; load before the call, or compile it with jax.jit"
        ) from error


def _read_leaves(
    checkpoint: OpenCheckpoint, wanted: Sequence[Wanted], mmap: bool, progress: Progress | None
) -> list[Any]:
    device = None if mmap else _staged_device(wanted)
    by_rules = any(isinstance(source, View) for source, _ in wanted)
    staged = device is not None
    limit = _STAGED_BATCH if staged else _COPIED_BATCH if by_rules else _BATCH
    with collector_paused():
        batches = list(plan_batches(checkpoint, wanted, limit, _keeps_memory(staged), _far(staged)))
    report = Report(progress, sum(slot.nbytes for batch in batches for slot in batch.slots))
    finisher = Finisher(checkpoint, wanted)
    with closing_bar(progress):
        if mmap:
            _map(checkpoint, batches, finisher, report)
        else:
            _read(checkpoint, batches, finisher, report, device)
        finisher.finish_unread()
        report.finish()
    return finisher.leaves


class _InOrder(ReadPool):
    """One thread, which reads in the order of the calls. Other threads do what needs no reading."""

    def __init__(self, count: int, piece: int) -> None:
        super().__init__(count, piece)
        self._others = ReadPool(workers(_READERS))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        super().__exit__(kind)
        self._others.__exit__(kind)

    def start(
        self,
        reads: Iterable[Read],
        tasks: Iterable[Callable[[], None]],
        report: Callable[[int], None],
    ) -> list[Task[None]]:
        if self._pool is None:
            return super().start(reads, tasks, report)
        # Even a few bytes wait for the reads before them.
        batches = joined_reads(reads, self._piece)
        reading = [partial(self._read, batch, report) for batch in batches]
        return super().start((), [*reading, *tasks], report)

    def map(self, function: Callable[[T], R], values: Iterable[T]) -> list[Task[R]]:
        return self._others.map(function, values)


def _staged_device(wanted: Sequence[Wanted]) -> jax.Device | None:
    """Return a device of the leaves that is not the host, or None."""
    leaves = {id(leaf): leaf for _, leaf in wanted}.values()
    shardings = {leaf.sharding for leaf in leaves if leaf.target == "jax"}
    devices = {device for sharding in shardings for device in _devices_of(sharding)}
    others = sorted((d for d in devices if not is_on_host(d)), key=lambda device: device.id)
    return others[0] if others else None


def _devices_of(sharding: Sharding | None) -> Iterable[jax.Device]:
    return [default_device()] if sharding is None else sharding.addressable_devices


def _far(staged: bool) -> Callable[[Use], bool]:
    """Return a function that says whether a device moves the axes of a use faster than the host."""
    known: dict[Sharding | None, bool] = {}

    def is_far(use: Use) -> bool:
        if not staged or (use.device is None and use.sharding is not None):  # JAX cuts these
            return False
        if use.sharding not in known:
            # Programs of a device make arrays in its own memory.
            there = other_memory(use.sharding) is None
            known[use.sharding] = there and not is_on_host(use.device or default_device())
        return known[use.sharding]

    return is_far


def _keeps_memory(staged: bool) -> Callable[[TemplateLeaf], bool]:
    """Return which leaves need their own memory, because they keep it."""
    known: dict[Sharding | None, bool] = {}

    def is_kept(sharding: Sharding | None) -> bool:
        if sharding not in known:
            known[sharding] = any(map(is_on_host, _devices_of(sharding)))
        return known[sharding]

    def keeps(leaf: TemplateLeaf) -> bool:
        if leaf.target == "jax":
            # JAX arrays on the host keep a batch's memory, which is fine if all of them do.
            return staged and is_kept(leaf.sharding)
        return leaf.target in {"numpy", "foreign"}

    return keeps


def _map(
    checkpoint: OpenCheckpoint, batches: Sequence[Batch], finisher: Finisher, report: Report
) -> None:
    """Take regions from maps of the files; copy those that are not one run."""
    maps: dict[int, NDArray[np.uint8]] = {}
    with ReadPool(workers(_READERS)) as pool:
        for batch in batches:
            check_interrupt()
            places: list[Place] = []
            copies: list[Callable[[], None]] = []
            for slot in batch.slots:
                source, start = checkpoint.places[slot.name]
                if id(source) not in maps:
                    maps[id(source)] = source.map()
                place, copy = mapped(slot, maps[id(source)], start, finisher.memory_for)
                places.append(place)
                copies += [] if copy is None else [copy]
            for future in pool.start((), copies, report.add):
                future.result()
            check_digests(checkpoint, places, pool)
            finisher.finish(places, is_staged=False)


def _read(
    checkpoint: OpenCheckpoint,
    batches: Sequence[Batch],
    finisher: Finisher,
    report: Report,
    device: jax.Device | None,
) -> None:
    """Read batches in advance of those that become leaves."""
    most, piece = (_READERS, PIECE) if device is None else (_STAGED_READERS, _STAGED_PIECE)
    kind = _InOrder if checkpoint.in_flight == 1 else ReadPool
    with kind(checkpoint.in_flight or workers(most), piece) as pool:
        if device is None:
            ahead = Ahead(checkpoint, finisher, pool)
        else:
            ahead = Staged(checkpoint, finisher, pool, device, batches)
        for batch in batches if device else map(separated, batches):
            ahead.start(batch, report)
        while ahead.window:
            ahead.finish()

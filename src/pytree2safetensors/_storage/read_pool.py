"""Reading ranges in threads while the caller goes on.

Specification: *Loading*.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from pytree2safetensors._storage.byte_source import PIECE, JoinedRead, Read, joined_reads
from pytree2safetensors._storage.threads import Task, start

T = TypeVar("T")
R = TypeVar("R")

_INLINE: Final = 8 << 20  # bytes: threads are slower for less


class ReadPool:
    """Threads that read. If no thread can start, the caller reads.

    Args:
        workers: How many threads there are, at most.
        piece: The bytes of one read, at most.
    """

    def __init__(self, workers: int, piece: int = PIECE) -> None:
        self._workers, self._piece = workers, piece
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "ReadPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:  # running reads end soon
            self._pool.shutdown(cancel_futures=kind is not None)

    def start(
        self,
        reads: Iterable[Read],
        tasks: Iterable[Callable[[], None]],
        report: Callable[[int], None],
    ) -> list[Task[None]]:
        """Start reads, with adjacent ranges joined and long ones split, and other tasks.

        Args:
            reads: In the order of the file.
            tasks: Other work for the threads.
            report: Called with the number of bytes of each read, without gaps.

        Returns:
            Tasks to wait for. A few megabytes or less are read before this returns.
        """
        batches = list(joined_reads(reads, self._piece))
        work: list[Callable[[], None]] = [partial(self._read, batch, report) for batch in batches]
        waiting = [*work, *tasks]
        is_local = not any(source.in_flight for source, *_ in batches)
        is_small = sum(wanted for *_, wanted in batches) < _INLINE and (
            is_local or len(batches) == 1
        )
        if len(waiting) == len(work) and is_small:
            for task in work:
                task()
            return []
        return [self._submit(task) for task in waiting]

    def map(self, function: Callable[[T], R], values: Iterable[T]) -> list[Task[R]]:
        """Start calls of a function with each value."""
        return [self._submit(partial(function, value)) for value in values]

    def _read(self, batch: JoinedRead, report: Callable[[int], None]) -> None:
        source, offset, buffers, wanted = batch
        source.fill(buffers, offset)
        report(wanted)

    def _submit(self, task: Callable[[], R]) -> Task[R]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, "pytree2safetensors-read")
        return start(self._pool, task)

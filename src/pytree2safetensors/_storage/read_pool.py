"""Reading ranges in threads, while the caller goes on.

Specification: *Loading*.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Final, TypeVar

from pytree2safetensors._storage.byte_source import PIECE, JoinedRead, Read, joined_reads

T = TypeVar("T")
R = TypeVar("R")

_INLINE: Final = 8 << 20  # bytes: less is read sooner than handed to threads


class ReadPool:
    """Threads that read. Where no thread can start, the calling one reads.

    Args:
        workers: How many threads there are, at most.
        piece: The bytes of one read, at most.
    """

    def __init__(self, workers: int, piece: int = PIECE) -> None:
        self._workers, self._piece = workers, piece
        self._pool: ThreadPoolExecutor | None = None
        self._stopped = False

    def __enter__(self) -> "ReadPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = error is not None  # what is under way ends soon, and what waits is given up
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=self._stopped)

    def start(
        self,
        reads: Iterable[Read],
        tasks: Iterable[Callable[[], None]],
        report: Callable[[int], None],
    ) -> list[Future[None]]:
        """Begin reads, neighbouring ones together and long ones in pieces, and other tasks.

        Args:
            reads: In the order of the file.
            tasks: What else threads shall do.
            report: What to call with the bytes of each read.

        Returns:
            Futures to wait for; less than some megabytes are read before this returns.
        """
        batches = list(joined_reads(reads, self._piece))
        work: list[Callable[[], None]] = [partial(self._read, batch, report) for batch in batches]
        waiting = [*work, *tasks]
        is_local = not any(source.in_flight for source, *_ in batches)
        is_small = sum(size for *_, size in batches) < _INLINE and (is_local or len(batches) == 1)
        if len(waiting) == len(work) and is_small:
            for task in work:
                task()
            return []
        return [self._submit(task) for task in waiting]

    def map(self, function: Callable[[T], R], values: Iterable[T]) -> list[Future[R]]:
        """Begin to call a function with each of some values."""
        return [self._submit(partial(function, value)) for value in values]

    def _read(self, batch: JoinedRead, report: Callable[[int], None]) -> None:
        source, offset, buffers, size = batch
        if not self._stopped:
            source.fill(buffers, offset)
            report(size)

    def _submit(self, task: Callable[[], R]) -> Future[R]:
        try:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, "pytree2safetensors-read")
            return self._pool.submit(task)
        except RuntimeError:  # the interpreter is shutting down, or has no more threads
            done: Future[R] = Future()
            done.set_result(task())
            return done

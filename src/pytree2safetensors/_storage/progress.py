"""Progress of long work: bars, and functions that callers pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from pytree2safetensors._storage.naming import not_naming

Progress: TypeAlias = Callable[[int, int], object]
ProgressOption: TypeAlias = bool | Progress

_STEP: Final = 32 << 20  # bytes between two reports


def reporter(progress: ProgressOption, what: str, process: Callable[[], int]) -> Progress | None:
    """Return a function of (done_bytes, total_bytes); None for no reports.

    `process` returns the index of this process. Only process 0 shows a bar.
    """
    if isinstance(progress, bool):
        return _bar(what, process) if progress else None
    return progress


def _bar(what: str, process: Callable[[], int]) -> Progress | None:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress=True shows its bar with tqdm, which is not installed; install tqdm, or pass a "
            "function"
        ) from None
    if process() != 0:
        return None
    return _Bar(lambda total: tqdm(total=total, unit="B", unit_scale=True, desc=what))


class _Bar:
    """A bar that appears with the first report."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = self.make(total)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def closing_bar(progress: Progress | None) -> Iterator[None]:
    """Close the bar when the work ends or fails."""
    try:
        yield
    finally:
        if isinstance(progress, _Bar):
            progress.close()


def progress_of_part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a progress function for a part of the work that begins after `before` bytes."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


class Report:
    """Reports progress to the caller, every `_STEP` bytes and at the end."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.reported = 0, 0
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.progress is None:
            return
        with self.lock:
            self.done += count
            if self.done - self.reported >= _STEP and self.done < self.total:
                self.reported = self.done
                self._report(self.progress, self.done)

    def finish(self) -> None:
        if self.progress is not None:
            self._report(self.progress, self.total)

    def _report(self, progress: Progress, done: int) -> None:
        with not_naming():
            progress(done, self.total)

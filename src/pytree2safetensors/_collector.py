"""Pauses of the cyclic garbage collector, which makes work with many leaves two to four times slower."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """How many pauses there are in this process, and in each thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may save while its thread holds the lock
        self.count = 0
        self.own = threading.local()
        self.was_enabled = False

    def begin(self) -> None:
        # The count changes first here and last in `end`, because a signal handler may run in between.
        with self.lock:
            self.count += 1
            self.own.count = getattr(self.own, "count", 0) + 1
            if self.count == 1:
                self.was_enabled = gc.isenabled()
                gc.disable()

    def end(self) -> None:
        with self.lock:
            if self.count == 1 and self.was_enabled:
                gc.enable()
            self.own.count -= 1
            self.count -= 1

    def after_fork(self) -> None:
        """Forget the pauses of threads that the child does not have."""
        self.lock = threading.RLock()
        others, self.count = self.count, getattr(self.own, "count", 0)
        if others and not self.count and self.was_enabled:
            gc.enable()


_pauses = _Pauses()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pauses.after_fork)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector. The last of several pauses restores the state that the first one found."""
    _pauses.begin()
    try:
        yield
    finally:
        _pauses.end()

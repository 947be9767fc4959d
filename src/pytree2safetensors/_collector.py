"""Pauses of the cyclic garbage collector, which makes work with many leaves two to four times slower."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """The pauses of this process: by identity, the thread of each."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may save while its thread holds the lock
        self.threads: dict[int, int] = {}
        self.was_enabled = False

    def begin(self, pause: object) -> None:
        # The pause is known before the collector is off here, and until it is on again in `end`,
        # because a signal handler may run in between, and may raise.
        thread = threading.get_ident()
        with self.lock:
            is_first = not self.threads
            if is_first:
                self.was_enabled = gc.isenabled()
            self.threads[id(pause)] = thread
            if is_first:
                gc.disable()

    def end(self, pause: object) -> None:
        with self.lock:
            if self.threads.keys() == {id(pause)} and self.was_enabled:
                gc.enable()
            self.threads.pop(id(pause), None)

    def after_fork(self) -> None:
        """Forget the pauses of threads that the child does not have."""
        self.lock = threading.RLock()
        own, others = threading.get_ident(), self.threads
        self.threads = {pause: thread for pause, thread in others.items() if thread == own}
        if others and not self.threads and self.was_enabled:
            gc.enable()


_pauses = _Pauses()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pauses.after_fork)


class _Pause:
    """One pause, which ends once."""

    __slots__ = ()

    def __enter__(self) -> None:
        _pauses.begin(self)

    def __exit__(self, *_: object) -> None:
        _pauses.end(self)

    __del__ = __exit__  # ends the pause even if an interrupt takes it from its owner


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector. The last of several pauses restores the state that the first one found."""
    with _Pause():
        yield

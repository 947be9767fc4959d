"""Interrupts: a save of several processes runs on a thread that signals do not interrupt.

The calling thread waits, and keeps interrupts until the save can stop.

Specification: *Saving*.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Final, TypeVar

T = TypeVar("T")

_SLICE: Final = 0.5  # seconds of one wait: some systems do not interrupt a wait without a timeout


class Interrupt:
    """The interrupts that the caller of a save has received."""

    def __init__(self) -> None:
        self.received: list[BaseException] = []
        self.raised = 0

    def check(self) -> None:
        """Raise the last interrupt, unless it has been raised already."""
        if self.raised < len(self.received):
            self.raised = len(self.received)
            raise self.received[-1]

    def wait_for(self, future: Future[T]) -> T:
        """Return the result of a future, and keep interrupts that occur while waiting."""
        while True:
            try:
                if wait([future], _SLICE).done:
                    break
            except BaseException as error:  # noqa: BLE001 - signal handlers may raise anything
                self.received.append(error)
        return future.result()

    def run(self, work: Callable[[], T]) -> T:
        """Run work on a new thread, and keep interrupts that occur while waiting."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
                future.set_exception(error)

        try:
            threading.Thread(target=run, name="pytree2safetensors-agree").start()
        except BaseException as error:
            if future.cancel():  # the work will never start
                raise
            self.received.append(error)
        while True:
            try:
                return self.wait_for(future)
            except BaseException as error:
                if future.done():
                    raise
                self.received.append(error)  # before the waiting began

    @contextmanager
    def also_outside(self) -> Iterator[None]:
        """Keep an interrupt that occurs between two waits, so that it also stops the save."""
        try:
            yield
        except BaseException as error:
            self.received.append(error)
            raise

"""Interrupts: a save of several processes runs on a thread that signals do not interrupt.

The calling thread waits, and keeps interrupts until the save can stop.

Specification: *Saving*.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from pytree2safetensors._storage.threads import End, Task, start_thread

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

    def wait_for(self, end: End) -> None:
        """Wait for the end of some work, and keep interrupts that occur while waiting."""
        while True:
            try:
                if end.comes_within(_SLICE):
                    return
            except BaseException as error:  # noqa: BLE001 - signal handlers may raise anything
                self.received.append(error)

    def run(self, work: Callable[[], T]) -> T:
        """Run work on a new thread, and keep interrupts that occur while waiting."""
        task = Task(work)
        try:
            start_thread(task)
        except BaseException as error:
            if task.cancel():  # the work will never start
                raise
            self.received.append(error)
        try:
            while True:
                try:
                    self.wait_for(task.end)
                    return task.result()
                except BaseException as error:
                    if task.done():
                        raise
                    self.received.append(error)  # before the waiting began
        finally:
            del task  # the traceback would keep it alive

    @contextmanager
    def also_outside(self) -> Iterator[None]:
        """Keep an interrupt that occurs between two waits, so that it also stops the save."""
        try:
            yield
        except BaseException as error:
            if all(error is not other for other in self.received):
                self.received.append(error)
            raise

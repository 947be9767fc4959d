"""Work in other threads, or in this one if no thread can start. Signal handlers do not disturb it.

Specification: *Saving*.
"""

import os
import sys
import threading
from _thread import start_new_thread
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_NO_THREADS: Final = {  # Python's errors when no thread can start
    "can't start new thread",
    "can't create new thread at interpreter shutdown",  # since Python 3.12
    "cannot schedule new futures after shutdown",  # also of a pool that the interpreter has ended
    "cannot schedule new futures after interpreter shutdown",
}


def workers(most: int) -> int:
    """Return how many threads to use: at most one for each core."""
    return min(most, os.cpu_count() or 1)


def starting(submit: Callable[[], T]) -> T:
    """Start a task, with locks that a signal handler cannot wait for."""
    try:
        return submit()
    except (KeyError, RuntimeError) as error:
        # `Thread.start` may raise another error for what a signal handler raised in it.
        keys = error.args if isinstance(error, KeyError) else ()
        masks = any(isinstance(key, threading.Thread) for key in keys)
        masks |= isinstance(error, RuntimeError) and str(error) == "release unlocked lock"
        raise (error.__context__ or error if masks else error) from None


def is_starting() -> bool:
    """Return whether this is a signal handler that has interrupted the start of a task."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - how CPython shows callers
    while frame is not None:
        if frame.f_code.co_name == "starting" and frame.f_globals is globals():
            return True
        frame = frame.f_back
    return False


def says_no_threads(error: BaseException) -> bool:
    """Return whether an error of Python says that no thread can start."""
    return isinstance(error, RuntimeError) and str(error) in _NO_THREADS


class End:
    """The end of some work. A signal handler can wait for it, even if it interrupts such a wait.

    An interrupt may leave an Event or a Future of Python locked, and who ends the work would wait for ever.
    """

    def __init__(self) -> None:
        self.has_come, self._until = False, threading.Lock()
        self._until.acquire()

    def come(self) -> None:
        if not self.has_come:
            self.has_come = True
            self._until.release()

    def wait(self) -> None:
        if not self.has_come:
            with self._until:
                pass

    def comes_within(self, seconds: float) -> bool:
        """Wait for some time. Only one thread may do so, and no other may wait."""
        return self.has_come or self._until.acquire(timeout=seconds)


class Task(Generic[T]):
    """Work that one thread does, and what it returned or raised. Several threads may try to begin it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._waiting = [work]  # empty after it has begun, so that it keeps nothing alive
        self.results = list[T]()
        self.error: BaseException | None = None
        self.end = End()

    def take(self) -> Callable[[], T] | None:
        """Return the work for the caller to do, unless another thread has begun it."""
        try:
            return self._waiting.pop()
        except IndexError:
            return None

    def cancel(self) -> bool:
        """Return whether the work had not begun; now it never will."""
        if self.take() is None:
            return False
        self.error = CancelledError()
        self.end.come()
        return True

    def done(self) -> bool:
        return self.end.has_come

    def result(self) -> T:
        """Wait for the end, and return or raise what the work did."""
        self.end.wait()
        try:
            if self.error is not None:
                raise self.error
            return self.results[0]
        finally:
            del self  # the traceback would keep it alive


def run(waiting: list[Task[T]]) -> None:
    """Do the work of a task, unless another thread has begun it.

    It is taken out of a list, because the traceback of an error keeps the arguments of its callers alive.
    """
    task = waiting.pop()
    work = task.take()
    if work is None:
        return
    try:
        task.results.append(work())
    except BaseException as error:  # noqa: BLE001 - `result` raises it
        task.error = error
    finally:
        del work
        task.end.come()
        del task


def start_thread(task: Task[T]) -> None:
    """Do the work of a task in a new thread.

    It does not come from `threading`: an interrupt may leave the locks of `Thread.start` held.
    """

    def work(waiting: list[Task[T]]) -> None:  # pragma: no cover - it begins what coverage sees
        sys.settrace(threading.gettrace())  # so that debuggers and coverage see this thread, too
        run(waiting)

    start_new_thread(work, ([task],))


def start(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Task[T]:
    """Start a task, or do it now if no thread can start it.

    Nobody may wait for a task that the pool has cancelled.
    """
    task = Task(work)
    if not is_starting():
        try:
            starting(partial(pool.submit, run, [task]))
            return task
        except BaseException as error:
            if not says_no_threads(error):  # but an interrupt
                task.cancel()  # it may be in the queue of the pool
                raise
    if task.take() is not None:
        task.results.append(work())
        task.end.come()
    return task


def undisturbed(work: Callable[[], object]) -> None:
    """Do work in another thread, since signal handlers run in the main thread, which waits.

    Raise what a handler raises after the work is done. If the interpreter is exiting and starts
    no threads, the calling thread does the work.
    """
    task = Task(work)
    interrupts: list[BaseException] = []
    try:
        start_thread(task)
        task.end.wait()
    except BaseException as error:
        if not task.cancel():  # the thread has begun
            interrupts.append(error)
        elif says_no_threads(error):
            task = Task(work)
            run([task])
        else:
            raise
    while not task.done():
        try:
            task.end.wait()
        except BaseException as error:  # noqa: BLE001 - raised below
            interrupts.append(error)
    errors = [error for error in (task.error, *interrupts) if error is not None]
    interrupts.clear()
    del task
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # the traceback would keep them, and so this frame, alive

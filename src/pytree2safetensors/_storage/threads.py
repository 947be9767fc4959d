"""Work in other threads, or in this one if no thread can start. Signal handlers do not disturb it.

Specification: *Saving*.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Final, TypeAlias, TypeVar

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
    except KeyError as error:
        raise _interrupt(error) from None


def is_starting() -> bool:
    """Return whether this is a signal handler that has interrupted the start of a task."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - how CPython shows callers
    while frame is not None:
        if frame.f_code.co_name == "starting" and frame.f_globals is globals():
            return True
        frame = frame.f_back
    return False


def _interrupt(error: BaseException) -> BaseException:
    """Return what a signal handler raised in `Thread.start`, which may raise a KeyError for it."""
    masks = isinstance(error, KeyError) and any(isinstance(k, threading.Thread) for k in error.args)
    return error.__context__ or error if masks else error


def says_no_threads(error: BaseException) -> bool:
    """Return whether an error of Python says that no thread can start."""
    return isinstance(error, RuntimeError) and str(error) in _NO_THREADS


_Task: TypeAlias = tuple[Callable[[], T], Future[T]]


def start(pool: ThreadPoolExecutor, task: Callable[[], T]) -> Future[T]:
    """Start a task, or do it now if no thread can start it."""
    if not is_starting():
        future: Future[T] = Future()
        waiting = [(task, future)]
        try:
            started = starting(partial(pool.submit, _run, waiting))
            started.add_done_callback(lambda _: future.cancel())  # if the pool cancels it
            return future
        except BaseException as error:
            # It is in the queue of the pool, where another thread may have found it.
            is_taken = _take(waiting) is None
            if not says_no_threads(error):  # but an interrupt
                raise
            if is_taken:
                return future
    done: Future[T] = Future()
    done.set_result(task())
    return done


def _take(waiting: list[_Task[T]]) -> _Task[T] | None:
    """Take the task that waits, so that nobody else does it."""
    try:
        return waiting.pop()
    except IndexError:
        return None


def _run(waiting: list[_Task[T]]) -> None:
    found = _take(waiting)
    if found is None:
        return
    task, future = found
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = task()
    except BaseException as error:  # noqa: BLE001 - the future raises it
        future.set_exception(error)
        del found, task, future  # the traceback would keep them alive
    else:
        future.set_result(result)


def undisturbed(work: Callable[[], object]) -> None:
    """Do work in another thread, since signal handlers run in the main thread, which waits.

    Raise what a handler raises after the work is done. If the interpreter is exiting and starts
    no threads, the calling thread does the work.
    """
    claim, done = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        if not claim.acquire(blocking=False):
            return
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the calling thread raises it
            errors.append(error)
        finally:
            done.set()

    interrupts: list[BaseException] = []
    try:
        threading.Thread(target=run, name="pytree2safetensors").start()
    except BaseException as error:  # noqa: BLE001 - raised here, or below
        interrupt = _interrupt(error)
        if says_no_threads(interrupt):
            run()
        elif claim.acquire(blocking=False):  # the thread will never start
            raise interrupt from None
        else:
            interrupts.append(interrupt)
    while True:
        try:
            done.wait()
            break
        except BaseException as error:  # noqa: BLE001 - raised below
            interrupts.append(error)
    errors += interrupts
    interrupts.clear()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # the traceback would keep them, and so this frame, alive

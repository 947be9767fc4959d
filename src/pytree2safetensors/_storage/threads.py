"""Work in threads, and what no signal handler may come into."""

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def in_threads(work: Callable[[T], object], items: Iterable[T], workers: int) -> None:
    """Do work for each item in several threads, of which the calling one is the last.

    An interpreter that is ending starts no threads; the calling one then does all the work.
    """
    pending, lock = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def drain() -> None:
        while not errors:
            with lock:
                rest = list(islice(pending, 1))
            if not rest:
                return
            try:
                work(rest[0])
            except BaseException as error:  # noqa: BLE001 - the calling thread raises it
                errors.append(error)

    threads = []
    try:
        for _ in range(workers - 1):
            thread = threading.Thread(target=drain, name="pytree2safetensors")
            try:
                thread.start()
            except RuntimeError:
                break
            threads.append(thread)
        drain()
    except BaseException as error:  # noqa: BLE001 - raised when no thread is at work any more
        errors.append(error)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def undisturbed(work: Callable[[], object]) -> None:
    """Do work in another thread: signal handlers run in the main one, which waits.

    What a handler raises is raised when the work is done. An interpreter that is ending starts no
    threads; the calling one then does the work.
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
    except RuntimeError:
        run()
    except BaseException as error:
        if claim.acquire(blocking=False):  # the thread has not begun, and never will
            raise
        interrupts.append(error)
    while not done.is_set():
        try:
            done.wait()
        except BaseException as error:  # noqa: BLE001 - raised below
            interrupts.append(error)
    for found in [*errors, *interrupts]:
        raise found

"""Work that no signal handler may interrupt."""

import threading
from collections.abc import Callable


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
    except RuntimeError:
        run()
    except BaseException as error:
        if claim.acquire(blocking=False):  # the thread will never start
            raise
        interrupts.append(error)
    while True:
        try:
            done.wait()
            break
        except BaseException as error:  # noqa: BLE001 - raised below
            interrupts.append(error)
    for found in [*errors, *interrupts]:
        raise found

"""The one thread that saves in the background: the saves of a process end in the order of its calls.

Specification: *Saving*.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

_NAME: Final = "pytree2safetensors-save"

_savers: list[ThreadPoolExecutor] = []  # none before the first save
_last: list[threading.Event] = []  # set when what was submitted last, and so everything, has ended


def submit(save: Callable[[], None]) -> Future[None]:
    """Save on the saver's thread, after everything that was submitted before."""
    if not _savers:
        _savers.append(ThreadPoolExecutor(1, _NAME))
    ended = threading.Event()  # unlike the future it keeps no error, and so no snapshot, alive
    _last[:] = [ended]
    future = _savers[0].submit(save)
    future.add_done_callback(lambda _: ended.set())
    return future


def wait_for_earlier() -> None:
    """Wait until all that was submitted has ended. Errors are left to those who hold the futures."""
    if not is_current():  # it would wait for itself
        for ended in _last:
            ended.wait()


def is_current() -> bool:
    """Whether this is the saver's thread, which runs callbacks of the user's, too."""
    return threading.current_thread().name.startswith(_NAME)


def _forget() -> None:
    _savers.clear()
    _last.clear()


if hasattr(os, "register_at_fork"):  # a child has no thread of its parent
    os.register_at_fork(after_in_child=_forget)

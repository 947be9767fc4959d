"""The background thread: the saves of a process finish in the order of its calls.

Specification: *Saving*.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

_NAME: Final = "pytree2safetensors-save"

_savers: list[ThreadPoolExecutor] = []  # None before the first save
_last: list[threading.Event] = []  # set when the last submitted save has ended


def submit(save: Callable[[], None]) -> Future[None]:
    """Save on the saver's thread, after everything that was submitted before."""
    if not _savers:
        _savers.append(ThreadPoolExecutor(1, _NAME))
    ended = threading.Event()  # does not keep an error and its snapshot alive, unlike the future
    _last[:] = [ended]
    future = _savers[0].submit(save)
    future.add_done_callback(lambda _: ended.set())
    return future


def wait_for_earlier() -> None:
    """Wait for all submitted saves. Their futures have the errors."""
    if not is_current():  # a thread cannot wait for itself
        for ended in _last:
            ended.wait()


def is_current() -> bool:
    """Return whether this is the saver's thread, which also runs the user's callbacks."""
    return threading.current_thread().name.startswith(_NAME)


def _forget() -> None:
    _savers.clear()
    _last.clear()


if hasattr(os, "register_at_fork"):  # a child process does not have its parent's thread
    os.register_at_fork(after_in_child=_forget)

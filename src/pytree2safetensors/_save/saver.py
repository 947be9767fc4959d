"""The background thread: the saves of a process finish in the order of its calls.

Specification: *Saving*.
"""

import atexit
import inspect
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any, Final, TypeAlias
from weakref import WeakSet

from pytree2safetensors._storage.threads import End, is_starting, says_no_threads, starting

_NAME: Final = "pytree2safetensors-save"
_PACKAGE: Final = f"{__name__.partition('.')[0]}."
_GENERATORS: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_savers: list[ThreadPoolExecutor] = []  # empty before the first save


class _Here(threading.local):
    """What the current thread is, and does. A signal handler may come before any `__init__`."""

    is_saver = False  # the thread that also runs the user's callbacks
    is_saving = is_ending = False
    # Saves that a callback has done, whose own callbacks come after it.
    ended: tuple[tuple["Save", BaseException | None], ...] = ()


_here = _Here()


class Save(Future[None]):
    """A future that warns of an error that was never retrieved."""

    _is_retrieved = True  # until `__init__` is done, which an interrupt may stop
    _is_of_parent = False

    def __init__(self, where: str, is_joint: bool, saved: End) -> None:
        super().__init__()
        self._where, self._is_joint, self._is_retrieved = where, is_joint, False
        self._saved, self.end = saved, End()  # before its result is known, and after all callbacks
        _saves.add(self)

    def cancel(self) -> bool:
        """Do not save, if the save has not begun and no other process waits for it."""
        return not (self._is_joint or self._is_of_parent) and super().cancel()

    def done(self) -> bool:
        # Without the lock, which a signal handler may have interrupted, and then wait for this save.
        return self._state in {"CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"}

    # The runtime checks of the tests distinguish ints from floats.
    def result(self, timeout: int | float | None = None) -> None:  # noqa: PYI041
        self._wait(timeout)
        try:
            super().result(timeout)
        except BaseException as error:
            self._is_retrieved |= error is self._exception  # no timeout, and no interrupt
            raise
        finally:
            del self  # the traceback would keep the error and its snapshot alive

    def exception(self, timeout: int | float | None = None) -> BaseException | None:  # noqa: PYI041
        self._wait(timeout)
        error = super().exception(timeout)
        self._is_retrieved = True
        return error

    def _wait(self, timeout: int | float | None) -> None:  # noqa: PYI041 - as above
        if self._is_of_parent and not self.done():
            raise RuntimeError(
                f"the process that this one was forked from saves to {self._where}; call this method of "
                "the future there"
            )
        if timeout is None and is_current() and not self.done():
            raise RuntimeError(
                "a callback of a background save cannot wait for a background save, because they run one "
                "after another; wait in another thread"
            )
        if timeout is None and not self.done():
            self._saved.wait()  # without the lock, since a signal handler may save

    def _get_snapshot(self) -> Any:  # pragma: no cover - asyncio calls it from Python 3.15 on
        self._is_retrieved = True
        return super()._get_snapshot()  # type: ignore[misc] # unknown to older versions

    def warn(self) -> None:
        if self._is_retrieved or not self.done() or self.cancelled():
            return
        error = self.exception()
        if error is not None:
            warnings.warn(
                f"the background save to {self._where} failed, and its error was never retrieved: "
                f"{type(error).__name__}: {error}. Call result() or exception() on the future. "
                f"Such errors so far: {next(_numbers)}.",  # Python shows each text once
                stacklevel=1,
            )

    def __del__(self) -> None:
        self.warn()


_numbers = count(1)  # of the warnings
_saves: WeakSet[Save] = WeakSet()
_Waiting: TypeAlias = list[tuple[Callable[[], None], Save]]  # empty after it has begun
_unfinished = dict[End, _Waiting]()  # each submitted save that has not ended, in order


@atexit.register  # by then all saves have ended
def _warn_all() -> None:
    for save in list(_saves):
        save.warn()


def _finish_all() -> None:
    """Wait for all saves while Python can still start tasks, which saves may need."""
    for saver in _savers:
        saver.shutdown()
    for end in list(_unfinished):  # of a saver that was replaced
        end.wait()


# The interpreter calls the last one registered first. Without this, the one of `concurrent.futures`
# waits for the saves, after it has forbidden new tasks.
_register: Any = getattr(threading, "_register_atexit", None)
if _register is not None:  # pragma: no branch - the name is private
    with suppress(RuntimeError):  # the interpreter is exiting, so saves end before their calls do
        _register(_finish_all)


def submit(save: Callable[[], None], where: str, *, is_joint: bool = False) -> Save:
    """Save on the saver's thread, after everything that was submitted before.

    If no thread can start, for example because the interpreter is exiting or this is a signal
    handler, save before this returns.

    Args:
        save: What to do.
        where: The path for a warning about an error that is never retrieved.
        is_joint: Whether other processes wait for this save, so that it cannot be cancelled.
    """
    if not threading.main_thread().is_alive() or is_starting():
        return _saved_now(save, where, is_joint)
    if not _savers:
        _savers.append(_new_saver())
    end = End()  # does not keep an error and its snapshot alive, unlike the future
    future = Save(where, is_joint, end)
    waiting: _Waiting = [(save, future)]

    def finish(_: Future[None]) -> None:  # if it is cancelled
        _finish(end)
        waiting.clear()  # of the snapshot

    future.add_done_callback(finish)

    def enqueue() -> None:
        saver = _savers[0]  # before: one that replaces it may wait for this save
        _unfinished[end] = waiting
        saver.submit(_run, waiting, end)

    try:
        starting(enqueue)
    except BaseException as error:
        is_waiting = Future.cancel(future)  # nobody has it, and later saves wait for its end
        if not says_no_threads(error):  # but an interrupt
            _replace_saver()
            raise
        if is_waiting:  # the thread that a call beside this one started may have taken it
            return _saved_now(save, where, is_joint)
    return future


def _new_saver() -> ThreadPoolExecutor:
    """Return a pool of one thread, which saves after everything that was submitted before."""
    return ThreadPoolExecutor(1, _NAME, _wait_for_all, (list(_unfinished),))


def _wait_for_all(ends: list[End]) -> None:
    _here.is_saver = True
    while ends:
        ends.pop().wait()


def _replace_saver() -> None:
    """Replace a pool that may not know its thread, and would start another one beside it."""
    before, _savers[0] = _savers[0], _new_saver()
    before.shutdown(wait=False)


def _saved_now(save: Callable[[], None], where: str, is_joint: bool) -> Save:
    wait_for_earlier()
    end = End()
    future = Save(where, is_joint, end)
    _run([(save, future)], end)
    return future


def _run(waiting: _Waiting, end: End, *, in_callback: bool = False) -> None:
    try:
        save, future = waiting.pop()  # so that the pool does not keep them alive
    except IndexError:  # `wait_for_earlier` has taken it
        end.wait()
        return
    if not future.set_running_or_notify_cancel():
        _finish(end)  # an interrupt may have ended `cancel` before its callbacks
        return
    error: BaseException | None = None
    is_inner, _here.is_saving = _here.is_saving, True
    try:
        try:
            save()
        except BaseException as raised:  # noqa: BLE001 - the future raises it
            error = raised
        del save  # with its snapshot, since callbacks of the future may start the next save
        _clear(error)
    finally:
        # First, because a thread that a signal has interrupted may have locked the future.
        _finish(end)
        _here.is_saving = is_inner  # after finalizers, which may save
    is_outer = not _here.is_ending
    try:
        if in_callback and not is_outer:
            _here.ended += ((future, error),)
            return
        _here.is_ending = True
        try:
            _give_result(future, error)
        finally:  # a callback may raise SystemExit
            while is_outer and _here.ended:
                (future, error), *rest = _here.ended
                _here.ended = (*rest,)
                with suppress(BaseException):
                    _give_result(future, error)
    finally:
        _here.is_ending = not is_outer
        del future, error  # the traceback would keep them alive


def _give_result(future: Save, error: BaseException | None) -> None:
    """End a future, which calls its callbacks."""
    try:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    finally:
        future.end.come()


def _clear(error: BaseException | None) -> None:
    """Free what the frames of an error hold, with the snapshot.

    To clear the frame of a generator or a coroutine of the user, which may have caught the error, ends it.
    """
    errors, seen = [error], set[int]()
    for one in errors:  # which grows
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            for frame, _ in traceback.walk_tb(one.__traceback__):
                module = frame.f_globals.get("__name__")  # anything, if code runs without a module
                is_own = isinstance(module, str) and module.startswith(_PACKAGE)
                if is_own or not frame.f_code.co_flags & _GENERATORS:
                    with suppress(RuntimeError):  # it is still running
                        frame.clear()
            errors += [one.__cause__, one.__context__]


def _finish(end: End) -> None:
    _unfinished.pop(end, None)
    end.come()


def wait_for_earlier() -> None:
    """Wait for all submitted saves. Their futures have the errors.

    The saver's thread does those that wait. During a save, it cannot wait for that one, nor for others.

    Raises:
        RuntimeError: This is a signal handler, and the saves wait for what it has interrupted.
    """
    if _here.is_saver and _here.is_saving:
        return
    for end in list(_unfinished):  # also those before one that was cancelled
        if is_starting() and not end.has_come:
            raise RuntimeError(
                "this signal handler cannot wait for the background save that is under way; "
                "set a flag in the handler, and save after it"
            )
        if _here.is_saver:
            _run(_unfinished.get(end, []), end, in_callback=True)
        else:
            end.wait()


def is_current() -> bool:
    """Return whether this is the saver's thread, which also runs the user's callbacks."""
    return _here.is_saver


def _forget() -> None:
    for save in _saves:  # the parent process gets the errors
        save._is_retrieved = save._is_of_parent = True  # noqa: SLF001 - a class of this module
    _here.is_saver = _here.is_saving = False
    _savers.clear()
    _unfinished.clear()


if hasattr(os, "register_at_fork"):  # a child process does not have its parent's thread
    os.register_at_fork(after_in_child=_forget)

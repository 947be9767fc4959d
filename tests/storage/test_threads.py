"""Work in other threads, or in this one: interrupted, refused a thread, cancelled, or in a child process."""

import gc
import inspect
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from handlers import Interrupted, handling, interrupt
from pytree2safetensors._storage import threads
from versions import posix


@posix
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("delay", [0, 0.1], ids=["at the start", "while waiting"])
def test_what_a_handler_raises_is_raised_after_the_interrupted_work(
    delay: float, times: int
) -> None:
    steps: list[str] = []

    def work() -> None:
        time.sleep(delay)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
        steps.append("done")

    with handling(signal.SIGUSR1, interrupt), pytest.raises(Interrupted):
        threads.undisturbed(work)
    assert steps == ["done"]


def test_an_interrupt_before_the_work_began_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    prepared: list[Callable[[], object]] = []

    def start(begin: Callable[..., object], args: tuple[Any, ...]) -> None:
        prepared.append(partial(begin, *args))
        interrupt()

    monkeypatch.setattr(threads, "start_new_thread", start)
    with pytest.raises(Interrupted):
        threads.undisturbed(lambda: steps.append("done"))
    late = threading.Thread(target=prepared[0])  # if the system has started it anyway
    late.start()
    late.join()
    assert not steps


def test_without_threads_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threads, "start_new_thread", start)
    found: list[int] = []
    threads.undisturbed(lambda: found.append(threading.get_ident()))
    assert found == [threading.get_ident()]


def test_an_interrupt_at_the_start_of_the_work_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []
    begun = threading.Event()

    def start(*args: Any) -> None:
        start_new_thread(*args)
        begun.wait()
        interrupt()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        steps.append("done")

    monkeypatch.setattr(threads, "start_new_thread", start)
    with pytest.raises(Interrupted):
        threads.undisturbed(work)
    assert steps == ["done"]


def test_debuggers_see_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []

    def trace(*_: Any) -> None:
        """The function of a debugger."""

    monkeypatch.setattr(threading, "gettrace", lambda: trace)
    threads.undisturbed(lambda: found.append(sys.gettrace()))
    assert found == [trace]


@pytest.mark.parametrize("error", [Interrupted("stop"), RuntimeError("stop"), KeyError("stop")])
def test_what_a_handler_raises_while_a_thread_starts_is_raised(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `Thread.start` calls, under the name that this Python has for it.
    names = ("_start_joinable_thread", "_start_new_thread")
    name = next(name for name in names if hasattr(threading, name))
    real = getattr(threading, name)

    def start(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        time.sleep(0.2)  # until the thread runs
        raise error

    monkeypatch.setattr(threading, name, start)
    with ThreadPoolExecutor(1) as pool, pytest.raises(type(error), match="stop"):
        threads.start(pool, lambda: None)


def test_a_start_ends_with_an_interrupt() -> None:
    """Otherwise, a save in an except clause would count as one in a signal handler."""
    try:
        threads.starting(interrupt)
    except Interrupted:
        assert not threads.is_starting()


@pytest.mark.parametrize("said", ["out of time", "shutdown requested", "a new thread must stop"])
def test_an_error_of_a_signal_handler_is_not_taken_for_a_lack_of_threads(said: str) -> None:
    class Pool(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said):
        threads.start(Pool(1), threading.get_ident)


def test_the_errors_of_python_that_say_that_no_thread_can_start_are_known() -> None:
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    assert threads.start(ended, threading.get_ident).result() == threading.get_ident()
    with ThreadPoolExecutor(1) as pool, larger_than_memory():
        assert threads.start(pool, threading.get_ident).result() == threading.get_ident()
        found: list[int] = []
        threads.undisturbed(lambda: found.append(threading.get_ident()))
    assert found == [threading.get_ident()]


@contextmanager
def larger_than_memory() -> Iterator[None]:
    """Let the system refuse to start a thread."""
    try:
        before = threading.stack_size(1 << 50)
    except (ValueError, OverflowError):
        pytest.skip("a system with another limit")
    try:
        yield
    finally:
        threading.stack_size(before)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What to do before the second thread of a pool does not start."""
    real, steps = threading.Thread.start, list[Callable[[], object]]()

    def start(thread: threading.Thread) -> None:
        if thread.name != "few_0":
            for step in steps:
                step()
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return steps


def test_a_task_that_waits_in_vain_for_a_thread_runs_once(
    refused: list[Callable[[], object]],
) -> None:
    found: list[int] = []
    go_on = threading.Event()
    with ThreadPoolExecutor(2, "few") as pool:
        first = threads.start(pool, go_on.wait)
        second = threads.start(pool, lambda: found.append(threading.get_ident()))
        assert second.done()
        go_on.set()
        threads.start(pool, lambda: found.append(0)).result()
    assert not refused
    assert first.result()
    assert found == [threading.get_ident(), 0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_that_another_thread_takes_runs_once(
    refused: list[Callable[[], object]], fails: bool
) -> None:
    found: list[int] = []
    go_on, taken = threading.Event(), threading.Event()

    def task() -> int:
        taken.set()
        found.append(threading.get_ident())
        if fails:
            raise Interrupted
        return found[0]

    refused += [go_on.set, taken.wait]
    with ThreadPoolExecutor(2, "few") as pool:
        threads.start(pool, go_on.wait)
        future = threads.start(pool, task)
    assert len(found) == 1
    assert found[0] != threading.get_ident()
    if fails:
        with pytest.raises(Interrupted):
            future.result()
    else:
        assert future.result() == found[0]


def test_an_interrupted_start_starts_nothing_later(refused: list[Callable[[], object]]) -> None:
    found: list[int] = []
    go_on = threading.Event()
    refused.append(interrupt)
    with ThreadPoolExecutor(2, "few") as pool:
        threads.start(pool, go_on.wait)
        with pytest.raises(Interrupted):
            threads.start(pool, lambda: found.append(1))
        go_on.set()
    assert not found


def test_a_task_that_fails_keeps_nothing_alive() -> None:
    class Memory:
        pass

    def fail(memory: Memory) -> None:
        raise Interrupted(id(memory))

    memory = Memory()
    alive = weakref.ref(memory)
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as pool:
            future = threads.start(pool, partial(fail, memory))
            del memory
        with pytest.raises(Interrupted) as caught:
            inspect.unwrap(threads.Task.result)(future)  # without checks, which keep arguments
        del future, caught
        assert alive() is None
    finally:
        gc.enable()


def test_a_task_that_is_done_at_once_is_not_kept(refused: list[Callable[[], object]]) -> None:
    class Memory:
        pass

    memory = Memory()
    alive = weakref.ref(memory)
    go_on = threading.Event()
    with ThreadPoolExecutor(2, "few") as pool:
        threads.start(pool, go_on.wait)
        threads.start(pool, partial(id, memory))
        del memory
        assert alive() is None
        go_on.set()
    assert not refused


def test_a_task_that_is_cancelled_before_it_begins_is_not_done() -> None:
    steps: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go_on.wait()
        steps.append(1)

    with ThreadPoolExecutor(1) as pool:
        futures = [threads.start(pool, task) for task in (first, partial(steps.append, 2))]
        begun.wait()
        assert [future.cancel() for future in futures] == [False, True]
        with pytest.raises(CancelledError):
            futures[1].result()
        go_on.set()
    assert steps == [1]


@posix
@pytest.mark.parametrize("is_starting", [False, True])
def test_a_child_knows_only_what_its_own_thread_starts(is_starting: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def begin() -> None:
        begun.set()
        go_on.wait()

    def fork() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of JAX and Python: the child does nothing that could hang
            child = os.fork()
        if not child:
            os._exit(threads.is_starting() != is_starting)
        return child

    other = threading.Thread(target=threads.starting, args=[begin])
    other.start()
    begun.wait()
    child = threads.starting(fork) if is_starting else fork()
    go_on.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0

"""Signals never leak a descriptor or lose a checkpoint, and a signal handler may save."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import system_calls
from folders import is_same, names_in, outcome, tree_of
from pytree2safetensors import load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._save import saver
from pytree2safetensors._storage import folder as folder_module
from pytree2safetensors._storage import threads
from pytree2safetensors._storage.folder import Folder
from versions import litter, posix


@contextmanager
def handling(number: int, act: Callable[[], object]) -> Iterator[None]:
    def handle(_: int, __: FrameType | None) -> None:
        act()

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


class Interrupted(Exception):
    pass


def interrupt() -> None:
    raise Interrupted


# In a process of its own: a handler that raises within a runtime type check is taken for a wrong type.
INTERRUPTED = """
import gc, os, signal, sys
from pytree2safetensors._storage.atomic_file import replacing
from pytree2safetensors._storage.file_source import open_source

class Interrupted(Exception):
    pass

def interrupt(*_):
    raise Interrupted

def read():
    open_source(path).close()

def write():
    with replacing(path, durable=False):
        pass

path, hits = sys.argv[1], 0
write()
before = len(os.listdir("/proc/self/fd"))
signal.signal(signal.SIGALRM, interrupt)
for attempt in range(3000):
    work = (read, write)[attempt % 2]
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + attempt % 100 * 2e-6)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        hits += 1
assert hits > 100, hits
gc.collect()
assert len(os.listdir("/proc/self/fd")) == before, os.listdir("/proc/self/fd")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing says what is open")
def test_an_interrupt_at_any_moment_leaves_no_file_open(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(tmp_path / "model")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert names_in(tmp_path) == ["model"]


@posix
@pytest.mark.parametrize("limits", [(100, 100), (100, "5GB"), ("5GB", 100)], ids=str)
def test_a_save_may_come_into_a_save_of_the_same_folder(
    tmp_path: Path, limits: tuple[int | str, int | str]
) -> None:
    """At every call of the system, in a signal handler; the later save is the one that is found."""
    number = 0
    while True:
        saved: list[bool] = []

        def save_too() -> None:
            saved.append(True)
            save_pytree(tree_of(2), tmp_path, max_shard_size=limits[1], durable=False)

        def act(call: system_calls.Call, at: int = number) -> Any:
            if call.number == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            return call.run()

        start = time.monotonic()
        with handling(signal.SIGUSR1, save_too), system_calls.watched(act, flushing=False):
            save_pytree(tree_of(1), tmp_path, max_shard_size=limits[0])
        assert time.monotonic() - start < folder_module._PATIENCE  # it waits for no lock of its own
        assert outcome(tmp_path) in {"old", "new"}
        assert not litter(tmp_path)
        if not saved:
            break
        number += 1
    assert number > 30


@pytest.mark.parametrize("delay", [0, 0.1], ids=["at the start", "while waiting"])
def test_what_a_handler_raises_is_raised_after_the_interrupted_work(delay: float) -> None:
    steps: list[str] = []

    def work() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        steps.append("done")

    with handling(signal.SIGUSR1, interrupt), pytest.raises(Interrupted):
        threads.undisturbed(work)
    assert steps == ["done"]


def test_an_interrupt_before_the_work_began_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    prepared: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        prepared.append(thread)
        interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Interrupted):
            threads.undisturbed(lambda: steps.append("done"))
    prepared[0].start()  # if the system has started it anyway
    prepared[0].join()
    assert not steps


def test_without_threads_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    found: list[int] = []
    threads.undisturbed(lambda: found.append(threading.get_ident()))
    assert found == [threading.get_ident()]


def test_an_interrupt_at_the_start_of_the_work_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []
    begun, real = threading.Event(), threading.Thread.start

    def start(thread: threading.Thread) -> None:
        real(thread)
        begun.wait()
        interrupt()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        steps.append("done")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Interrupted):
            threads.undisturbed(work)
    assert steps == ["done"]


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
    steps: list[str] = []
    with pytest.raises(type(error), match="stop"):
        threads.undisturbed(lambda: steps.append("done"))
    assert steps == ["done"]
    with ThreadPoolExecutor(1) as pool, pytest.raises(type(error), match="stop"):
        threads.start(pool, lambda: None)


def test_an_interpreter_that_ends_saves_and_loads_without_threads(tmp_path: Path) -> None:
    script = f"""
import atexit, sys, threading
import numpy as np
import pytree2safetensors as p2s

tree = {{"w": np.arange(3 << 20, dtype=np.float32), "b": np.zeros(9, np.float32)}}
p2s.save_pytree(tree, {str(tmp_path / "model")!r})
p2s.load_pytree({str(tmp_path / "model")!r})

def again(when):
    p2s.save_pytree(tree, {str(tmp_path)!r} + "/" + when, max_shard_size=100)
    found = p2s.load_pytree({str(tmp_path)!r} + "/" + when)
    assert np.array_equal(found["w"], tree["w"])
    p2s.save_pytree(tree, {str(tmp_path)!r} + "/" + when, max_shard_size="8MB", checksum=True)
    p2s.save_pytree_async(tree, {str(tmp_path)!r} + "/file", checksum=True).result()
    assert p2s.load_metadata({str(tmp_path)!r} + "/file") == {{}}
    print(when, flush=True)

def later():
    threading.main_thread().join()
    again("thread")

threading.Thread(target=later).start()
atexit.register(again, "exit")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.stdout.split() == ["thread", "exit"], run.stderr


def test_a_signal_handler_that_interrupts_the_start_of_a_task_waits_for_no_thread(
    tmp_path: Path,
) -> None:
    """It would wait for the locks that the interrupted call holds."""

    def handle() -> None:
        assert threads.start(pool, threading.get_ident).result(0) == threading.get_ident()
        save_pytree_async(tree_of(1), tmp_path / "a").result(0)
        save_pytree(tree_of(2), tmp_path / "b", checksum=True)
        assert is_same(tree_of(1), load_pytree(tmp_path / "a"))
        assert is_same(tree_of(2), load_pytree(tmp_path / "b"))

    with ThreadPoolExecutor(1) as pool:
        threads.starting(handle)


def test_a_start_ends_with_an_interrupt() -> None:
    """So that a save in an except clause is none of a signal handler."""
    try:
        threads.starting(interrupt)
    except Interrupted:
        assert not threads.is_starting()


def test_a_signal_handler_that_would_wait_for_ever_gets_an_error(tmp_path: Path) -> None:
    going_on = threading.Event()

    def save() -> None:
        going_on.wait()

    def handle() -> None:
        for call in save_pytree, save_pytree_async:
            with pytest.raises(RuntimeError) as caught:
                call(tree_of(1), tmp_path / "a")
            assert str(caught.value) == (
                "this signal handler cannot wait for the background save that is under way; "
                "set a flag in the handler, and save after it"
            )

    future = saver.submit(save, "'a'")
    try:
        threads.starting(handle)
    finally:
        going_on.set()
    future.result()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["save", "result", "wait"])
def test_a_signal_handler_can_wait_for_a_save_that_its_thread_waits_for(kind: str) -> None:
    """At every line of the interrupted wait."""

    def run(number: int) -> bool:
        started, go_on = threading.Event(), threading.Event()

        def save() -> None:
            started.set()
            go_on.wait()

        future = saver.submit(save, "'a'")
        started.wait()
        waits: dict[str, Callable[[], object]] = {
            "save": saver.wait_for_earlier,
            "result": future.result,
            "wait": lambda: wait([future]),
        }
        lines = iter(range(number))

        def trace(*event: Any) -> Any:
            if event[1] == "line" and next(lines, None) is None:
                sys.settrace(None)
                go_on.set()
                saver.wait_for_earlier()
                return None
            return trace

        def wait_interrupted() -> None:
            sys.settrace(trace)
            try:
                waits[kind]()
            finally:
                sys.settrace(None)

        thread = threading.Thread(target=wait_interrupted, daemon=True)
        thread.start()
        thread.join(0.02)
        go_on.set()
        thread.join(20)
        assert not thread.is_alive(), f"line {number}"
        future.result()
        return next(lines, None) is None

    number = 0
    while run(number):
        number += 1
    assert number > 2


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
    assert threads.start(ended, threading.get_ident).result(0) == threading.get_ident()
    with ThreadPoolExecutor(1) as pool, larger_than_memory():
        assert threads.start(pool, threading.get_ident).result(0) == threading.get_ident()
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


# --- a pool that can start only one of its threads ----------------------------------------------


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
            future.result(0)
    else:
        assert future.result(0) == found[0]


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
            future.result()
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


def test_a_task_that_its_pool_cancels_is_cancelled() -> None:
    go_on = threading.Event()
    pool = ThreadPoolExecutor(1)
    futures = [threads.start(pool, go_on.wait) for _ in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    go_on.set()
    assert futures[0].result()
    assert [future.cancelled() for future in futures] == [False, True, True]


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
        go_on.set()
    assert steps == [1]


# --- child processes ----------------------------------------------------------------------------


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


# --- locks ------------------------------------------------------------------------------------


@posix
def test_a_lock_that_another_program_keeps_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    before = names_in(tmp_path)
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.1)
    # As for a program that runs under `flock FOLDER`.
    with Folder(str(tmp_path), listed=True) as other, other.locked():
        with pytest.raises(TimeoutError, match="another program has locked the folder") as caught:
            save_pytree(tree_of(2), tmp_path, max_shard_size=100)
        assert caught.value.filename == str(tmp_path)
        assert "or one that runs under flock); save again when it has ended" in str(caught.value)
        save_pytree(tree_of(2), tmp_path / "alone")  # one file needs no lock
    assert names_in(tmp_path) == sorted([*before, "alone"])
    assert is_same(tree_of(1), load_pytree(tmp_path))


@posix
def test_a_lock_that_another_saver_lets_go_of_is_waited_for(tmp_path: Path) -> None:
    with Folder(str(tmp_path), listed=True) as other:
        with other.locked():
            saver = threading.Thread(
                target=lambda: save_pytree(tree_of(2), tmp_path, max_shard_size=100)
            )
            saver.start()
            time.sleep(0.3)
            assert outcome(tmp_path) in {"nothing", "cut short"}
        saver.join()
    assert outcome(tmp_path) == "new"


@posix
def test_a_file_system_without_locks_is_saved_to_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    save_pytree(tree_of(2), tmp_path, max_shard_size=100)
    assert outcome(tmp_path) == "new"
    assert not litter(tmp_path)

"""Signals never leak a descriptor or lose a checkpoint, and a signal handler may save."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

import system_calls
from folders import is_same, names_in, outcome, tree_of
from handlers import handling
from pytree2safetensors import load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._save import saver
from pytree2safetensors._storage import folder as folder_module
from pytree2safetensors._storage import threads
from pytree2safetensors._storage.folder import Folder
from versions import litter, posix

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
        assert threads.start(pool, threading.get_ident).result() == threading.get_ident()
        save_pytree_async(tree_of(1), tmp_path / "a").result(0)
        save_pytree(tree_of(2), tmp_path / "b", checksum=True)
        assert is_same(tree_of(1), load_pytree(tmp_path / "a"))
        assert is_same(tree_of(2), load_pytree(tmp_path / "b"))

    with ThreadPoolExecutor(1) as pool:
        threads.starting(handle)


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
def test_a_lock_that_another_save_lets_go_of_is_waited_for(tmp_path: Path) -> None:
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

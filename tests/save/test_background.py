"""Saving in the background, and showing progress."""

import asyncio
import concurrent.futures
import errno
import functools
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    UnsupportedLeafError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._save import parts, saver
from pytree2safetensors._storage.threads import End
from versions import posix


def test_the_file_is_that_of_the_synchronous_save(tmp_path: Path) -> None:
    tree = {
        "w": jnp.arange(9.0),
        "k": jax.random.key(1),
        "n": 2,
        "s": "text",
        "weak": jnp.asarray(1),
    }
    save_pytree(tree, tmp_path / "a", metadata={"run": "1"}, checksum=True)
    future = save_pytree_async(tree, tmp_path / "b", metadata={"run": "1"}, checksum=True)
    assert isinstance(future, Future)
    assert future.result() is None
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed")
def test_a_whole_path_needs_no_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    save_pytree_async({"a": 1}, tmp_path / "file").result()
    assert load_pytree(tmp_path / "file") == {"a": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed")
def test_a_relative_path_needs_a_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for limit in (None, 100):
        with pytest.raises(FileNotFoundError) as caught:
            save_pytree_async({"a": 1}, "new/file", max_shard_size=limit).result()
        assert caught.value.filename == "new/file"


@pytest.mark.parametrize("limit", [None, 100], ids=["file", "folder"])
def test_a_current_folder_under_another_name_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """The system may still give the path that the folder had."""
    for name in ("current", "wrong"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "current")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getcwd", lambda: str(tmp_path / "wrong"))
        save_pytree_async({"a": 1}, "file", max_shard_size=limit).result()
    assert load_pytree(tmp_path / "current" / "file") == {"a": 1}


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    array = np.zeros(1_000_000, np.float32)
    future = save_pytree_async({"a": array}, tmp_path / "file")
    array[:] = 1
    future.result()
    assert not np.asarray(load_pytree(tmp_path / "file")["a"]).any()


def test_a_snapshot_of_what_is_spread_over_devices_is_one_copy(tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    values = np.arange(8 << 20, dtype=np.float32)
    spec = jax.sharding.PartitionSpec("x")  # type: ignore[no-untyped-call] # JAX leaves it untyped
    tree = [jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))]
    tracemalloc.start()
    try:
        future = save_pytree_async(tree, tmp_path / "file")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * values.nbytes
    future.result()
    assert_same(load_pytree(tmp_path / "file"), [jnp.asarray(values)])


def test_what_is_donated_after_the_call_is_saved(tmp_path: Path) -> None:
    array = jnp.arange(100_000.0)
    expected = np.array(array)
    future = save_pytree_async({"a": array}, tmp_path / "file")
    jax.jit(lambda values: values * 0, donate_argnums=0)(array).block_until_ready()
    future.result()
    assert np.asarray(load_pytree(tmp_path / "file")["a"]).tobytes() == expected.tobytes()


def test_two_saves_to_one_path_stay_in_order(tmp_path: Path) -> None:
    futures = [
        save_pytree_async({"a": np.full(size, number, np.int32)}, tmp_path / "file")
        for number, size in enumerate((1_000_000, 10, 1))
    ]
    for future in futures:
        future.result()
    assert load_pytree(tmp_path / "file")["a"].tolist() == [2]


def test_a_save_that_has_ended_is_not_waited_for_even_in_a_handler_of_the_wait() -> None:
    end = End()
    end.come()
    end.come()  # a second time, from the callback of the future
    with end._until:  # as the wait that a signal has interrupted may hold it
        end.wait()


@pytest.mark.parametrize("name", ["file", "other"])
def test_save_pytree_waits_for_earlier_saves_in_the_background(tmp_path: Path, name: str) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        started.set()
        go_on.wait(20)

    background = save_pytree_async({"a": "old"}, tmp_path / "file", progress=wait)
    started.wait(20)
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    save_pytree({"a": "new"}, tmp_path / name)
    timer.join()
    assert background.done()
    assert load_pytree(tmp_path / name) == {"a": "new"}


@pytest.mark.parametrize("stop", ["cancel", "interrupt"])
def test_save_pytree_waits_for_saves_before_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        started.set()
        go_on.wait(20)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    background = save_pytree_async({"a": 1}, tmp_path / "file", progress=wait)
    started.wait(20)
    if stop == "cancel":
        assert save_pytree_async({"a": 2}, tmp_path / "file").cancel()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                save_pytree_async({"a": 2}, tmp_path / "file")
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    save_pytree({"a": 3}, tmp_path / "file")
    timer.join()
    assert background.done()
    assert load_pytree(tmp_path / "file") == {"a": 3}


def test_save_pytree_leaves_the_errors_of_earlier_saves_to_their_futures(tmp_path: Path) -> None:
    background = save_pytree_async({"a": 1}, tmp_path / "missing" / "file")
    save_pytree({"a": 2}, tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        background.result()


def test_a_callback_of_a_save_in_the_background_can_save(tmp_path: Path) -> None:
    background = save_pytree_async(
        {"a": 1}, tmp_path / "file", progress=lambda *_: save_pytree({"b": 2}, tmp_path / "other")
    )
    background.result(20)
    assert load_pytree(tmp_path / "other") == {"b": 2}


@pytest.mark.parametrize("cancelled", [False, True])
def test_save_pytree_in_a_callback_of_a_future_comes_after_the_saves_that_wait(
    tmp_path: Path, cancelled: bool
) -> None:
    begin, end = threading.Event(), threading.Event()
    first = save_pytree_async({"a": 0}, tmp_path / "first", progress=lambda *_: begin.wait(20))

    def save(_: object) -> None:
        save_pytree({"a": "new"}, tmp_path / "file")
        end.set()

    first.add_done_callback(save)
    waiting = [save_pytree_async({"a": n}, tmp_path / "file") for n in range(3)]
    if cancelled:
        assert waiting[1].cancel()
    begin.set()
    assert end.wait(20)
    later = save_pytree_async({"a": 4}, tmp_path / "later")
    assert later.result(20) is None  # the thread has found that nothing is left to do
    assert load_pytree(tmp_path / "file") == {"a": "new"}
    assert [future.cancelled() for future in waiting] == [False, cancelled, False]
    assert all(future.done() for future in waiting)


def held_back(tmp_path: Path) -> tuple[Callable[[], None], Callable[..., list[Any]]]:
    """Return what lets a first save go on, and what submits saves behind it with a callback."""
    release = threading.Event()
    first = save_pytree_async({"a": 0}, tmp_path / "first", progress=lambda *_: release.wait(20))

    def submit(count: int, callback: Any, targets: Any = None) -> list[Any]:
        futures = [first]
        for number in range(1, count):
            target = targets[number] if targets else tmp_path / f"{number}"
            futures.append(save_pytree_async({"a": number}, target))
        for number, future in enumerate(futures):
            future.add_done_callback(functools.partial(callback, number))
        return futures

    return release.set, submit


def test_callbacks_that_save_are_called_one_after_another(tmp_path: Path) -> None:
    lock, numbers = threading.Lock(), list[int]()

    def callback(number: int, _: Any) -> None:
        assert lock.acquire(timeout=5)
        try:
            save_pytree({"a": number}, tmp_path / "latest")
            numbers.append(number)
        finally:
            lock.release()

    go, submit = held_back(tmp_path)
    futures = submit(300, callback)  # more than the stack could take one in another
    go()
    for future in futures:
        future.result(60)
    save_pytree_async({}, tmp_path / "end").result(20)  # the callbacks have run
    assert numbers == [*range(300)]
    assert load_pytree(tmp_path / "latest") == {"a": 299}


def test_the_errors_of_saves_do_not_depend_on_each_other(tmp_path: Path) -> None:
    def callback(number: int, _: Any) -> None:
        save_pytree({"a": number}, tmp_path / "latest")

    go, submit = held_back(tmp_path)
    futures = submit(4, callback, [tmp_path, *(tmp_path / f"missing{n}" / "x" for n in range(3))])
    go()
    errors = [future.exception(20) for future in futures]
    assert errors[0] is None
    for number, error in enumerate(errors[1:]):
        assert isinstance(error, FileNotFoundError)
        chain: list[BaseException | None] = [error]
        while chain[-1] is not None:
            assert f"missing{number}" in str(chain[-1])
            chain.append(chain[-1].__context__)


def test_an_error_may_be_its_own_cause(tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        error = RuntimeError("of the callback")
        error.__context__ = ValueError("before")
        error.__context__.__cause__ = error
        raise error from error

    future = save_pytree_async({"a": np.ones(9)}, tmp_path / "file", progress=fail)
    with pytest.raises(RuntimeError, match="of the callback"):
        future.result(20)


def test_a_callback_during_a_save_does_not_wait_for_the_saves_that_wait(tmp_path: Path) -> None:
    begin = threading.Event()

    def save(*_: int) -> None:
        begin.wait(20)
        save_pytree({"a": "callback"}, tmp_path / "file")

    save_pytree_async({"a": 0}, tmp_path / "first", progress=save)
    waiting = save_pytree_async({"a": "waited"}, tmp_path / "file")
    begin.set()
    assert waiting.result(20) is None
    assert load_pytree(tmp_path / "file") == {"a": "waited"}


def test_a_callback_during_a_save_can_save_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    def save(*_: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", refuse)
            assert save_pytree_async({"b": 1}, tmp_path / "b").done()
        save_pytree({"c": 2}, tmp_path / "c")

    save_pytree_async({"a": 0}, tmp_path / "a", progress=save).result(20)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c"}


def test_the_name_of_a_thread_does_not_matter(tmp_path: Path) -> None:
    """A program may name its own thread as the saver's."""
    begin = threading.Event()
    future = save_pytree_async({"a": 0}, tmp_path / "file", progress=lambda *_: begin.wait(20))
    said: list[BaseException | None] = []
    thread = threading.Thread(
        target=lambda: said.append(future.exception()), name="pytree2safetensors-save-watcher"
    )
    thread.start()
    begin.set()
    thread.join(20)
    assert said == [None]


@pytest.mark.parametrize("method", ["result", "exception"])
def test_a_callback_of_a_background_save_cannot_wait_for_another(
    tmp_path: Path, method: str
) -> None:
    said: list[str] = []

    def wait(*_: int) -> None:
        later = save_pytree_async({"b": 2}, tmp_path / "other")
        with pytest.raises(RuntimeError) as caught:
            getattr(later, method)()
        said.append(str(caught.value))

    save_pytree_async({"a": 1}, tmp_path / "file", progress=wait).result(20)
    assert said == [
        "a callback of a background save cannot wait for a background save, because they run one "
        "after another; wait in another thread"
    ]
    save_pytree({"c": 3}, tmp_path / "file")
    assert load_pytree(tmp_path / "other") == {"b": 2}


def test_the_call_raises_what_it_can_check(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="'@f'"):
        save_pytree_async({"f": len}, tmp_path / "file")
    with pytest.raises(ValueError, match="is not a size"):
        save_pytree_async({"a": 1}, tmp_path / "file", max_shard_size="5 apples")
    with pytest.raises(ValueError, match="writes a folder"):
        save_pytree_async({"a": 1}, io.BytesIO(), max_shard_size="5GB")


def test_what_writing_raises_reaches_the_result(tmp_path: Path) -> None:
    future = save_pytree_async({"a": 1}, tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError) as caught:
        future.result()
    assert caught.value.filename == str(tmp_path / "missing" / "file")


def unasked(path: str, error: str, number: int) -> str:
    return (
        f"the background save to {path} failed, and its error was never retrieved: {error}. "
        f"Call result() or exception() on the future. Such errors so far: {number}."
    )


def failing(*_: int) -> None:
    raise ValueError("of a callback")


def warned(
    path: Any, ask: Callable[[Future[None]], object] = id, progress: Any = False
) -> list[str]:
    """The warnings of a save whose future is dropped after its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        future = save_pytree_async({"a": np.ones(3)}, path, progress=progress)
        wait([future])
        ask(future)
        alive = weakref.ref(future)
        del future
        deadline = time.monotonic() + 20
        while (
            alive() is not None and time.monotonic() < deadline
        ):  # the saver's thread drops it, too
            gc.collect()
    return [str(warning.message) for warning in caught]


def test_an_error_that_is_never_retrieved_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "_numbers", count(1))
    path = str(tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError) as caught:
        save_pytree({"a": 1}, path)
    assert warned(path) == [unasked(repr(path), f"FileNotFoundError: {caught.value}", 1)]
    assert warned(io.BytesIO(), progress=failing) == [
        unasked("a BytesIO", "ValueError: of a callback", 2)
    ]
    assert warned(tmp_path / "file") == []


def ask_for_result(future: Future[None]) -> None:
    with pytest.raises(ValueError, match="of a callback"):
        future.result()


def await_result(future: Future[None]) -> None:
    async def awaited() -> None:
        await asyncio.wrap_future(future)

    with pytest.raises(ValueError, match="of a callback"):
        asyncio.run(awaited())


ASKS: list[Callable[[Future[None]], object]] = [
    lambda future: future.exception(),
    lambda future: future.add_done_callback(lambda done: done.exception()),
    ask_for_result,
    await_result,
]


@pytest.mark.parametrize("ask", ASKS)
def test_what_was_asked_for_is_no_warning(ask: Callable[[Future[None]], object]) -> None:
    assert warned(io.BytesIO(), ask, failing) == []


def test_a_time_that_was_up_is_no_answer(tmp_path: Path) -> None:
    go_on = threading.Event()

    def fail_later(*_: int) -> None:
        go_on.wait(20)
        raise ValueError("of a callback")

    future = save_pytree_async({"a": np.ones(3)}, tmp_path / "file", progress=fail_later)
    for ask in (future.result, future.exception):
        with pytest.raises(concurrent.futures.TimeoutError):
            ask(0)
    go_on.set()
    wait([future])
    with pytest.warns(
        UserWarning, match="its error was never retrieved: ValueError: of a callback"
    ):
        future.__del__()  # type: ignore[attr-defined] # what Python calls


def test_each_error_that_is_never_retrieved_is_shown(tmp_path: Path) -> None:
    """Python shows a warning of one text once, as a program that saves in a loop would give it."""
    code = (
        "import sys, pytree2safetensors as p\n"
        "for n in range(3):\n"
        "    p.save_pytree_async({'a': n}, sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "missing" / "file")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr.count("UserWarning") == 3


LAST_WORDS = """
import sys
import numpy as np
import pytree2safetensors as p2s
future = p2s.save_pytree_async({"a": np.ones(3)}, sys.argv[1])
"""


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("", True),
        ("del future", True),
        ("cycle = [future]; cycle.append(cycle); del cycle, future", True),
        ("raise SystemExit", True),
        ("future.exception()", False),
    ],
)
def test_the_end_of_the_interpreter_tells_errors(rest: str, told: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "missing" / "file")
    run = subprocess.run(
        [sys.executable, "-c", LAST_WORDS + rest, path], capture_output=True, text=True, check=True
    )
    expected = (
        f"the background save to {path!r} failed, and its error was never retrieved: FileNotFound"
    )
    assert run.stderr.count("UserWarning") == told
    assert (expected in run.stderr) == told


def test_a_relative_path_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    before = save_pytree_async({"a": np.zeros(2_000_000, np.float32)}, "first")
    future = save_pytree_async({"a": 1}, "file")
    folders = ["new", "two/levels", "three/new/levels/named.safetensors"]
    futures = [save_pytree_async({"a": 1}, path, max_shard_size=100) for path in folders]
    monkeypatch.chdir(tmp_path / "later")
    before.result()
    future.result()
    assert load_pytree(tmp_path / "file") == {"a": 1}
    for path, future in zip(folders, futures, strict=True):
        future.result()
        assert load_pytree(tmp_path / path) == {"a": 1}
    assert not any((tmp_path / "later").iterdir())


def test_the_interpreter_waits_for_saves(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, pytree2safetensors as p\n"
        "for n in range(3):\n"
        "    p.save_pytree_async({'a': np.full(3_000_000, n, np.float32)}, sys.argv[1])\n"
    )
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert float(load_pytree(path)["a"][-1]) == 2.0


WITH_THREADS = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import pytree2safetensors as p2s
def progress(*_):  # as the client of a store does when it looks up the address
    time.sleep(0.5)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
def again(_):
    p2s.save_pytree_async({"a": 2}, sys.argv[2], progress=progress)
p2s.save_pytree_async({"a": 1}, sys.argv[1], progress=progress).add_done_callback(again)
"""


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3), reason="this Python starts no threads when it exits"
)
def test_saves_that_the_interpreter_waits_for_can_start_threads(tmp_path: Path) -> None:
    paths = [tmp_path / "file", tmp_path / "again"]
    command = [sys.executable, "-c", WITH_THREADS, *map(str, paths)]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert [load_pytree(path) for path in paths] == [{"a": 1}, {"a": 2}]


FIRST_AT_EXIT = """
import sys, threading
import pytree2safetensors as p2s
def work():
    threading.main_thread().join()
    p2s.save_pytree({"a": 1}, sys.argv[1])
    p2s.save_pytree_async(p2s.load_pytree(sys.argv[1]), sys.argv[2]).result()
threading.Thread(target=work).start()
"""


def test_the_first_use_may_be_when_the_interpreter_exits(tmp_path: Path) -> None:
    paths = [tmp_path / "file", tmp_path / "again"]
    command = [sys.executable, "-c", FIRST_AT_EXIT, *map(str, paths)]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert [load_pytree(path) for path in paths] == [{"a": 1}, {"a": 1}]


def test_progress_is_reported_at_least_every_64_mib_and_at_the_end(tmp_path: Path) -> None:
    tree = {f"{n}": np.zeros(10_000_000, np.float32) for n in range(5)}
    told: list[tuple[int, int]] = []
    save_pytree(tree, tmp_path / "file", durable=False, progress=lambda *both: told.append(both))
    total = (tmp_path / "file").stat().st_size
    check_reports(told, total)
    told.clear()
    load_pytree(tmp_path / "file", progress=lambda *both: told.append(both))
    check_reports(told, 5 * 40_000_000)
    told.clear()
    load_into_pytree(tree, tmp_path / "file", progress=lambda *both: told.append(both))
    check_reports(told, 5 * 40_000_000)


def check_reports(told: list[tuple[int, int]], total: int) -> None:
    assert told[-1] == (total, total)
    assert {whole for _, whole in told} == {total}
    done = [0, *(part for part, _ in told)]
    steps = [later - earlier for earlier, later in pairwise(done)]
    assert all(0 <= step <= 64 << 20 for step in steps)


def test_a_small_tree_tells_its_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    save_pytree({}, tmp_path / "file", progress=lambda *both: told.append(both))
    assert len(told) == 1
    told.clear()
    load_pytree(tmp_path / "file", progress=lambda *both: told.append(both))
    assert told == [(0, 0)]


def test_a_bar_is_shown_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pytree({"a": np.zeros(9)}, tmp_path / "file")
    assert capsys.readouterr() == ("", "")
    save_pytree({"a": np.zeros(9)}, tmp_path / "file", progress=True)
    assert "saving" in capsys.readouterr().err


def test_a_missing_tqdm_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        ImportError, match="which is not installed; install tqdm, or pass a function"
    ):
        save_pytree({"a": 1}, tmp_path / "file", progress=True)
    assert not (tmp_path / "file").exists()


def test_an_error_in_the_callback_leaves_the_old_file(tmp_path: Path) -> None:
    save_pytree({"a": 1}, tmp_path / "file")

    def fail(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError):
        save_pytree({"a": 2}, tmp_path / "file", progress=fail)
    assert_same(load_pytree(tmp_path / "file"), {"a": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_saves_from_many_threads_at_once(tmp_path: Path) -> None:
    def save(number: int) -> None:
        save_pytree({"a": np.full(50_000, number)}, tmp_path / f"{number}")

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    template = {"a": np.zeros(50_000, np.int64)}
    for number in range(8):
        assert load_into_pytree(template, tmp_path / f"{number}")["a"].tolist() == [number] * 50_000


def test_an_interrupt_of_the_call_stops_the_save_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pytree_async({"a": 1}, tmp_path / "a")
    save_pytree({"b": 2}, tmp_path / "b")  # which waits for the end of earlier saves
    save_pytree_async({"c": 3}, tmp_path / "c").result()
    assert {file.name for file in tmp_path.iterdir()} == {"b", "c"}


@pytest.mark.parametrize(
    "said", ["can't start new thread", "cannot schedule new futures after interpreter shutdown"]
)
def test_without_threads_the_call_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError(said)

    save_pytree_async({"a": 1}, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", refuse)
        assert save_pytree_async({"a": 2}, tmp_path / "a").done()
        assert load_pytree(tmp_path / "a") == {"a": 2}
        assert isinstance(save_pytree_async({}, tmp_path / "b" / "c").exception(), OSError)
    save_pytree({"a": 3}, tmp_path / "a")


@pytest.mark.parametrize("is_at_exit", [False, True])
def test_after_an_interrupt_of_the_start_of_the_thread_others_wait_for_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_at_exit: bool
) -> None:
    started, go_on = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []
    real = threading.Thread.start

    def wait_too(*_: int) -> None:
        started.set()
        go_on.wait(20)

    def interrupted(thread: threading.Thread) -> None:
        real(thread)
        threads.append(thread)
        started.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "_savers", [])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pytree_async({"a": 1}, tmp_path / "file", progress=wait_too)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        later = [pool.submit(saver._finish_all)] if is_at_exit else []
        if not is_at_exit:
            later.append(save_pytree_async({"a": 2}, tmp_path / "file"))
        assert not wait(later, 0.2).done
        go_on.set()
        later[0].result(20)
    assert load_pytree(tmp_path / "file") == {"a": 1 if is_at_exit else 2}
    threads[0].join(20)
    assert not threads[0].is_alive()  # the interpreter waits for it


def test_without_a_thread_the_call_leaves_a_save_to_the_thread_that_has_begun_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another call has started that thread."""
    steps: list[int] = []
    begun = threading.Event()
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def submit_in_vain(*args: Any) -> None:
        submit(*args)
        begun.wait(20)
        raise RuntimeError("can't start new thread")

    def save() -> None:
        begun.set()
        steps.append(threading.get_ident())

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit_in_vain)
    saver.submit(save, "'a'").result(20)
    saver.wait_for_earlier()
    assert len(steps) == 1
    assert steps[0] != threading.get_ident()


def test_a_snapshot_is_freed_before_the_callbacks_of_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may start the next save, which makes another one."""
    copies, alive = list[weakref.ref[Any]](), list[bool]()

    def copied(leaves: Any) -> list[Any]:
        found = parts.copied(leaves)
        copies.extend(weakref.ref(copy) for copy in found if isinstance(copy, np.ndarray))
        return found

    release = threading.Event()
    earlier = save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: release.wait(20))
    monkeypatch.setattr("pytree2safetensors._save.api.copied", copied)
    gc.disable()
    try:
        future = save_pytree_async({"a": np.ones(9), "b": jnp.ones(9)}, tmp_path / "b")
        future.add_done_callback(lambda _: alive.extend(copy() is not None for copy in copies))
        release.set()
        earlier.result(20)
        future.result(20)
    finally:
        gc.enable()
    save_pytree_async({}, tmp_path / "c").result(20)  # the callbacks have run
    assert alive == [False, False]


class Full(io.RawIOBase):
    """A file object on a full disk."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("target", ["stream", "missing/file", "missing/file.json", "folder"])
def test_the_snapshot_of_a_save_that_failed_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    copies = list[weakref.ref[Any]]()

    def copied(leaves: Any) -> list[Any]:
        found = parts.copied(leaves)
        copies.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr("pytree2safetensors._save.api.copied", copied)
    (tmp_path / "folder").mkdir()
    gc.disable()
    try:
        future = save_pytree_async(
            {"a": np.ones(9)}, Full() if target == "stream" else tmp_path / target
        )
        error = future.exception(20)
        assert isinstance(error, OSError)
        assert error.__traceback__ is not None
        assert [copy() for copy in copies] == [None]
    finally:
        gc.enable()


def test_a_save_that_failed_is_freed_with_its_future(tmp_path: Path) -> None:
    future = save_pytree_async({"a": np.ones(9)}, tmp_path / "missing" / "file")
    assert isinstance(future.exception(), OSError)
    save_pytree_async({"a": 1}, tmp_path / "file").result()  # the thread has left the first one
    alive = weakref.ref(future)
    gc.disable()
    try:
        del future
        assert alive() is None
    finally:
        gc.enable()


def test_an_error_of_a_signal_handler_during_the_call_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise RuntimeError("received SIGTERM: shutdown requested")

    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(RuntimeError, match="shutdown requested"):
            save_pytree_async({"a": 1}, tmp_path / "a")
    save_pytree({"b": 2}, tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"b"}


def test_a_save_that_is_cancelled_frees_its_snapshot_at_once(tmp_path: Path) -> None:
    class Progress:
        def __call__(self, done: int, total: int) -> None:
            """Do nothing; the save that waits keeps this."""

    release, progress = threading.Event(), Progress()
    alive = weakref.ref(progress)
    earlier = save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: release.wait(20))
    future = save_pytree_async({"b": 2}, tmp_path / "b", progress=progress)
    gc.disable()
    try:
        del progress
        assert future.cancel()
        assert alive() is None
    finally:
        gc.enable()
    release.set()
    earlier.result(20)


def test_an_interrupt_of_a_cancellation_holds_no_other_save_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: release.wait(20))
    future = save_pytree_async({"b": 2}, tmp_path / "b")

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "_invoke_callbacks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            future.cancel()
    later = threading.Thread(
        target=save_pytree, args=[{"c": 3}, tmp_path / "c"], daemon=True
    )  # for a test that fails
    later.start()
    release.set()
    later.join(20)
    assert not later.is_alive()
    assert {file.name for file in tmp_path.iterdir()} == {"a", "c"}


def test_a_callback_that_raises_system_exit_strands_no_save(tmp_path: Path) -> None:
    release = threading.Event()

    def callback(_: object) -> None:
        save_pytree({"c": 3}, tmp_path / "c")
        raise SystemExit

    first = save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: release.wait(20))
    first.add_done_callback(callback)
    second = save_pytree_async({"b": 2}, tmp_path / "b")
    release.set()
    second.result(20)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c"}


def test_a_finalizer_of_what_a_save_frees_can_save(tmp_path: Path) -> None:
    class Progress:
        def __call__(self, done: int, total: int) -> None:
            """Do nothing."""

        def __del__(self) -> None:
            save_pytree({"b": 2}, tmp_path / "b")

    save_pytree_async({"a": 1}, tmp_path / "a", progress=Progress()).result(20)
    save_pytree_async({"c": 3}, tmp_path / "c").result(20)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c"}


def test_an_error_of_a_save_ends_no_generator_that_has_caught_it(tmp_path: Path) -> None:
    errors = list[BaseException]()

    def uploads() -> Generator[None, bytes, None]:
        while True:
            data = yield
            try:
                Full().write(data)
            except OSError as error:
                errors.append(error)

    uploader = uploads()
    next(uploader)

    class File(io.RawIOBase):
        def write(self, data: Any) -> int:
            uploader.send(data)
            raise errors[-1]

    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            save_pytree_async({"a": 1}, File()).result(20)
    assert len(errors) == 2


def test_an_interrupt_of_a_call_replaces_no_thread_that_another_call_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree_async({"a": 1}, tmp_path / "a").result(20)
    reached, release = threading.Event(), threading.Event()
    other, futures = threading.Thread(), list[Any]()

    class Slow(dict[Any, Any]):
        def __setitem__(self, end: Any, waiting: Any) -> None:
            super().__setitem__(end, waiting)
            if threading.current_thread() is other:
                reached.set()
                release.wait(20)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "_unfinished", Slow())
    other = threading.Thread(
        target=lambda: futures.append(save_pytree_async({"b": 2}, tmp_path / "b"))
    )
    other.start()
    assert reached.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(saver._savers[0], "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pytree_async({"c": 3}, tmp_path / "c")
    release.set()
    other.join(20)
    assert futures[0].result(20) is None
    save_pytree({"d": 4}, tmp_path / "d")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "d"}


def test_an_interrupt_of_a_wait_retrieves_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = save_pytree_async({"a": 1}, tmp_path / "missing" / "a")
    wait([future])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            future.result()
    with pytest.warns(UserWarning, match="its error was never retrieved"):
        future.warn()  # type: ignore[attr-defined] # as at the end of the interpreter


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_child_does_not_warn_of_the_errors_of_its_parent(tmp_path: Path) -> None:
    future = save_pytree_async({"a": 1}, tmp_path / "missing" / "a")
    wait([future])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python: the child does nothing that could hang
        child = os.fork()
        if not child:
            warnings.simplefilter("error")
            told = 0
            try:
                future.warn()  # type: ignore[attr-defined] # as at the end of the interpreter
            except UserWarning:
                told = 1
            os._exit(told)
        _, status = os.waitpid(child, 0)
    assert status == 0
    with pytest.warns(UserWarning, match="its error was never retrieved"):
        future.warn()  # type: ignore[attr-defined] # of the parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_child_does_not_wait_for_the_saves_of_its_parent(tmp_path: Path) -> None:
    begin = threading.Event()
    done = save_pytree_async({"a": 0}, tmp_path / "done")
    assert done.result(20) is None
    saving = save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: begin.wait(20))
    waiting = save_pytree_async({"a": 2}, tmp_path / "b")
    said = [
        f"the process that this one was forked from saves to {str(tmp_path / name)!r}; call this "
        "method of the future there"
        for name in ("a", "b")
    ]

    def child() -> None:
        assert done.result() is done.exception() is None
        assert not waiting.cancel()
        for future, expected in zip((saving, waiting), said, strict=True):
            for method in (future.result, future.exception):
                for timeout in (None, 1):
                    with pytest.raises(RuntimeError) as caught:
                        method(timeout)
                    assert str(caught.value) == expected

    assert status_of_child(child) == 0
    begin.set()
    assert waiting.result(20) is None
    assert load_pytree(tmp_path / "b") == {"a": 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_child_of_the_thread_that_saves_is_not_that_thread(tmp_path: Path) -> None:
    statuses = list[int]()

    def child() -> None:
        assert not saver.is_current()
        saver.submit(lambda: None, "'a'").result(20)

    def fork(*_: int) -> None:
        statuses.append(status_of_child(child))

    save_pytree_async({"a": 1}, tmp_path / "a", progress=fork).result(20)
    assert statuses == [0]


def status_of_child(work: Callable[[], None]) -> int:
    """Return the exit status of a child process that does some work, and nothing that could hang."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python
        child = os.fork()
        if not child:
            status = 1
            signal.alarm(20)
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("within", ["another thread", "a callback"])
def test_no_save_waits_for_a_call_that_is_still_running(tmp_path: Path, within: str) -> None:
    begun, saved = threading.Event(), threading.Event()

    def save_again() -> None:
        save_pytree_async({"a": 2}, tmp_path / "a").result(20)
        saved.set()

    def progress(*_: object) -> None:
        begun.set()
        if within == "a callback":
            save_again()
        assert saved.wait(20)

    call = threading.Thread(
        target=save_pytree, args=[{"a": 1}, tmp_path / "a"], kwargs={"progress": progress}
    )
    call.start()
    assert begun.wait(20)
    if within == "another thread":
        save_again()
    call.join(20)
    assert load_pytree(tmp_path / "a") == {"a": 1}


def test_a_finalizer_that_saves_after_a_save_leaves_none_without_a_result(tmp_path: Path) -> None:
    class Trainer:
        def log(self, _: object) -> None:
            """Do nothing; the future keeps this."""

        def __del__(self) -> None:
            save_pytree({"c": 3}, tmp_path / "c")

    release, trainer = threading.Event(), Trainer()
    first = save_pytree_async({"a": 1}, tmp_path / "a", progress=lambda *_: release.wait(20))
    first.add_done_callback(trainer.log)
    del trainer, first
    second = save_pytree_async({"b": 2}, tmp_path / "b")
    release.set()
    second.result(20)
    save_pytree_async({"d": 4}, tmp_path / "d").result(20)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c", "d"}


class Unprintable:
    """A name that is not a string."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("name", [None, Unprintable()], ids=["None", "unprintable"])
def test_an_error_from_code_of_no_module_is_raised(name: Any, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": name}
    exec("def progress(*_): raise ValueError('no module')", names)
    with pytest.raises(ValueError, match="no module"):
        save_pytree_async({"a": 1}, tmp_path / "a", progress=names["progress"]).result(20)


@posix
def test_a_signal_handler_may_save_while_two_saves_are_waited_for(tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()

    def progress(*_: object) -> None:
        begun.set()
        release.wait(20)

    def handle(*_: object) -> None:
        release.set()
        save_pytree({"c": 3}, tmp_path / "c")

    first = save_pytree_async({"a": 1}, tmp_path / "a", progress=progress)
    second = save_pytree_async({"b": 2}, tmp_path / "b")
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        assert begun.wait(20)
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        first.result()
        second.result()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c"}

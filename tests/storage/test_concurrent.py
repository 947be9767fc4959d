"""Saves that are killed, concurrent saves, and concurrent loads."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from folders import names_in
from oracle import assert_loaded
from pytree2safetensors import load_pytree, save_pytree
from pytree2safetensors._load.opening import open_checkpoint
from versions import assert_holds, litter, posix, replaces_open_files, version

# --- killed -----------------------------------------------------------------------------------

SAVER = """
import os, sys
import numpy as np
from pytree2safetensors import save_pytree

def version(number, size):
    data, pair = np.full(size, number, np.int32), np.arange(number % 7, dtype=np.float32)
    return {"data": data, "pair": (pair, None), "step": number}

for line in sys.stdin:
    path, *numbers = line.rstrip("\\n").split("\\t")
    number, size, durable = map(int, numbers)
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    while True:
        number += 1
        save_pytree(version(number, size), path, durable=bool(durable))
"""


class Saver:
    """Starts processes that save version after version, until they are killed."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", f"import signal\n{IGNORE_CHILDREN}\n{SAVER}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, path: Path, after: int, size: int, durable: bool) -> int:
        """Start to save the versions after a number; the process that does so."""
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        self.parent.stdin.write(f"{path}\t{after}\t{size}\t{int(durable)}\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def end(self) -> None:
        with self.parent as parent:
            assert parent.stdin is not None
            parent.stdin.close()
            assert parent.wait(timeout=60) == 0


# The system buries the children, so that a process that is killed is gone.
IGNORE_CHILDREN = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    found = Saver()
    yield found
    found.end()


@posix
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new(
    tmp_path: Path, saver: Saver
) -> None:
    path = tmp_path / "model"
    chance = random.Random(0)
    found = interrupted = 0
    save_pytree(version(0), path)
    for number in range(60):
        size = 1 << chance.randrange(8, 18)
        before = path.stat().st_ino
        process = saver.start(path, found, size, durable=number % 2 == 0)
        while path.stat().st_ino == before and not litter(tmp_path):
            os.kill(process, 0)  # raises an error if it failed
        time.sleep(chance.random() * 0.01)
        kill(process)
        found = assert_holds(path, *range(found, found + 1000))
        interrupted += bool(litter(tmp_path))
        for left in litter(tmp_path):
            left.unlink()
    assert found > 0
    assert interrupted > 5  # or the kills came when nothing was being saved


# --- several at once --------------------------------------------------------------------------


def test_of_two_savers_the_last_wins_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    # The second begins and ends while the first is at work.
    save_pytree(version(1), path, progress=lambda *_: save_pytree(version(2), path))
    assert_holds(path, 1)
    assert not litter(tmp_path)


@replaces_open_files
def test_savers_in_threads_and_readers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(version(0), path)
    problems: list[Exception] = []
    ending = threading.Event()

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the main thread fails with it
            problems.append(error)

    def save(first: int) -> None:
        for number in range(first, first + 25):
            save_pytree(version(number, 40_000), path, durable=False)

    def read() -> None:
        while not ending.is_set():
            assert_holds(path, *range(100))

    readers = [threading.Thread(target=run, args=(read,)) for _ in range(2)]
    savers = [threading.Thread(target=run, args=(lambda n=n: save(n),)) for n in (1, 26, 51)]
    for thread in [*readers, *savers]:
        thread.start()
    for thread in savers:
        thread.join()
    ending.set()
    for thread in readers:
        thread.join()
    assert not problems
    assert_holds(path, 25, 50, 75)
    assert not litter(tmp_path)


@posix
def test_loads_of_shards_never_fail_while_they_are_replaced(tmp_path: Path) -> None:
    def save(number: int) -> None:
        save_pytree(version(number), tmp_path, max_shard_size=1200, durable=False)

    save(0)
    assert len(names_in(tmp_path)) == 2 + 1
    with ThreadPoolExecutor() as pool:
        saving = pool.submit(lambda: list(map(save, range(1, 100))))
        while not saving.done():
            assert_holds(tmp_path, *range(100))
        saving.result()
    assert_holds(tmp_path, 99)


@posix
def test_savers_in_processes_and_a_reader_never_mix(tmp_path: Path, saver: Saver) -> None:
    path = tmp_path / "model"
    save_pytree(version(0), path)
    processes = [saver.start(path, after, 40_000, durable=False) for after in (0, 100_000)]
    seen = set()
    try:
        for _ in range(10_000):  # a bound: it ends when both were seen
            seen.add(assert_holds(path, *range(200_000)) > 100_000)
            if len(seen) == 2:
                break
    finally:
        for process in processes:
            kill(process)
    assert seen == {False, True}


@replaces_open_files
def test_a_reader_that_began_before_a_save_reads_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(version(1, 100_000), path)
    with path.open("rb") as file, open_checkpoint(path) as store:
        save_pytree(version(2, 100_000), path)
        assert load_pytree(file)["step"] == 1
        source, offset = store.places["@data"]
        old = np.frombuffer(source.read(offset, 400_000), np.int32)
    assert (old == 1).all()
    assert_holds(path, 2)


# --- over the file itself ---------------------------------------------------------------------


READ_OR_MAPPED = [
    pytest.param(False, id="read"),
    pytest.param(True, id="mapped", marks=replaces_open_files),
]


@pytest.mark.parametrize("mmap", READ_OR_MAPPED)
def test_a_tree_can_be_saved_over_the_file_that_it_came_from(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    save_pytree(version(3, 1 << 18), path)
    tree = load_pytree(path, mmap=mmap)
    save_pytree(tree, path)
    assert_holds(path, 3)
    changed = {**tree, "data": tree["data"] + 1, "step": 4}
    save_pytree(changed, path)
    assert_loaded(tree, version(3, 1 << 18))
    assert np.asarray(load_pytree(path)["data"] == 4).all()


@pytest.mark.parametrize("mmap", READ_OR_MAPPED)
def test_what_was_loaded_outlives_the_file(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    save_pytree(version(3, 1 << 18), path)
    tree = load_pytree(path, mmap=mmap)
    path.unlink()
    assert_loaded(tree, version(3, 1 << 18))

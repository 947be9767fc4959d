"""A file appears whole or not at all, whatever happens on the way."""

import errno
import io
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pytree2safetensors._storage.atomic_file
import pytree2safetensors._storage.progress
from pytree2safetensors import (
    FileFormatError,
    UnsupportedLeafError,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._compare import assert_same
from pytree2safetensors._load.checkpoint import open_checkpoint
from system_calls import FAULTS, SHORT, Call, Fault, Recorder, watched

TEMPORARY = ".pytree2safetensors-*"

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
superuser = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="giving files away is for the superuser"
)


def version(number: int, size: int = 300) -> Any:
    """A tree of its own, with arrays, scalars, and nodes that need a note."""
    return {
        "data": np.full(size, number, np.int32),
        "pair": (np.arange(number % 7, dtype=np.float32), None),
        "step": number,
    }


def assert_holds(path: Path, *numbers: int) -> int:
    """Assert that a file holds one of these versions, whole."""
    found = load_pytree(path)
    assert found["step"] in numbers
    assert_same(version(found["step"], len(found["data"])), found, "from the file")
    return int(found["step"])


def litter(folder: Path) -> list[Path]:
    return list(folder.glob(TEMPORARY))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


# --- the order of things ----------------------------------------------------------------------


def calls_of_a_save(path: Path, durable: bool) -> list[str]:
    recorder = Recorder()
    with watched(recorder):
        save_pytree(version(1), path, durable=durable)
    changing = {"open", "write", "fsync", "replace", "unlink", "close", "fchmod"}
    return [str(call) for call in recorder.calls if call.name in changing]


@posix
def test_the_file_is_flushed_then_renamed_then_its_folder_is_flushed(tmp_path: Path) -> None:
    assert calls_of_a_save(tmp_path / "model", durable=True) == [
        "open folder",  # where that is refused, nothing is done
        "open temporary",
        "write temporary",  # the header
        "write temporary",  # the data
        "fsync temporary",
        "close temporary",
        "replace temporary model",
        "fsync folder",
        "close folder",
    ]


@posix
def test_without_durable_nothing_is_flushed(tmp_path: Path) -> None:
    assert calls_of_a_save(tmp_path / "model", durable=False) == [
        "open temporary",
        "write temporary",  # the header
        "write temporary",  # the data
        "close temporary",
        "replace temporary model",
    ]


@posix
def test_a_folder_that_cannot_be_flushed_is_left_unflushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_pytree(version(1), tmp_path / "model")
    assert_holds(tmp_path / "model", 1)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_need_not_reserve_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(pytree2safetensors._storage.atomic_file, "_PREALLOCATED", 0)
    save_pytree(version(1), tmp_path / "model")
    assert_holds(tmp_path / "model", 1)


def test_the_temporary_file_is_in_the_folder_of_the_file(tmp_path: Path) -> None:
    seen: list[Path] = []
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "model"
    save_pytree(version(1), path, progress=lambda *_: seen.extend(litter(path.parent)))
    assert len(seen) == 1
    assert not litter(path.parent)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("m" * 255)
    save_pytree(version(1), path)
    assert_holds(path, 1)


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pytree(version(1), "model")
    save_pytree(version(2), Path("model"))
    assert_holds(tmp_path / "model", 2)
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


def test_a_save_ends_in_the_folder_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    save_pytree(version(1), "model", progress=lambda *_: os.chdir(tmp_path))
    assert_holds(tmp_path / "first" / "model", 1)


# --- faults -----------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the calls of a large file those of a small one."""
    monkeypatch.setattr(pytree2safetensors._storage.atomic_file, "_PREALLOCATED", 0)
    monkeypatch.setattr(pytree2safetensors._storage.atomic_file, "_STEP", 640)
    monkeypatch.setattr(pytree2safetensors._storage.progress, "_STEP", 320)


def recorded(path: Path, existing: bool, recorder: Recorder) -> BaseException | None:
    """Save version 2, over version 1 or nothing; what was raised."""
    path.unlink(missing_ok=True)
    if existing:
        save_pytree(version(1), path)
        path.chmod(0o640)
    try:
        with watched(recorder):
            save_pytree(version(2), path)
    except (OSError, KeyboardInterrupt) as error:
        return error
    return None


@posix
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("existing", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_save_that_fails_at_any_call_changes_nothing(
    tmp_path: Path, existing: bool, fault: Fault
) -> None:
    path = tmp_path / "model"
    clean = Recorder()
    assert recorded(path, existing, clean) is None
    names = [call.name for call in clean.calls]
    assert {"readlink", "stat", "open", "posix_fallocate", "write", "fsync", "close"} < set(names)
    assert "fchmod" in names or not existing
    assert names.count("write") > 1
    rename = names.index("replace")
    held = open_descriptors()
    for number, call in enumerate(clean.calls):
        if fault is SHORT and call.name != "write":
            continue
        recorder = Recorder(number, fault)
        error = recorded(path, existing, recorder)
        assert recorder.calls[: number + 1] == clean.calls[: number + 1]
        check_error(error, fault, call, path)
        committed = number > rename or fault is SHORT or (fault.after and number == rename)
        if committed:
            assert_holds(path, 2)
        elif existing:
            assert_holds(path, 1)
        else:
            assert not path.exists()
        assert not litter(tmp_path), call
        # What an interrupt takes from `os.open` nobody can close.
        lost = fault.after and call.name == "open"
        held += lost
        assert open_descriptors() == held, call


def check_error(error: BaseException | None, fault: Fault, call: Call, path: Path) -> None:
    """Every fault but a short write is told, and an error of the system names the path."""
    if fault is SHORT:
        assert error is None
    elif isinstance(error, OSError):
        assert os.strerror(error.errno or 0) == error.strerror
        assert errno.errorcode[error.errno or 0] == fault.name
        assert error.filename == str(path)
        assert error.filename2 is None
        assert str(error) == f"[Errno {error.errno}] {error.strerror}: {str(path)!r}"
    else:
        assert isinstance(error, KeyboardInterrupt), call
        assert fault.error is KeyboardInterrupt


def test_an_error_that_is_not_the_systems_stays_as_it_is(tmp_path: Path) -> None:
    class Mine(OSError):
        def __init__(self, number: int) -> None:
            super().__init__(number, "mine")

    def fail(*_: int) -> None:
        raise Mine(5)

    save_pytree(version(1), tmp_path / "model")
    with pytest.raises(Mine):
        save_pytree(version(2), tmp_path / "model", progress=fail)
    assert_holds(tmp_path / "model", 1)
    assert not litter(tmp_path)


@pytest.mark.usefixtures("small_pieces")
def test_a_leaf_that_fails_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    tree = {"a": jnp.zeros(1 << 14), "b": jnp.zeros(1 << 14)}
    path = tmp_path / "model"
    save_pytree(version(1), path)
    half_written: list[Path] = []

    def delete(done: int, total: int) -> None:
        assert done < total
        half_written.extend(litter(tmp_path))
        tree["b"].delete()

    with pytest.raises(RuntimeError, match="deleted"):
        save_pytree(tree, path, progress=delete)
    assert half_written
    assert_holds(path, 1)
    assert not litter(tmp_path)


def test_an_unsupported_leaf_is_found_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    recorder = Recorder()
    with watched(recorder), pytest.raises(UnsupportedLeafError):
        save_pytree({**version(2), "function": print}, path)
    assert recorder.calls == []


def test_metadata_that_cannot_be_stored_are_found_before_the_file_is_touched(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    with watched(recorder), pytest.raises(FileFormatError):
        save_pytree(version(2), tmp_path / "model", metadata={"pytree2safetensors": "{}"})
    assert recorder.calls == []


# --- a full disk ------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
@pytest.mark.parametrize("size", [1 << 19, 3 << 20], ids=["written", "reserved"])
@pytest.mark.parametrize("existing", [True, False], ids=["replacing", "new"])
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, size: int, existing: bool) -> None:
    path = tmp_path / "model"
    if existing:
        save_pytree(version(1), path)
    with largest_file(1 << 20), pytest.raises(OSError, match="File too large") as caught:
        save_pytree(version(2, size), path)
    assert caught.value.filename == str(path)
    if existing:
        assert_holds(path, 1)
    assert len(list(tmp_path.iterdir())) == existing
    save_pytree(version(2, size), path)
    assert_holds(path, 2)


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
            time.sleep(0)
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


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_a_tree_can_be_saved_over_the_file_that_it_came_from(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    save_pytree(version(3, 1 << 18), path)
    tree = load_pytree(path, mmap=mmap)
    save_pytree(tree, path)
    assert_holds(path, 3)
    changed = {**tree, "data": tree["data"] + 1, "step": 4}
    save_pytree(changed, path)
    assert_same(version(3, 1 << 18), tree, "before the file changed")
    assert np.asarray(load_pytree(path)["data"] == 4).all()


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_what_was_loaded_outlives_the_file(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model"
    save_pytree(version(3, 1 << 18), path)
    tree = load_pytree(path, mmap=mmap)
    path.unlink()
    assert_same(version(3, 1 << 18), tree, "after the file has gone")


# --- links, permissions, and what is no file --------------------------------------------------


@posix
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    target = tmp_path / "far" / "away" / "model"
    save_pytree(version(1), target)
    (tmp_path / "far" / "link").symlink_to("away/model")
    (tmp_path / "near").symlink_to("far")
    link = tmp_path / "link"
    link.symlink_to("near/link")
    save_pytree(version(2), link)
    assert link.is_symlink()
    assert (tmp_path / "far" / "link").is_symlink()
    assert not target.is_symlink()
    assert_holds(target, 2)
    assert list(target.parent.iterdir()) == [target]


@posix
def test_a_link_that_leads_to_nothing_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "model")
    save_pytree(version(1), tmp_path / "first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert not (tmp_path / "model").is_symlink()
    assert_holds(tmp_path / "model", 1)


@posix
def test_a_link_into_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere/model")
    with pytest.raises(FileNotFoundError) as caught:
        save_pytree(version(1), link)
    assert caught.value.filename == str(link)
    assert link.is_symlink()


@posix
def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    with pytest.raises(OSError, match="symbolic links") as caught:
        save_pytree(version(1), tmp_path / "first")
    assert caught.value.errno == errno.ELOOP
    assert caught.value.filename == str(tmp_path / "first")
    assert (tmp_path / "first").is_symlink()


@posix
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000], ids=oct)
def test_a_new_file_has_the_permissions_that_open_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_pytree(version(1), tmp_path / "model")
        (tmp_path / "other").open("wb").close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "other")]
    assert modes == [0o666 & ~umask] * 2


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o444, 0o755, 0o640], ids=oct)
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(mode)
    others: list[int] = []

    def look(*_: int) -> None:
        others.extend(stat.S_IMODE(found.stat().st_mode) for found in litter(tmp_path))

    save_pytree(version(2), path, progress=look)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert others == [mode]
    assert_holds(path, 2)


@posix
def test_what_replaces_a_private_file_is_private_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(0o600)
    modes: list[int] = []
    create = os.open

    def opened(name: str, flags: int, *args: int) -> int:
        descriptor = create(name, flags, *args)
        if flags & os.O_CREAT:
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    save_pytree(version(2), path)
    assert modes == [0o600]


@superuser
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    save_pytree(version(2), path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o640)


@posix
def test_hard_links_part_ways(tmp_path: Path) -> None:
    path, other = tmp_path / "model", tmp_path / "other"
    save_pytree(version(1), path)
    os.link(path, other)
    save_pytree(version(2), path)
    assert_holds(path, 2)
    assert_holds(other, 1)


@posix
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append(path.read_bytes()))
    reader.start()
    save_pytree(version(1, 100_000), path)
    reader.join()
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert_same(version(1, 100_000), load_pytree(io.BytesIO(content[0])), "from the pipe")
    assert not litter(tmp_path)


@posix
def test_a_pipe_without_a_name_is_written_to() -> None:
    reader, writer = os.pipe()
    save_pytree(version(1), f"/dev/fd/{writer}")  # as /dev/stdout is, or >(a command) of a shell
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert_same(version(1), load_pytree(file), "from the pipe")


@posix
def test_a_file_without_a_name_is_written_to(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"longer than what takes its place" * 1000)
        file.flush()
        (tmp_path / "file").unlink()
        save_pytree(version(1), f"/dev/fd/{file.fileno()}")
        file.seek(0)
        assert_same(version(1), load_pytree(file), "from the file")
    assert not [*tmp_path.iterdir()]


@posix
def test_a_pipe_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    save_pytree(version(1, 100_000), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    assert_holds(path, 1)
    writer.join()


@posix
def test_a_device_is_written_to() -> None:
    save_pytree(version(1), os.devnull)
    save_pytree(version(1, 3 << 20), os.devnull)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_that_is_full_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        save_pytree(version(1), "/dev/full")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


# --- what belongs to the caller ---------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
def test_the_tree_of_the_caller_is_untouched(tmp_path: Path, checksum: bool) -> None:
    inner = {"z": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "a": [jnp.ones(3), 1.5]}
    tree = {"second": inner, "first": (inner, None), "empty": {}}
    metadata = {"z": "1", "a": "2"}
    before = jax.tree_util.tree_map(lambda leaf: (id(leaf), np.array(leaf).tobytes()), tree)
    save_pytree(tree, tmp_path / "model", metadata=metadata, checksum=checksum)
    after = jax.tree_util.tree_map(lambda leaf: (id(leaf), np.array(leaf).tobytes()), tree)
    assert before == after
    assert list(tree) == ["second", "first", "empty"]
    assert list(inner) == ["z", "a"]
    assert list(metadata.items()) == [("z", "1"), ("a", "2")]
    assert load_metadata(tmp_path / "model") == metadata


def test_skipping_leaves_changes_nothing_of_the_callers(tmp_path: Path) -> None:
    tree = {"b": [print, 1], "a": print}
    save_pytree(tree, tmp_path / "model", unsupported="skip")
    assert tree == {"b": [print, 1], "a": print}
    assert load_pytree(tmp_path / "model") == {"b": [None, 1]}


def test_saving_and_loading_need_no_means_that_windows_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytree2safetensors._storage.atomic_file, "_PREALLOCATED", 0)
    monkeypatch.setattr(sys, "platform", "win32")
    for name in (
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "fchmod", "fchown", "getegid", "geteuid",
        "posix_fallocate", "pread", "preadv", "pwrite", "readv", "writev",
    ):  # fmt: skip
        monkeypatch.delattr(os, name, raising=False)
    for checksum in (False, True):
        for number in (1, 2):
            save_pytree(version(number), tmp_path / "file", checksum=checksum)
            save_pytree(version(number), tmp_path / "folder", max_shard_size=700)
            assert_holds(tmp_path / "file", number)
            assert_holds(tmp_path / "folder", number)

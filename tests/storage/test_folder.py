"""The folders of files: relative paths, missing permissions, and files that killed saves left."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from folders import names_in, outcome, tree_of
from pytree2safetensors import load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._storage.atomic_file import joining, replacing
from pytree2safetensors._storage.atomic_folder import _missing
from pytree2safetensors._storage.descriptor import Held, set_size
from pytree2safetensors._storage.file_source import descriptors_to_keep
from pytree2safetensors._storage.folder import Folder
from pytree2safetensors._storage.naming import temporary_name
from system_calls import Call, watched
from versions import assert_holds, litter, posix, version

superuser = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="giving up rights is for the superuser"
)


@posix
@pytest.mark.parametrize("beyond", [5, 60], ids=["the path", "the temporary file's path"])
def test_a_path_may_be_as_long_as_open_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beyond: int
) -> None:
    """What is relative may be beyond the limit from the root on."""
    limit = os.pathconf(tmp_path, "PC_PATH_MAX")
    monkeypatch.chdir(tmp_path)
    size = len(str(tmp_path))
    while size < limit - 260:  # the last name may have at most 255 characters
        Path("d" * 100).mkdir()
        os.chdir("d" * 100)
        size += 101
    Path("e" * (limit - size - beyond)).mkdir()
    os.chdir("e" * (limit - size - beyond))
    Path("plain").write_bytes(b"")
    for path in ("model", "folder"):
        options = {"max_shard_size": 100} if path == "folder" else {}
        save_pytree(tree_of(1), path, **options)  # type: ignore[arg-type] # mypy sees object
        save_pytree_async(tree_of(1), path, **options).result()  # type: ignore[arg-type]
        assert load_pytree(path)["e"] == "text 1"
    monkeypatch.chdir(tmp_path)


RESTRICTED = """
import os, sys
import numpy as np
import pytree2safetensors as p2s

tree = {"a": np.zeros(50, np.float32), "b": np.ones(50, np.float32)}
os.chdir(sys.argv[1])
p2s.save_pytree(tree, "folder", max_shard_size=200)
p2s.load_pytree("folder")  # what is imported late may be closed to others, too
os.rename("folder", "other")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for work in (
    lambda: p2s.save_pytree(tree, "model"),
    lambda: p2s.save_pytree(tree, "folder", max_shard_size=200),
    lambda: print(sorted(p2s.load_pytree("model")), sorted(p2s.load_pytree("folder"))),
    lambda: p2s.save_pytree(tree, "writable/model"),
    lambda: p2s.save_pytree(tree, "writable/model", durable=False),
    lambda: p2s.save_pytree(tree, "writable/new/er", max_shard_size=200),
    lambda: p2s.save_pytree(tree, "writable/run/er", max_shard_size=200, durable=False),
):
    try:
        work()
    except OSError as error:
        print(error)
"""


@superuser
def test_folders_that_may_not_be_entered_or_read() -> None:
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        inner = Path(scratch) / "inner"
        inner.mkdir()
        inner.chmod(0o777)
        (inner / "writable").mkdir()
        (inner / "writable").chmod(0o333)
        Path(scratch).chmod(0o700)  # so that the path from the root is closed
        run = subprocess.run(
            [sys.executable, "-c", RESTRICTED, str(inner)],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert run.stdout.splitlines() == [
            "['a', 'b'] ['a', 'b']",
            "[Errno 13] Permission denied (the folder 'writable' cannot be read, which is needed to "
            "flush it; durable=False saves without): 'writable/model'",
            "[Errno 13] Permission denied (the folder 'writable' cannot be read, which is needed to "
            "flush it; durable=False saves without): 'writable/new/er'",
        ], run.stderr
        assert names_in(inner / "writable") == ["model", "run"]


@contextmanager
def unreadable(*names: str) -> Iterator[None]:
    """Let names be looked up in folders, but not listed, even for the superuser."""

    def refuse(call: Call) -> Any:
        flags = call.args[1] if call.name == "open" else 0
        reads = flags & os.O_DIRECTORY and not flags & getattr(os, "O_PATH", 0)
        if reads and (not names or Path(call.args[0]).name in names):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), call.args[0])
        return call.run()

    with watched(refuse):
        yield


@posix
@pytest.mark.parametrize("has_path", [True, False], ids=["linux", "macos"])
def test_a_file_is_saved_to_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_path: bool
) -> None:
    if not has_path:
        monkeypatch.delattr(os, "O_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    with unreadable():
        save_pytree(version(1), "model", durable=False)
        with pytest.raises(PermissionError) as caught:
            save_pytree(version(2), "model")
        assert "durable=False saves without" in str(caught.value)
        # So the message must not suggest it.
        monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)
        with pytest.raises(PermissionError) as caught:
            save_pytree(version(2), "model")
        assert "durable" not in str(caught.value)
    assert_holds(tmp_path / "model", 1)
    assert names_in(tmp_path) == ["model"]


@posix
def test_a_folder_is_made_in_one_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    path = tmp_path / "above" / "run" / "3"
    with unreadable("above"):
        with pytest.raises(PermissionError) as caught:
            save_pytree(tree_of(1), path, max_shard_size=100)
        assert caught.value.strerror == (
            f"Permission denied (the folder {str(tmp_path / 'above')!r} cannot be read, which is "
            "needed to flush it; durable=False saves without)"
        )
        assert not any((tmp_path / "above").iterdir())
        save_pytree(tree_of(1), path, max_shard_size=100, durable=False)
        save_pytree(tree_of(2), path, max_shard_size=100)
    assert outcome(path) == "new"


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / "3" / "model.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save_pytree(version(1), path)
    said, _, hint = str(caught.value.strerror).partition(" (")
    assert said == "No such file or directory" or os.name == "nt"  # which has other words
    assert hint == f"the folder {str(path.parent)!r} is missing; make it first)"
    assert caught.value.filename == str(path)


# --- what killed savers left ------------------------------------------------------------------


def left_behind(folder: Path, target: str) -> Path:
    path = folder / temporary_name(target)
    path.write_bytes(b"half of a file")
    return path


def later(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)


@pytest.mark.parametrize(("hours", "count"), [(23, 3), (25, 1)])
def test_a_day_later_a_save_of_the_same_path_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, count: int
) -> None:
    for target in ("model", "model", "other"):
        left_behind(tmp_path, target)
    save_pytree(version(1), tmp_path / "model")
    assert len(litter(tmp_path)) == 3
    later(monkeypatch, hours)
    save_pytree(version(2), tmp_path / "model")
    assert len(litter(tmp_path)) == count
    assert_holds(tmp_path / "model", 2)


@posix
def test_what_a_killed_save_left_of_a_read_only_file_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, "model").chmod(0o444)
    later(monkeypatch, 25)
    open_as_root = os.open

    def opened(path: str, flags: int, *args: Any, **options: Any) -> int:
        if path in [left.name for left in litter(tmp_path)] and flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_as_root(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        with Folder(str(tmp_path), listed=True) as folder:
            folder.remove_abandoned("model")
    assert not litter(tmp_path)


@pytest.mark.parametrize("limit", [100, "5GB"])
def test_a_day_later_a_save_of_the_same_folder_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | str
) -> None:
    left_behind(tmp_path, "model.safetensors")
    left_behind(tmp_path, "model.safetensors.index.json")
    later(monkeypatch, 25)
    save_pytree(tree_of(1), tmp_path, max_shard_size=limit)
    assert not litter(tmp_path)


@posix
def test_what_a_saver_is_still_writing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Folder(str(tmp_path), listed=True) as folder, Held() as held:
        folder.create(held, temporary_name("model"), "model", None)
        later(monkeypatch, 25)
        save_pytree(version(1), tmp_path / "model")
        assert len(litter(tmp_path)) == 1
        held.close()
        save_pytree(version(1), tmp_path / "model")
        assert not litter(tmp_path)


@posix
def test_what_another_process_writes_with_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = left_behind(tmp_path, "model")
    later(monkeypatch, 25)
    with joining(tmp_path / "model", left.name):
        save_pytree(version(1), tmp_path / "model")
        assert litter(tmp_path) == [left]
    save_pytree(version(1), tmp_path / "model")
    assert not litter(tmp_path)


@posix
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_what_a_killed_save_left_is_removed_from_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    left_behind(tmp_path, "model")
    later(monkeypatch, 25)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    save_pytree(version(1), tmp_path / "model")
    assert not litter(tmp_path)


@posix
def test_what_a_killed_save_left_stays_if_its_lock_cannot_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = left_behind(tmp_path, "model")
    later(monkeypatch, 25)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Folder(str(tmp_path), listed=True) as folder, monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        folder.remove_abandoned("model")
    assert litter(tmp_path) == [left]


@posix
@pytest.mark.parametrize("limit", [None, 100], ids=["a file", "a folder"])
def test_one_process_saves_where_a_shared_lock_forbids_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """As on an SMB mount of Linux, where the locks of `flock` are mandatory."""
    fcntl = pytest.importorskip("fcntl")
    lock, write = fcntl.flock, os.write
    locks: dict[int, int] = {}  # by inode

    def locking(descriptor: int, kind: int) -> None:
        lock(descriptor, kind)
        locks[os.fstat(descriptor).st_ino] = kind & ~fcntl.LOCK_NB

    def writing(descriptor: int, content: memoryview) -> int:
        if locks.get(os.fstat(descriptor).st_ino) == fcntl.LOCK_SH:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return write(descriptor, content)

    monkeypatch.setattr(fcntl, "flock", locking)
    monkeypatch.setattr(os, "write", writing)
    for number in (1, 2):
        save_pytree(tree_of(number), tmp_path / "model", max_shard_size=limit)
        assert load_pytree(tmp_path / "model")["e"] == f"text {number}"
    assert fcntl.LOCK_EX in locks.values()


@posix
def test_several_processes_lock_a_file_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that NFS keeps the bytes that other hosts write beside each other's."""
    fcntl = pytest.importorskip("fcntl")
    lock = fcntl.flock
    locked: list[int] = []

    def locking(descriptor: int, kind: int) -> None:
        lock(descriptor, kind)  # which fails if another lock excludes this one
        locked.append(kind)

    monkeypatch.setattr(fcntl, "flock", locking)
    name = temporary_name("model")
    with (
        replacing(tmp_path / "model", durable=False, name=name),
        joining(tmp_path / "model", name),
        joining(tmp_path / "model", name),
    ):
        assert locked == [fcntl.LOCK_SH | fcntl.LOCK_NB] * 3


def test_threads_exclude_each_other_from_a_folder_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    monkeypatch.setattr("pytree2safetensors._storage.folder._PATIENCE", 0.05)
    (tmp_path / "other").mkdir()
    one, again, other = (
        Folder(str(path), listed=True) for path in (tmp_path, tmp_path, tmp_path / "other")
    )
    with one, again, other:
        with one.locked(for_load=True), again.locked(for_load=True), again.locked():
            pass
        with one.locked(), other.locked():
            for for_load in (True, False):
                with (
                    pytest.raises(TimeoutError, match="has locked the folder"),
                    again.locked(for_load=for_load),
                ):
                    pass
        with again.locked():
            pass


@posix
def test_a_file_of_several_processes_gets_its_size_without_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with (tmp_path / "file").open("wb") as file:
        set_size(file.fileno(), 1 << 30)
        status = os.fstat(file.fileno())
    assert status.st_size == 1 << 30
    assert status.st_blocks < 1000


def test_folders_on_a_missing_drive_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(path: str) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "stat", nothing)
    assert _missing("/a/b") == ["/a/b", "/a", "/"]
    assert _missing("a") == ["a", os.curdir]


@posix
def test_a_file_that_is_still_written_keeps_no_other_from_its_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        left_behind(tmp_path, "model")
    first = tmp_path / os.listdir(tmp_path)[0]  # noqa: PTH208 - in the order of the folder itself
    fcntl = pytest.importorskip("fcntl")
    with Folder(str(tmp_path), listed=True) as folder, Held() as held:
        fcntl.flock(folder.open(held, first.name, os.O_RDWR), fcntl.LOCK_EX)
        later(monkeypatch, 25)
        folder.remove_abandoned("model")
    assert litter(tmp_path) == [first]


@posix
def test_shards_may_keep_half_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, 200))
    assert descriptors_to_keep() == 50

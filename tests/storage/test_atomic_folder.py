"""A folder of shards changes completely or not at all, or loading it raises an error."""

import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import system_calls
from folders import INDEX, is_same, names_in, outcome, shard_names, tree_of
from pytree2safetensors import load_pytree, save_pytree
from pytree2safetensors._storage.folder import Folder
from system_calls import FAULTS, Call, Fault, failing
from versions import posix, replaces_open_files

# --- whole or not at all ----------------------------------------------------------------------

CHANGES = {"open", "write", "replace", "unlink", "mkdir", "rmdir"}


@contextmanager
def watched(act: Callable[[Call], Any]) -> Iterator[None]:
    """Watch the system's calls, which reserve the space of small files, too."""
    with pytest.MonkeyPatch.context() as patch, system_calls.watched(act, flushing=False):
        patch.setattr("pytree2safetensors._storage.descriptor._PREALLOCATED", 1)
        yield


# What the folder has before the save, and the size of the new shards: 3 of the same names, 4, or 1.
SCENES: dict[str, tuple[int | str | None, int | str]] = {
    "nothing, then shards": (None, 100),
    "shards of the same names": (100, 100),
    "shards of other names": (100, 40),
    "shards, then one file": (100, "5GB"),
    "one file, then shards": ("5GB", 100),
    "one file, then another": ("5GB", "5GB"),
    "shards without an index": ("cut short", 100),
    "named shards, then one file": (100, "5GB"),
    "named file, then shards": ("5GB", 100),
}


def target(folder: Path, scene: str) -> Path:
    """The path that a scene saves to: the folder, or a name in it."""
    return folder / "n.safetensors" if scene.startswith("named") else folder


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state before the save of each scene."""
    root = tmp_path_factory.mktemp("before")
    for scene, (there, _) in SCENES.items():
        folder = root / scene / "x/m"
        if there is None:
            (root / scene).mkdir()
            continue
        size = 100 if there == "cut short" else there
        save_pytree(tree_of(1), target(folder, scene), max_shard_size=size)
        (folder / "config.json").write_text("kept")
        if there == "cut short":
            (folder / INDEX).unlink()
    return root


def save_new(folder: Path, scene: str) -> None:
    save_pytree(tree_of(2), target(folder, scene), max_shard_size=SCENES[scene][1])


def contents(root: Path) -> dict[str, bytes]:
    """The contents of a folder and its subfolders."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"a folder"
        for path in root.rglob("*")
    }


def each_failure(
    root: Path, before: Path, scene: str, fails: Callable[[int, Call], bool], fault: Fault
) -> Iterator[tuple[str, BaseException | None]]:
    """Save once for each call that may fail; yield the call and the error."""
    position, failing = 0, [""]
    while failing:
        failing.clear()
        if not root.exists() or contents(root) != contents(before / scene):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(before / scene, root)

        def act(call: Call) -> Any:
            if not fails(position, call):
                return call.run()
            failing.append(f"{call.name} {call.args}")
            return fault.strike(call)

        raised: BaseException | None = None
        with watched(act):
            try:
                save_new(root / "x/m", scene)
            except (OSError, KeyboardInterrupt) as error:
                raised = error
        yield f"at call {position}: {failing[:1]}", raised
        position += 1
    assert position > 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("scene", SCENES)
def test_a_save_that_fails_changes_nothing(
    tmp_path: Path, before: Path, scene: str, fault: Fault
) -> None:
    """Every call of the system fails in turn."""
    root, was = tmp_path / "root", outcome(before / scene / "x/m")
    there = contents(before / scene)
    for what, raised in each_failure(
        root, before, scene, lambda position, call: call.number == position, fault
    ):
        now = contents(root)
        left = [path for path in now if ".pytree2safetensors-" in path]
        assert not left or ("['unlink" in what and len(left) == 1), what
        found = outcome(root / "x/m") if now != there else was
        # When the index exists, the save is done. Stale files may still exist.
        assert found in ({"new"} if raised is None else {was, "new"}), what
        if found == was:
            assert now.items() >= there.items(), what
        if isinstance(raised, OSError):
            assert raised.filename == str(target(root / "x/m", scene)), what
            assert raised.errno in {errno.ENOSPC, errno.EIO, errno.EINTR}, what


@pytest.mark.parametrize("scene", SCENES)
def test_a_failing_rename_brings_everything_back(tmp_path: Path, before: Path, scene: str) -> None:
    renames = failing = 0

    def act(call: Call) -> Any:
        nonlocal renames
        renames += call.name == "replace"
        if call.name == "replace" and renames == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call.run()

    root = tmp_path / "root"
    shutil.copytree(before / scene, root)
    while failing == 0 or renames >= failing:
        assert contents(root) == contents(before / scene)
        renames, failing = 0, failing + 1
        with watched(act), suppress(OSError):
            save_new(root / "x/m", scene)
    assert outcome(root / "x/m") == "new"
    assert failing > 1


@pytest.mark.parametrize("failing", range(8))
def test_what_cannot_be_looked_at_is_neither_replaced_nor_removed(
    tmp_path: Path, before: Path, failing: int
) -> None:
    """If a rename fails, no file can be looked at afterwards. With 0, no rename fails."""
    there = before / "shards of the same names"
    root, renames, blind = tmp_path / "root", 0, failing == 0
    shutil.copytree(there, root)

    def act(call: Call) -> Any:
        nonlocal renames, blind
        renames += call.name == "replace"
        blind = blind or (call.name == "replace" and renames == failing)
        if blind and (call.name == "lstat" or (failing and call.name == "replace")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call.run()

    with watched(act), pytest.raises(OSError, match="Input/output error"):
        save_new(root / "x/m", "shards of the same names")
    assert outcome(root / "x/m") == ("old" if failing < 2 else "cut short")
    assert set(contents(root).values()) >= set(contents(there).values())


@pytest.mark.parametrize("scene", SCENES)
def test_where_all_calls_fail_from_some_moment_on_there_is_no_mixture(
    tmp_path: Path, before: Path, scene: str
) -> None:
    root, was = tmp_path / "root", outcome(before / scene / "x/m")
    for what, _ in each_failure(
        root, before, scene, lambda position, call: call.number >= position, failing(errno.EIO)
    ):
        assert outcome(root / "x/m") in {was, "new", "cut short"}, what


class Cleaner(Fault):
    """Another program, which removes the file that is to become the last one of a save."""

    def strike(self, call: Call) -> Any:
        if call.name != "unlink":
            folder = Path(self.name)
            for path in folder.glob(".pytree2safetensors-*"):
                if path.read_bytes() == (folder.parents[2] / "last").read_bytes():
                    path.unlink()
        return call.run()


@pytest.mark.parametrize("scene", SCENES)
def test_a_save_whose_last_file_is_removed_changes_nothing(
    tmp_path: Path, before: Path, scene: str
) -> None:
    root, was = tmp_path / "root", outcome(before / scene / "x/m")
    shutil.copytree(before / scene, root)
    save_new(root / "x/m", scene)
    last = next((root / "x/m").glob("*.index.json"), None) or next(
        (root / "x/m").glob("*.safetensors")
    )
    last.rename(tmp_path / "last")
    removed = 0
    for what, raised in each_failure(
        root,
        before,
        scene,
        lambda position, call: call.number == position,
        Cleaner(str(root / "x/m"), KeyboardInterrupt),
    ):
        assert outcome(root / "x/m") == ("new" if raised is None else was), what
        if raised is not None:
            assert isinstance(raised, FileNotFoundError), what
            assert contents(root).items() >= contents(before / scene).items(), what
            removed += "another program has removed an unfinished file" in str(raised)
    assert removed > 3


def test_a_save_says_that_it_is_done_if_an_older_file_cannot_be_removed(tmp_path: Path) -> None:
    """In a sticky folder, only the owner of a file can remove it."""

    def refuse(call: Call) -> Any:
        if call.name == "unlink" and call.args[0].endswith("of-00003.safetensors"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return call.run()

    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    with watched(refuse), pytest.raises(PermissionError) as caught:
        save_pytree(tree_of(2), tmp_path, max_shard_size=40)
    assert caught.value.strerror == (
        "Operation not permitted (the new checkpoint is complete, but "
        "'model-00001-of-00003.safetensors' of the older one cannot be removed)"
    )
    assert caught.value.filename == str(tmp_path)
    assert outcome(tmp_path) == "new"


def test_short_writes_are_continued(tmp_path: Path) -> None:
    write = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, piece: write(descriptor, piece[:7]))
        save_pytree(tree_of(2), tmp_path, max_shard_size=100)
    assert outcome(tmp_path) == "new"


@pytest.mark.parametrize("scene", SCENES)
def test_a_reader_at_any_moment_finds_the_old_or_the_new_or_says_so(
    tmp_path: Path, before: Path, scene: str
) -> None:
    """A reader also finds this if the process is killed at that moment."""
    root = tmp_path / "root"
    shutil.copytree(before / scene, root)
    folder = root / "x/m"
    found = [outcome(folder)]

    def act(call: Call) -> Any:
        result = call.run()
        if call.name in CHANGES:
            found.append(outcome(folder))
        return result

    with watched(act):
        save_new(folder, scene)
    stages = [name for name, after in zip(found, [*found[1:], ""], strict=True) if name != after]
    assert (
        stages
        == {
            "nothing, then shards": ["nothing", "cut short", "new"],
            "shards of the same names": ["old", "cut short", "new"],
            "shards of other names": ["old", "new"],
            "shards, then one file": ["old", "cut short", "new"],
            "one file, then shards": ["old", "cut short", "new"],
            "one file, then another": ["old", "new"],
            "shards without an index": ["cut short", "new"],
            "named shards, then one file": ["old", "cut short", "new"],
            "named file, then shards": ["old", "cut short", "new"],
        }[scene]
    )


def steps_of(save: Callable[[], None]) -> list[str]:
    """The flushes, renames and removals of a save, in order."""
    steps: list[str] = []

    def act(call: Call) -> Any:
        if call.name == "fsync":
            is_folder = stat.S_ISDIR(os.fstat(call.args[0]).st_mode)
            steps.append("flush folder" if is_folder else "flush")
        elif call.name == "replace":
            source, target = (Path(path).name for path in call.args)
            steps.append(f"aside {source}" if target[0] == "." else f"name {target}")
        elif call.name == "unlink":
            name = Path(call.args[0]).name
            steps.append("remove" if name[0] == "." else f"remove {name}")
        return call.run()

    with watched(act):
        save()
    return [step for step in steps if step != "remove"]


@pytest.mark.parametrize("durable", [True, False])
def test_files_reach_the_disk_before_their_names(tmp_path: Path, durable: bool) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    steps = steps_of(lambda: save_pytree(tree_of(2), tmp_path, max_shard_size=100, durable=durable))
    expected = ["flush"] * 4 + [f"aside {INDEX}", "flush folder"]
    for shard in shard_names(3):
        expected += [f"aside {shard}", f"name {shard}"]
    expected += ["flush folder", f"name {INDEX}", "flush folder"]
    if os.name == "nt":  # which cannot flush folders
        expected = [step for step in expected if step != "flush folder"]
    assert steps == [step for step in expected if durable or "flush" not in step]


def test_the_rival_goes_just_before_the_last_rename(tmp_path: Path) -> None:
    def save(size: int | str) -> None:
        save_pytree(tree_of(2), tmp_path, max_shard_size=size, durable=False)

    save("5GB")
    names = [f"name {shard}" for shard in shard_names(3)]
    single = "model.safetensors"
    assert steps_of(lambda: save(100)) == [*names, f"aside {single}", f"name {INDEX}"]
    removed = [f"remove {shard}" for shard in shard_names(3)]
    assert steps_of(lambda: save("5GB")) == [f"aside {INDEX}", f"name {single}", *removed]


@posix
def test_new_folders_reach_the_disk(tmp_path: Path) -> None:
    flushed: set[int] = set()

    def act(call: Call) -> Any:
        if call.name == "fsync":
            flushed.add(os.fstat(call.args[0]).st_ino)
        return call.run()

    with watched(act):
        save_pytree(tree_of(1), tmp_path / "x/y", max_shard_size=100)
    folders = [tmp_path, tmp_path / "x", tmp_path / "x/y"]
    assert {folder.stat().st_ino for folder in folders} <= flushed


def test_a_save_ends_in_the_folder_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second" / "run" / "m").mkdir(parents=True)
    for fails in (True, False):

        def move(*_: int, fails: bool = fails) -> None:
            os.chdir(tmp_path / "second")
            if fails:
                raise StopIteration

        monkeypatch.chdir(tmp_path / "first")
        with suppress(StopIteration):
            save_pytree(tree_of(2), "run/m", max_shard_size=100, progress=move)
        assert list((tmp_path / "second").rglob("*")) == [
            tmp_path / "second" / "run",
            tmp_path / "second" / "run" / "m",
        ]
        assert any((tmp_path / "first").iterdir()) != fails
    assert outcome(tmp_path / "first" / "run" / "m") == "new"


def test_an_error_in_a_leaf_changes_nothing(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def fail(done: int, total: int) -> None:
        if done > 400:
            raise Broken

    save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100)
    for folder in (tmp_path / "m", tmp_path / "new/er"):
        with pytest.raises(Broken):
            save_pytree(tree_of(2), folder, max_shard_size=100, progress=fail)
    assert names_in(tmp_path) == ["m"]
    assert names_in(tmp_path / "m") == [*shard_names(3), INDEX]
    assert outcome(tmp_path / "m") == "old"


# --- several at once --------------------------------------------------------------------------


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_savers_never_make_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:  # as on Windows, where one process still locks out itself
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    limits: list[int | str] = [100, 40, "5GB", 100]

    def save(seed: int) -> None:
        for step in range(20):
            limit = limits[(step + seed) % 4] if step < 19 else 100
            save_pytree(tree_of(seed), tmp_path, max_shard_size=limit, durable=False)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(save, seed) for seed in (1, 2)]:
            done.result()
    assert names_in(tmp_path) == [*shard_names(3), INDEX]
    assert outcome(tmp_path) in {"old", "new"}


@replaces_open_files
@pytest.mark.parametrize("waits", [True, False])
def test_a_reader_beside_a_saver_never_finds_a_mixture(waits: bool, tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)

    def save() -> None:
        for step in range(60):
            save_pytree(tree_of(2 - step % 2), tmp_path, max_shard_size=100, durable=False)

    found: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(save)
        while not saved.done():
            found.add(outcome(tmp_path, waits=waits))
        saved.result()
    assert found <= {"old", "new", "cut short"} - ({"cut short"} if waits else set())
    assert outcome(tmp_path) == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="a system without locks")
def test_a_lock_ends_with_its_save_even_if_others_have_the_folder_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, copies = os.open, list[int]()

    def open_twice(
        *arguments: Any, **options: Any
    ) -> int:  # as in a process that is forked in the meantime
        descriptor = opened(*arguments, **options)
        copies.append(os.dup(descriptor))
        return descriptor

    with monkeypatch.context() as patch, suppress(StopIteration):
        patch.setattr(os, "open", open_twice)
        with Folder(str(tmp_path), listed=True) as folder, folder.locked():
            raise StopIteration
    saver = threading.Thread(target=lambda: save_pytree(tree_of(1), tmp_path, max_shard_size=100))
    saver.start()
    saver.join(30)
    waits = saver.is_alive()
    for copy in copies:
        os.close(copy)
    saver.join()
    assert not waits


def test_a_save_that_another_one_follows_at_once_is_not_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lock, the next save may move the new index away before this one has looked at it."""
    save_pytree(tree_of(0), tmp_path, max_shard_size=100)
    replace, moved = Folder.replace, tmp_path / "moved"

    def and_move(self: Folder, name: str, target: str) -> None:
        replace(self, name, target)
        if target == INDEX:
            (tmp_path / INDEX).rename(moved)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", and_move)
        save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    assert INDEX not in names_in(tmp_path)
    moved.rename(tmp_path / INDEX)
    assert is_same(tree_of(1), load_pytree(tmp_path))

"""A file appears whole or not at all, whatever fails during the save."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import pytree2safetensors._storage.descriptor
import pytree2safetensors._storage.progress
from pytree2safetensors import FileFormatError, UnsupportedLeafError, save_pytree
from system_calls import FAULTS, Call, Fault, Recorder, Told, watched
from versions import assert_holds, litter, open_descriptors, posix, version

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
        "open folder",  # a system that refuses this changes nothing
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
        "open folder",  # which names are looked up in
        "open temporary",
        "write temporary",  # the header
        "write temporary",  # the data
        "close temporary",
        "replace temporary model",
        "close folder",
    ]


@posix
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_that_cannot_be_flushed_is_left_unflushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_pytree(version(1), tmp_path / "model")
    assert_holds(tmp_path / "model", 1)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_need_not_reserve_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(pytree2safetensors._storage.descriptor, "_PREALLOCATED", 0)
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
    if os.name == "nt":
        try:
            path.touch()
        except OSError:
            pytest.skip("this Windows allows no long paths")
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
    """Write a small file with the calls of a large one."""
    monkeypatch.setattr(pytree2safetensors._storage.descriptor, "_PREALLOCATED", 0)
    monkeypatch.setattr(pytree2safetensors._storage.descriptor, "_STEP", 640)
    monkeypatch.setattr(pytree2safetensors._storage.progress, "_STEP", 320)


def recorded(path: Path, existing: bool, recorder: Recorder) -> BaseException | None:
    """Save version 2 over version 1 or nothing; return the error."""
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
    assert {"readlink", "stat", "open", "write", "fsync", "close"} < set(names)
    assert "posix_fallocate" in names or not hasattr(os, "posix_fallocate")  # as on macOS
    assert "fchmod" in names or not existing
    assert names.count("write") > 1
    rename = names.index("replace")
    held = open_descriptors()
    for number, call in enumerate(clean.calls):
        recorder = Recorder(number, fault)
        error = recorded(path, existing, recorder)
        assert recorder.calls[: number + 1] == clean.calls[: number + 1]
        check_error(error, fault, call, path)
        committed = error is None or number > rename or (fault.after and number == rename)
        if committed:
            assert_holds(path, 2)
        elif existing:
            assert_holds(path, 1)
        else:
            assert not path.exists()
        assert not litter(tmp_path), call
        # If an interrupt takes a descriptor from `os.open`, it cannot be closed.
        lost = fault.after and call.name == "open"
        held += lost and held > 0  # where they can be counted
        assert open_descriptors() == held, call


def check_error(error: BaseException | None, fault: Fault, call: Told, path: Path) -> None:
    """Every fault raises an error, and an error of the system names the path.

    A save may fail to clean up after killed ones, or to keep permissions.
    """
    if call.name in {"listdir", "getxattr", "fchmod"} and fault.error is not KeyboardInterrupt:
        assert error is None
    elif isinstance(error, OSError):
        assert os.strerror(error.errno or 0) == error.strerror
        assert errno.errorcode[error.errno or 0] == fault.name.partition(" ")[0]
        assert error.filename == str(path)
        assert error.filename2 is None
        assert str(error) == f"[Errno {error.errno}] {error.strerror}: {str(path)!r}"
    else:
        assert isinstance(error, KeyboardInterrupt), call
        assert fault.error is KeyboardInterrupt


@pytest.mark.usefixtures("small_pieces")
def test_a_short_write_is_continued(tmp_path: Path) -> None:
    def halve(call: Call) -> Any:
        if call.name != "write":
            return call.run()
        descriptor, piece = call.args
        return os.write(descriptor, piece[: max(1, len(piece) // 2)])

    with watched(halve):
        save_pytree(version(2), tmp_path / "model")
    assert_holds(tmp_path / "model", 2)


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

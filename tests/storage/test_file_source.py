"""Files on disk: errors of the system, and other programs that change them while they are read."""

import errno
import io
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._storage.file_source import open_source
from pytree2safetensors._storage.stream import ForwardSource
from system_calls import Call, watched
from versions import posix


def tree_of(value: float) -> dict[str, Any]:
    return {f"w{i}": np.full(10_000, value, np.float32) for i in range(3)}


LOADS: dict[str, Callable[[Path], Any]] = {
    "load_pytree": load_pytree,
    "load_into_pytree": lambda path: load_into_pytree(tree_of(0), path),
    "a map": lambda path: load_pytree(path, mmap=True),
    "load_abstract": load_abstract,
}


def before_a_load_ends(act: Callable[[], object], patch: pytest.MonkeyPatch) -> list[object]:
    """Act before a load closes what it has read. Return what the calls have returned."""
    exit_, results = OpenCheckpoint.__exit__, list[object]()

    def act_first(checkpoint: OpenCheckpoint, *error: Any) -> None:
        results.append(act())
        exit_(checkpoint, *error)

    patch.setattr(OpenCheckpoint, "__exit__", act_first)
    return results


@pytest.mark.parametrize("kept", [9, 1])
@pytest.mark.parametrize("size", [None, 50_000])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_file_that_changes_in_place_during_a_load_is_an_error(
    load: Callable[[Path], Any],
    size: int | None,
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_pytree(tree_of(1), tmp_path / "m.safetensors", max_shard_size=size)
    monkeypatch.setattr("pytree2safetensors._load.opening._KEPT", kept)
    file = min(tmp_path.glob("*.safetensors"))
    # As if a program has written the same number of bytes.
    loads = before_a_load_ends(lambda: os.utime(file, ns=(1, 1)), monkeypatch)
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{str(file)!r} was changed while it was read; load it again"
    assert len(loads) == 1  # a program that goes on writing does not make it load again and again


@posix
def test_a_file_that_is_open_only_during_a_read_must_not_change_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, preadv = tmp_path / "m.safetensors", os.preadv
    save_pytree(tree_of(1), file)

    def change_first(descriptor: int, *arguments: Any) -> int:
        os.utime(descriptor, ns=(1, 1))
        return preadv(descriptor, *arguments)

    with closing(open_source(file)) as source:
        source.shut()
        assert len(source.read(0, 8)) == 8
        monkeypatch.setattr(os, "preadv", change_first)
        with pytest.raises(FileFormatError, match="was changed while it was read; load it again"):
            source.read(0, 8)


@posix
@pytest.mark.parametrize("load", [*LOADS.values()][:3], ids=[*LOADS][:3])
@pytest.mark.parametrize(
    "act",
    [
        lambda file: file.chmod(0o600),
        lambda file: file.with_name("link").hardlink_to(file),
        lambda file: file.unlink(),
        lambda file: save_pytree(tree_of(2), file),
    ],
    ids=["other permissions", "a link", "removed", "replaced"],
)
def test_what_leaves_the_content_of_a_file_alone_does_not_disturb_a_load(
    act: Callable[[Path], object],
    load: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "m.safetensors"
    save_pytree(tree_of(1), file)
    with monkeypatch.context() as patch:
        before_a_load_ends(lambda: act(file), patch)
        loaded = load(file)
    assert {name: float(array[-1]) for name, array in loaded.items()} == dict.fromkeys(loaded, 1.0)


# --- errors of the system ---------------------------------------------------------------------


def failing(name: str, code: int, times: int = 99) -> Callable[[Call], Any]:
    """Let calls with a name fail, as the system's calls with a descriptor do: without a path."""
    failed = list[int]()

    def act(call: Call) -> Any:
        if call.name == name and isinstance(call.args[0], int) and len(failed) < times:
            failed.append(call.number)
            raise OSError(code, os.strerror(code))
        return call.run()

    return act


@posix
@pytest.mark.parametrize("call", ["preadv", "fstat"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_an_error_of_a_read_names_the_file(call: str, code: int, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_pytree(tree_of(1), file)
    with (
        watched(failing(call, code)),
        pytest.raises(OSError, match=r"'.*m\.safetensors'") as caught,
    ):
        load_pytree(file)
    assert (caught.value.errno, caught.value.filename) == (code, str(file))
    assert type(caught.value) is type(OSError(code, ""))


@posix
def test_an_error_of_a_read_names_the_shard_though_it_is_not_kept_open(
    tmp_path: Path,
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=50_000)
    with open_checkpoint(tmp_path) as checkpoint:
        for source in checkpoint.sources:
            source.shut()
            with (
                watched(failing("preadv", errno.EIO)),
                pytest.raises(OSError, match="put/output") as caught,
            ):
                source.read(0, 8)
            assert f"{caught.value.filename!r}" == source.label


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_an_error_of_a_pipe_names_it(tmp_path: Path) -> None:
    class Broken(io.RawIOBase):
        def readinto(self, buffer: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening does not wait
    with closing(open_source(tmp_path / "pipe")) as source:
        os.close(writer)
        assert isinstance(source, ForwardSource)
        source.file.close()
        source.file = Broken()
        with pytest.raises(OSError, match="pipe") as caught:
            source.measure(8)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "pipe"))


def test_an_error_of_a_map_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    file = tmp_path / "m.safetensors"
    save_pytree(tree_of(1), file)
    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(OSError, match=r"'.*m\.safetensors'") as caught:
        load_pytree(file, mmap=True)
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, str(file))


@posix
def test_a_file_that_its_server_has_replaced_is_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_pytree(tree_of(1), file)
    with watched(failing("preadv", errno.ESTALE, times=1)):
        assert load_pytree(file)["w0"][-1] == 1
    with (
        watched(failing("preadv", errno.ESTALE)),
        pytest.raises(FileFormatError, match="was replaced while it was read; load"),
    ):
        load_pytree(file)

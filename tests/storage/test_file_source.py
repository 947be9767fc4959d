"""Files on disk that other programs change while they are read."""

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
from pytree2safetensors._storage.file_source import open_source
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
    first = min(tmp_path.glob("*.safetensors"))
    # As if a program has written the same number of bytes.
    loads = before_a_load_ends(lambda: os.utime(first, ns=(1, 1)), monkeypatch)
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"'{first}' was changed while it was read; load it again"
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

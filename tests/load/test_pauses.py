"""When the garbage collector runs during a load, and how signals end one."""

import gc
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytree2safetensors import load_into_pytree, load_pytree, save_pytree
from pytree2safetensors._load import eager
from pytree2safetensors._storage.file_source import FileSource


@pytest.mark.parametrize("into", [False, True])
def test_the_collector_runs_while_bytes_are_read(
    into: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"w": np.ones(1 << 20, np.float32)}
    save_pytree(tree, tmp_path / "file")
    found: list[bool] = []
    original = FileSource.read_into

    def read_into(source: Any, buffers: list[memoryview], offset: int) -> int:
        found.append(gc.isenabled())
        return original(source, buffers, offset)

    monkeypatch.setattr(FileSource, "read_into", read_into)
    if into:
        load_into_pytree(tree, tmp_path / "file")
    else:
        load_pytree(tmp_path / "file")
    assert all(found)
    assert found


def test_the_collector_runs_while_bytes_are_written(tmp_path: Path) -> None:
    found: list[bool] = []
    tree = {"w": np.ones(1 << 20, np.float32)}
    save_pytree(tree, tmp_path / "file", progress=lambda *_: found.append(gc.isenabled()))
    assert all(found)
    assert found


def test_a_load_that_is_interrupted_makes_no_more_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal interrupts the thread that waits for the one that loads, here while it reads."""
    tree = {"w": np.ones(1 << 10, np.float32)}
    save_pytree(tree, tmp_path / "file")
    interrupted = threading.Event()
    token = eager._interrupted.set(interrupted)
    original = FileSource.read_into

    def read_into(source: Any, buffers: list[memoryview], offset: int) -> int:
        interrupted.set()
        return original(source, buffers, offset)

    monkeypatch.setattr(FileSource, "read_into", read_into)
    try:
        with pytest.raises(CancelledError):
            load_into_pytree(tree, tmp_path / "file")
    finally:
        eager._interrupted.reset(token)

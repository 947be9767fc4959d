"""Reading and writing at an offset, also on systems without calls for that."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytree2safetensors._storage import descriptor as module
from pytree2safetensors._storage.descriptor import read_at, write_at, write_chunks


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("positioned", [True, False])
def test_what_is_written_at_an_offset_is_read_there(
    file: int, monkeypatch: pytest.MonkeyPatch, positioned: bool
) -> None:
    monkeypatch.setattr(module, "_STEP", 3)
    if not positioned:  # as on Windows
        for name in ("pwrite", "preadv"):
            monkeypatch.delattr(os, name, raising=False)
    write_at(file, memoryview(b"later"), 4)
    write_at(file, memoryview(b"text"), 0)
    assert read_at(file, 9, 0) == b"textlater"
    assert read_at(file, 3, 2) == b"xtl"


@pytest.mark.parametrize("positioned", [True, False])
def test_a_file_that_became_shorter_is_an_error(
    file: int, monkeypatch: pytest.MonkeyPatch, positioned: bool
) -> None:
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    write_at(file, memoryview(b"text"), 0)
    with pytest.raises(OSError, match="the file is shorter than it was written"):
        read_at(file, 5, 0)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_at(file, memoryview(b"text"), 0),
        lambda file: write_chunks(file, [(0, memoryview(b"text"))], 4),
    ],
    ids=["at an offset", "in order"],
)
def test_a_system_that_writes_nothing_is_an_error(
    file: int, monkeypatch: pytest.MonkeyPatch, write: Callable[[int], None]
) -> None:
    for name in ("pwrite", "write"):
        monkeypatch.setattr(os, name, lambda *_: 0, raising=False)
    with pytest.raises(OSError, match="the system wrote nothing"):
        write(file)

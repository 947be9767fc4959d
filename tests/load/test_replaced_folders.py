"""Loading a folder that a save replaces in the meantime."""

import concurrent.futures
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from folders import INDEX, is_same, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    load_into_pytree,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._cli.verify import verify_file
from pytree2safetensors._load import opening
from pytree2safetensors._load.shard_index import Index
from pytree2safetensors._storage import file_source
from pytree2safetensors._storage import folder as folder_module
from pytree2safetensors._storage.file_source import FileSource
from pytree2safetensors._storage.folder import Folder
from pytree2safetensors._storage.naming import temporary_name
from system_calls import Call, watched
from versions import replaces_open_files

# --- loading ----------------------------------------------------------------------------------


def replaced_while_opened(folder: Path, patch: pytest.MonkeyPatch, times: int) -> None:
    """Have a damaged file replaced by a folder of shards when it is opened, some times."""
    real, opened = file_source.open_source, list[object]()

    def open_source(path: Any, **options: Any) -> Any:
        source = real(path, **options)
        if str(path).endswith(MODEL) and len(opened) < times:
            opened.append(path)
            (folder / MODEL).unlink()
            save_pytree(tree_of(1), folder, max_shard_size=100)
        return source

    (folder / MODEL).write_bytes(b"damaged" * 10)
    patch.setattr(opening, "open_source", open_source)


MODEL = "model.safetensors"


@replaces_open_files
def test_a_damaged_file_that_is_replaced_while_it_is_opened_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced_while_opened(tmp_path, monkeypatch, 1)
    assert is_same(tree_of(1), load_pytree(tmp_path))


@replaces_open_files
def test_a_file_that_is_replaced_whenever_it_is_opened_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_ATTEMPTS", 1)
    replaced_while_opened(tmp_path, monkeypatch, 1)
    monkeypatch.setattr(opening, "has_parts", lambda _: False)
    with pytest.raises(FileFormatError, match="is being replaced by another save; load it after"):
        load_pytree(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    replaced_while_opened(other, monkeypatch, 1)
    with pytest.raises(FileFormatError, match="is being replaced by another save; load it after"):
        verify_file(other)  # which does not call the file damaged


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
@pytest.mark.parametrize("where", [".", INDEX])
def test_a_load_waits_for_a_save_that_renames_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    with ThreadPoolExecutor() as pool:
        with Folder(str(tmp_path), listed=True) as folder, folder.locked():  # as a saver does
            (tmp_path / INDEX).rename(tmp_path / "aside")
            loading = pool.submit(load_pytree, tmp_path / where)
            with pytest.raises(concurrent.futures.TimeoutError):  # another class in Python 3.10
                loading.result(0.3)
            (tmp_path / "aside").rename(tmp_path / INDEX)
        assert is_same(tree_of(1), loading.result())
    (tmp_path / INDEX).unlink()
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.1)
    with (
        Folder(str(tmp_path), listed=True) as folder,
        folder.locked(),
        pytest.raises(FileFormatError, match="but no index: a save was interrupted or is in progr"),
    ):
        load_pytree(tmp_path / where)


@pytest.mark.parametrize(
    ("name", "unfinished", "waits"),
    [
        ("other.safetensors", None, False),
        ("other.safetensors.index.json", None, False),
        ("other", None, False),
        ("other.json", None, False),
        ("model.json", None, False),
        ("other.safetensors", "other.safetensors", True),
        ("other.safetensors", "other.safetensors.index.json", True),
        ("other.safetensors", "model.safetensors", False),
        ("other.safetensors.index.json", "other.safetensors.index.json", True),
        (MODEL, None, True),
        (INDEX, None, True),
    ],
)
def test_a_load_waits_only_for_saves_to_its_own_path(
    name: str, unfinished: str | None, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).rename(tmp_path / "aside")
    if unfinished is not None:
        (tmp_path / temporary_name(unfinished)).write_bytes(b"")
    waited = list[str]()

    @contextmanager
    def waiting(folder: str) -> Iterator[None]:
        waited.append(folder)
        yield

    monkeypatch.setattr(opening, "without_saves", waiting)
    with pytest.raises((FileNotFoundError, FileFormatError)):
        load_pytree(tmp_path / name)
    assert waited == [str(tmp_path)] * waits


def test_a_shard_that_cannot_be_opened_is_the_systems_error(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    shard = str(tmp_path / shard_names(3)[1])

    def refuse(call: Call) -> Any:
        if call.name == "open" and call.args[0] == shard:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), shard)
        return call.run()

    with watched(refuse), pytest.raises(PermissionError) as caught:
        load_pytree(tmp_path)
    assert caught.value.filename == shard


@pytest.mark.parametrize("name", [".pytree2safetensors-0123456789abcdef.tmp", shard_names(3)[0]])
def test_a_folder_with_the_files_of_an_unfinished_save_waits_for_that(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")

    @contextmanager
    def finished(folder: str) -> Iterator[None]:
        save_pytree(tree_of(1), folder, max_shard_size=100)
        yield

    monkeypatch.setattr(opening, "without_saves", finished)
    assert is_same(tree_of(1), load_pytree(tmp_path))


def test_a_listing_that_lacks_the_only_file_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the file was renamed while the folder was listed."""
    save_pytree(tree_of(1), tmp_path / MODEL)
    listings, listdir = [list[str]()], os.listdir

    def listed(path: Any) -> list[str]:
        return listings.pop() if listings else listdir(path)

    monkeypatch.setattr(os, "listdir", listed)
    assert is_same(tree_of(1), load_pytree(tmp_path))
    assert not listings


@replaces_open_files
@pytest.mark.parametrize("limit", [100, 40])
def test_a_reader_whose_index_is_replaced_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    saves = [lambda: save_pytree(tree_of(2), tmp_path, max_shard_size=limit)]
    real = Index.open

    def save_meanwhile(index: Index, shard: str) -> Any:
        if shard == sorted(index.shards)[1] and saves:
            saves.pop()()
        return real(index, shard)

    monkeypatch.setattr(Index, "open", save_meanwhile)
    assert is_same(tree_of(2), load_pytree(tmp_path))
    saves += [lambda: save_pytree(tree_of(1), tmp_path, max_shard_size=100)] * 5
    assert is_same(tree_of(1), load_pytree(tmp_path))  # at last without saves
    monkeypatch.setattr(opening, "without_saves", nullcontext)  # a system without locks
    saves += [lambda: save_pytree(tree_of(2), tmp_path, max_shard_size=100)] * 10
    with pytest.raises(FileFormatError, match="is being replaced by another save; load it after"):
        load_pytree(tmp_path)
    assert is_same(tree_of(2), load_pytree(tmp_path))


@replaces_open_files
@pytest.mark.parametrize("times", [1, 9])
@pytest.mark.parametrize(
    "load",
    [load_pytree, lambda path: load_into_pytree(tree_of(3), path)],
)
def test_a_load_starts_again_if_a_shard_that_is_not_open_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, times: int
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.opening._KEPT", 1)
    monkeypatch.setattr("pytree2safetensors._load.opening._ATTEMPTS", 3)
    saves, read_into = 0, FileSource.read_into

    def replace_and_read(source: FileSource, buffers: list[memoryview], offset: int) -> int:
        nonlocal saves
        if source._is_shut and saves < times:
            saves += 1
            save_pytree(tree_of(saves), tmp_path, max_shard_size=40)
        return read_into(source, buffers, offset)

    monkeypatch.setattr(FileSource, "read_into", replace_and_read)
    save_pytree(tree_of(9), tmp_path, max_shard_size=40)
    if times == 1:
        assert is_same(tree_of(1), load(tmp_path))
        return
    with pytest.raises(FileFormatError, match="was replaced while it was read; load") as caught:
        load(tmp_path)
    assert type(caught.value) is FileFormatError

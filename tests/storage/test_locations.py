"""What a caller may pass as a path, and where it leads."""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from folders import is_same, tree_of
from pytree2safetensors import load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._storage.locations import check_created, check_home, resolve
from pytree2safetensors._storage.remote_path import RemotePath
from versions import posix

TREE = {"a": np.zeros(3, np.float32)}


def works(path: Any) -> list[Any]:
    return [lambda: load_pytree(path), lambda: save_pytree(TREE, path)]


@pytest.mark.parametrize(
    "path",
    [
        "a\0b",
        pytest.param(
            "a\ud800b",
            marks=pytest.mark.skipif(os.name == "nt", reason="a file can have such a name there"),
        ),
    ],
)
def test_a_path_with_an_impossible_character_is_named(path: str) -> None:
    for work in works(path):
        with pytest.raises(ValueError, match="has a character that no path can have") as caught:
            work()
        assert str(caught.value).startswith("'a\\")


def test_a_missing_home_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for work in works("~/m.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"only a shell replaces '~'; call os\.path"):
            work()
    save_pytree(TREE, "~m.safetensors")
    load_pytree("~m.safetensors")
    (tmp_path / "~").mkdir()
    save_pytree(TREE, "~/m.safetensors")
    load_pytree("~/m.safetensors")


def test_a_missing_home_is_explained_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os, "altsep", "/")
    for path in ("~\\m", "~/m", "~me\\x/m"):
        with pytest.raises(FileNotFoundError, match=r"only a shell replaces '~'; call os\.path"):
            check_home(path)
        with pytest.raises(ValueError, match="begins with '~', which only a shell replaces"):
            check_created(path)
    check_home("~m")


@pytest.mark.skipif(os.name == "nt", reason="no folder can have such a name there")
@pytest.mark.parametrize(
    "url",
    [
        " s3://bucket/run",
        "s_3://bucket/run",
        "s3 ://bucket/run",
        "Z:/x",
        "s3:bucket/run",
        "HF:x",
        "a:b:",
    ],
)
def test_a_url_that_is_misspelled_makes_no_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = url.partition("/")[0]
    message = (
        f"'{url}' begins with '{first}', which looks like a part of a URL; correct the URL, or make "
        "the folder first"
    )
    for save in (save_pytree, save_pytree_async):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            save(TREE, url, max_shard_size=100)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / first).mkdir()
    save_pytree(TREE, url, max_shard_size=100)
    assert is_same(TREE, load_pytree(url))


@pytest.mark.skipif(os.name == "nt", reason="no folder can have such a name there")
def test_a_colon_may_be_part_of_the_name_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("run:17", "12:30:00/run", ":x", "run/s3:17", str(tmp_path / "s3:17")):
        save_pytree(TREE, path, max_shard_size=100)
        assert is_same(TREE, load_pytree(path))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    save_pytree(TREE, "s3:bucket", max_shard_size=100)
    assert is_same(TREE, load_pytree("s3:bucket"))


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    path = tmp_path / "a b.safetensors"
    save_pytree(tree_of(1), path.as_uri())
    assert is_same(tree_of(1), load_pytree(path, mmap=True))
    assert is_same(tree_of(1), load_pytree(path.as_uri(), mmap=True))
    save_pytree(tree_of(2), UPath(f"{tmp_path.as_uri()}/model"))
    assert is_same(tree_of(2), load_pytree(UPath(f"{tmp_path.as_uri()}/model")))
    message = "'file://...@server/model' is on another machine; mount its file system"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_pytree("file://me:secret@server/model")


@posix
def test_a_file_url_names_any_bytes(tmp_path: Path) -> None:
    paths = [
        os.fsdecode(os.fsencode(tmp_path / "s") + end) for end in (b"\xfe", b"\xff%41\xc3\xa9")
    ]
    for number, path in enumerate(paths):
        url = Path(path).as_uri()
        save_pytree(tree_of(number), url)
        assert resolve(url) == path
    assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)
    assert resolve(f"file://{paths[0]}%C3%a9%23") == f"{paths[0]}\xe9#"


@pytest.mark.parametrize("escape", ["%00", pytest.param("%FE", id="as on Windows")])
def test_a_file_url_with_an_impossible_character_is_named(
    monkeypatch: pytest.MonkeyPatch, escape: str
) -> None:
    decode = os.fsdecode
    monkeypatch.setattr(os, "fsdecode", lambda p: p.decode() if p == b"\xfe" else decode(p))
    for work in works(f"file:///a{escape}b"):
        with pytest.raises(ValueError, match="b' has a character that no path can have; remove it"):
            work()


@pytest.mark.parametrize("name", ["a#2", "a?2", "a#", "a?"])
def test_a_file_url_with_a_query_or_a_fragment_does_not_name_another_file(
    tmp_path: Path, name: str
) -> None:
    url = f"{(tmp_path / 'a').as_uri()}{name[1:]}"
    shown = url.replace("?2", "?...")
    message = (
        f"'{shown}' has '?' or '#', after which the path of a URL has ended; pass the path itself, or "
        "the URL that pathlib.Path.as_uri returns"
    )
    for work in works(url):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            work()
    assert not [*tmp_path.iterdir()]
    if name.startswith("a#") or os.name != "nt":  # where no file can have such a name
        save_pytree(TREE, (tmp_path / name).as_uri())
        assert is_same(TREE, load_pytree(tmp_path / name))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


@pytest.mark.usefixtures("memory")
def test_the_case_of_a_scheme_does_not_matter(tmp_path: Path) -> None:
    where = tmp_path.as_uri().removeprefix("file://")
    save_pytree(tree_of(1), f"FILE://{where}/a")
    assert is_same(tree_of(1), load_pytree(f"File://{where}/a", mmap=True))
    save_pytree(tree_of(2), "MEMORY://Run/A")
    assert is_same(tree_of(2), load_pytree("memory://Run/A"))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("url", ["memory://", "memory:///"])
def test_a_url_without_a_path_is_named(url: str) -> None:
    for work in (load_pytree, lambda path: save_pytree({"a": 1}, path)):
        with pytest.raises(IsADirectoryError) as caught:
            work(url)
        assert str(caught.value) == f"[Errno {errno.EISDIR}] Is a directory: '{url}'"


def test_unknown_schemes_and_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, text in (
        ("foo://bucket/x", "'foo://bucket/x' cannot be opened with fsspec: Protocol not known"),
        ("adl://bucket/x", "'adl://bucket/x' cannot be opened with fsspec: "),
    ):
        for work in (load_pytree, lambda path: save_pytree({"a": 1}, path)):
            with pytest.raises(ValueError, match=text):
                work(url)
    text = (
        "'https://example.com/x' is a URL, which is opened with fsspec; install fsspec (the extra "
        "pytree2safetensors[remote]) and its package for this store"
    )
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=re.escape(text)):
        load_pytree("https://example.com/x")


@pytest.mark.parametrize("save", [save_pytree, save_pytree_async])
@pytest.mark.parametrize("path", ["~", "~/run", "~other", "gs:/bucket/run", "s3:/run"])
def test_a_path_that_looks_like_another_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, save: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"begins with .~.|looks like a URL"):
        save(tree_of(1), Path(path), max_shard_size=100)
    assert not [*tmp_path.iterdir()]


def test_a_path_that_can_write_is_a_path(tmp_path: Path) -> None:
    class WritablePath:
        def __fspath__(self) -> str:
            return str(tmp_path / "file")

        def write(self, data: Any) -> None:
            raise AssertionError("a path is written to as a file")

    save_pytree({"a": 1}, WritablePath())
    assert load_pytree(tmp_path / "file") == {"a": 1}


@pytest.mark.usefixtures("memory")
def test_a_path_of_an_older_universal_pathlib_keeps_its_file_system() -> None:
    class OlderPath:  # those before 0.3 are all paths of pathlib
        protocol = "memory"
        path = "/run/m"
        fs = MemoryFileSystem(skip_instance_cache=True, token="secret")

        def __fspath__(self) -> str:
            return "memory://run/m"

        __str__ = __fspath__

    found = resolve(OlderPath())
    assert isinstance(found, RemotePath)
    assert (found.fs is OlderPath.fs, found.path, found.url) == (True, "/run/m", "memory://run/m")
    save_pytree(TREE, OlderPath())
    assert is_same(TREE, load_pytree(OlderPath()))

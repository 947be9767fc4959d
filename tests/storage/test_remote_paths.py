"""Which paths and URLs mean an object in a store, and how messages show them."""

import re
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from folders import is_same, tree_of
from pytree2safetensors import (
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._storage import remote_path


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    path = tmp_path / "a b.safetensors"
    save_pytree(tree_of(1), path.as_uri())
    assert is_same(tree_of(1), load_pytree(path, mmap=True))
    assert is_same(tree_of(1), load_pytree(path.as_uri(), mmap=True))
    save_pytree(tree_of(2), UPath(f"file://{tmp_path}/model"))
    assert is_same(tree_of(2), load_pytree(UPath(f"file://{tmp_path}/model")))
    with pytest.raises(ValueError, match="is on another machine"):
        load_pytree("file://server/model")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})


@pytest.mark.usefixtures("memory")
def test_the_case_of_a_scheme_does_not_matter(tmp_path: Path) -> None:
    save_pytree(tree_of(1), f"FILE://{tmp_path}/a")
    assert is_same(tree_of(1), load_pytree(f"File://{tmp_path}/a", mmap=True))
    save_pytree(tree_of(2), "MEMORY://Run/A")
    assert is_same(tree_of(2), load_pytree("memory://Run/A"))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("url", ["memory://", "memory:///"])
def test_a_url_without_a_path_is_named(url: str) -> None:
    for work in (load_pytree, lambda path: save_pytree({"a": 1}, path)):
        with pytest.raises(IsADirectoryError) as caught:
            work(url)
        assert str(caught.value) == f"'{url}': IsADirectoryError"


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


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.com/a?b=c", "https://h.com/a?..."),
        ("https://me:secret@h.com/a", "https://...@h.com/a"),
        ("simplecache::https://me@h.com/a?b", "simplecache::https://...@h.com/a?..."),
        ("hf://someone/model@main/x", "hf://someone/model@main/x"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        ("404, url='http://h.com/a?t=s'", "404, url='http://h.com/a?...'"),
    ],
)
def test_credentials_are_left_out_of_urls(url: str, shown: str) -> None:
    assert remote_path.hide_credentials(url) == shown

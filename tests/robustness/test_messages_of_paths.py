"""Messages about paths, file objects and sizes that cannot be used."""

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from fsspec import AbstractFileSystem

from folders import is_same
from pytree2safetensors import (
    WeightsMismatchError,
    load_into_pytree,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._storage.locations import check_created, check_home

TREE = {"a": np.zeros(3, np.float32)}


def works(path: Any) -> list[Any]:
    return [lambda: load_pytree(path), lambda: save_pytree(TREE, path)]


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
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


def test_a_closed_file_object_is_named(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as file:
        save_pytree(TREE, file)
    for work, purpose in zip(works(file), ("reading", "writing"), strict=True):
        with pytest.raises(ValueError, match=f"m' is closed; open it for {purpose}"):
            work()


def test_a_file_object_for_the_other_direction_is_named(tmp_path: Path) -> None:
    save_pytree(TREE, tmp_path / "m")
    with (
        (tmp_path / "m").open("rb") as file,
        pytest.raises(io.UnsupportedOperation, match="is not open for writing; open it again"),
    ):
        save_pytree(TREE, file)
    with (
        (tmp_path / "m").open("ab") as file,
        pytest.raises(io.UnsupportedOperation, match="is not open for reading; open it again"),
    ):
        load_pytree(file)


def test_a_stored_key_says_what_template_it_needs(tmp_path: Path) -> None:
    save_pytree({"k": jax.random.key(0)}, tmp_path / "m")
    with pytest.raises(
        WeightsMismatchError,
        match=r"put a key in the template, such as jax\.random\.key\(0, impl='threefry2x32'\)",
    ):
        load_into_pytree({"k": np.zeros(2, np.uint32)}, tmp_path / "m")


def test_a_store_without_listings_is_explained() -> None:
    class Unlisted(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
        protocol = "unlisted"

        def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
            raise NotImplementedError

    fsspec.register_implementation("unlisted", Unlisted, clobber=True)
    with pytest.raises(ValueError, match="'unlisted://run' is in a store that lists no folders; "):
        load_pytree("unlisted://run")

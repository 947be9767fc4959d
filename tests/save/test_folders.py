"""Saving a folder of shards: the layout of model hubs, names, sizes, and what was there before."""

import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from folders import INDEX, is_same, names_in, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    load_metadata,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._format import index as index_format
from versions import posix, replaces_open_files


def metadata_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    metadata: dict[str, Any] = header["__metadata__"]
    return metadata


# --- the layout -------------------------------------------------------------------------------


def test_the_layout_is_that_of_hubs(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100, metadata={"license": "mit"})
    shards = shard_names(3)
    assert names_in(tmp_path / "m") == [*shards, INDEX]
    note = (
        r"{\"leaves\":{\"@d\":\"bool\",\"@e\":[\"str\",\"text 1\"]},"
        r"\"nodes\":{\"@b\":\"tuple\",\"@b#1\":\"None\"},\"version\":1}"
    )
    assert (tmp_path / "m" / INDEX).read_text() == (
        f'{{\n  "metadata": {{\n    "format": "flax",\n    "license": "mit",\n'
        f'    "pytree2safetensors": "{note}",\n    "total_size": 169\n  }},\n'
        f'  "weight_map": {{\n    "@a": "{shards[0]}",\n    "@b#0": "{shards[1]}",\n'
        f'    "@c": "{shards[2]}",\n    "@d": "{shards[2]}"\n  }}\n}}\n'
    )
    for shard in shards:
        assert metadata_of(tmp_path / "m" / shard) == {"format": "flax"}


def test_each_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    found: dict[str, Any] = {}
    for shard in shard_names(3):
        found.update(safetensors.numpy.load_file(tmp_path / shard))
    assert sorted(found) == ["@a", "@b#0", "@c", "@d"]
    assert found["@a"].tobytes() == np.full(16, 1, np.float32).tobytes()


def test_the_format_of_the_caller_is_that_of_the_shards(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100, metadata={"format": "np"})
    assert metadata_of(tmp_path / shard_names(3)[0]) == {"format": "np"}
    assert load_metadata(tmp_path) == {"format": "np"}


@pytest.mark.parametrize("tree", [tree_of(1), {}, {"empty": [], "none": None}, 1.5])
def test_one_shard_is_a_plain_file(tmp_path: Path, tree: Any) -> None:
    save_pytree(tree, tmp_path / "m", max_shard_size="5GB", metadata={"k": "v"}, checksum=True)
    assert names_in(tmp_path / "m") == ["model.safetensors"]
    save_pytree(tree, tmp_path / "plain", metadata={"k": "v"}, checksum=True)
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "plain").read_bytes()
    assert is_same(tree, load_pytree(tmp_path / "m"))


def test_one_tensor_beyond_the_limit_is_a_plain_file(tmp_path: Path) -> None:
    save_pytree({"a": np.zeros(5)}, tmp_path, max_shard_size=3)
    assert names_in(tmp_path) == ["model.safetensors"]


def test_a_single_file_may_have_a_longer_header_than_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_format, "MAX_SHARD_HEADER", 1000)
    monkeypatch.setattr("pytree2safetensors._save.plan.MAX_SHARD_HEADER", 1000)
    tree = {"a": np.zeros(8), "b": "text" * 1000}
    save_pytree(tree, tmp_path / "m", max_shard_size="5GB", metadata={"k": "v" * 1000})
    assert names_in(tmp_path / "m") == ["model.safetensors"]
    assert load_metadata(tmp_path / "m") == {"k": "v" * 1000}


def test_a_tensor_larger_than_the_limit_has_its_own_shard(tmp_path: Path) -> None:
    tree = {"a": np.zeros(8, np.uint8), "b": np.zeros(100, np.uint8), "c": np.zeros(8, np.uint8)}
    save_pytree(tree, tmp_path, max_shard_size=16)
    weights = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first, second = shard_names(2)
    assert weights == {"@a": second, "@b": first, "@c": second}


def test_saving_is_deterministic(tmp_path: Path) -> None:
    tree = tree_of(3)
    backwards = {key: tree[key] for key in reversed(tree)}
    for folder, saved in (("1", tree), ("2", backwards)):
        save_pytree(saved, tmp_path / folder, max_shard_size="0.1KB", checksum=True)
    assert names_in(tmp_path / "1") == names_in(tmp_path / "2")
    for name in names_in(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_file_objects_take_no_shards(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("wb") as file,
        pytest.raises(
            ValueError,
            match="max_shard_size= writes a folder, so it needs a path, not BufferedWriter",
        ),
    ):
        save_pytree(tree_of(1), file, max_shard_size="5GB")


def test_the_total_size_is_not_the_callers(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the metadata may not set 'total_size', which the"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100, metadata={"total_size": "1"})
    assert not (tmp_path / "m").exists()


# --- paths ------------------------------------------------------------------------------------


def test_folders_are_made(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path / "x/y/z", max_shard_size=100)
    assert is_same(tree_of(1), load_pytree(tmp_path / "x/y/z"))
    save_pytree(tree_of(2), f"{tmp_path}/x/y/", max_shard_size=100)
    assert is_same(tree_of(2), load_pytree(f"{tmp_path}/x/y/"))


@pytest.mark.parametrize("limit", [100, "5GB"])
@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json"])
def test_a_file_gives_the_stem(tmp_path: Path, limit: int | str, ending: str) -> None:
    save_pytree(tree_of(1), tmp_path / f"ckpt/policy{ending}", max_shard_size=limit)
    sharded = [*shard_names(3, "policy"), "policy.safetensors.index.json"]
    assert names_in(tmp_path / "ckpt") == (sharded if limit == 100 else ["policy.safetensors"])
    assert is_same(tree_of(1), load_pytree(tmp_path / "ckpt"))
    # A path that was saved to can be loaded, whether it became a file or shards.
    assert is_same(tree_of(1), load_pytree(tmp_path / "ckpt/policy.safetensors"))


def test_folders_may_have_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pytree(tree_of(1), "policy.safetensors", max_shard_size=100)
    assert names_in(tmp_path) == [*shard_names(3, "policy"), "policy.safetensors.index.json"]
    assert is_same(tree_of(1), load_pytree("."))
    assert is_same(tree_of(1), load_pytree("policy.safetensors.index.json"))
    save_pytree(tree_of(2), "sub", max_shard_size=100)
    assert is_same(tree_of(2), load_pytree("sub"))


@pytest.mark.skipif(os.sep == "\\", reason="a backslash separates folders there")
@pytest.mark.parametrize("limit", [100, 10**6])
@pytest.mark.parametrize("stem", [r"a\b", os.fsdecode(b"\xff")])
def test_a_stem_that_no_index_can_name_is_refused(tmp_path: Path, stem: str, limit: int) -> None:
    message = (
        f"shards cannot have the stem {stem!r}, because an index names files in a way that every system "
        "understands; choose a name of Unicode characters without a backslash"
    )
    with pytest.raises(FileFormatError, match=f"^{re.escape(message)}$"):
        save_pytree(tree_of(1), tmp_path / "run" / f"{stem}.safetensors", max_shard_size=limit)
    assert names_in(tmp_path) == []


def test_stems_of_any_characters(tmp_path: Path) -> None:
    of_posix = ["a:b", "a\nb"] if os.name == "posix" else []
    for stem in ["a b", "ü", "model-00001-of-00002", *of_posix, ""]:
        save_pytree(tree_of(1), tmp_path / f"{stem}.safetensors", max_shard_size=100)
        assert is_same(tree_of(1), load_pytree(tmp_path / f"{stem}.safetensors.index.json")), stem


@posix
def test_a_folder_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_pytree(tree_of(1), tmp_path / "link", max_shard_size=100)
    assert (tmp_path / "link").is_symlink()
    assert is_same(tree_of(1), load_pytree(tmp_path / "real"))


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(NotADirectoryError) as caught:
        save_pytree(tree_of(1), tmp_path / "file", max_shard_size=100)
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_folder_in_place_of_a_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / shard_names(3)[1]).mkdir()
    text = rf"\(the save would replace or remove '{shard_names(3)[1]}'\)"
    with pytest.raises(IsADirectoryError, match=text):
        save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    assert names_in(tmp_path) == [shard_names(3)[1]]


@posix
def test_new_files_have_the_permissions_of_the_old_ones(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}
    (tmp_path / INDEX).chmod(0o600)
    (tmp_path / shard_names(3)[2]).chmod(0o644)
    save_pytree(tree_of(2), tmp_path, max_shard_size=100)
    found = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names_in(tmp_path)]
    assert found == [0o640, 0o640, 0o644, 0o600]


# --- what was there before --------------------------------------------------------------------


def test_a_later_save_leaves_nothing_of_an_older_one(tmp_path: Path) -> None:
    others = [
        "config.json",
        "modelx-00001-of-00003.safetensors",
        "policy-00001-of-00002.safetensors",
    ]
    others += [
        "model-1-of-3.safetensors",
        "model-00001-of-00002.safetensors.bak",
        "policy.safetensors",
    ]
    for name in others:
        (tmp_path / name).write_bytes(name.encode())
    three, many = shard_names(3), shard_names(4)
    # The shards of these sizes are 3, 4, 1, 3 and 3.
    limits: list[int | str] = [100, 40, "5GB", 100, 100]
    for seed, limit in enumerate(limits):
        save_pytree(tree_of(seed), tmp_path, max_shard_size=limit)
        own = {100: [*three, INDEX], 40: [*many, INDEX], "5GB": ["model.safetensors"]}[limit]
        assert names_in(tmp_path) == sorted([*others, *own])
        assert is_same(tree_of(seed), load_pytree(tmp_path))
    for name in others:
        assert (tmp_path / name).read_bytes() == name.encode()


@pytest.mark.parametrize("options", [{}, {"checksum": True, "durable": False}])
@pytest.mark.parametrize("stem", ["model", "policy"])
def test_one_file_replaces_the_shards_that_its_path_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, options: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{stem}.safetensors"
    for path, folder in ((tmp_path / "m" / name, tmp_path / "m"), (Path(name), tmp_path)):
        save_pytree(tree_of(1), path, max_shard_size=100)
        (folder / f"x{stem}-00001-of-00002.safetensors").write_bytes(b"another's")
        (folder / "config.json").write_bytes(b"{}")
        assert is_same(tree_of(1), load_pytree(path))
        save_pytree(tree_of(2), path, **options)
        found = {entry.name for entry in folder.iterdir() if entry.is_file()}
        assert found == {name, f"x{stem}-00001-of-00002.safetensors", "config.json"}
        assert is_same(tree_of(2), load_pytree(path))
        save_pytree(tree_of(3), path)
        assert is_same(tree_of(3), load_pytree(path))


def test_one_file_replaces_shards_that_are_still_being_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_pytree_async(tree_of(1), path, max_shard_size=100)
    save_pytree_async(tree_of(2), path).result()
    assert names_in(tmp_path) == ["model.safetensors"]
    assert is_same(tree_of(2), load_pytree(tmp_path))


def test_shards_that_are_saved_during_a_save_of_one_file_stay_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved: list[None] = []

    def save_shards(done: int, total: int) -> None:
        if not saved:
            saved.append(save_pytree(tree_of(2), path, max_shard_size=100))

    save_pytree(tree_of(1), path, progress=save_shards)
    assert names_in(tmp_path) == [*shard_names(3), "model.safetensors", INDEX]
    both = f"'{INDEX}', 'model.safetensors'; pass the path of the one to load"
    with pytest.raises(FileFormatError, match=re.escape(both)):
        load_pytree(tmp_path)
    assert is_same(tree_of(1), load_pytree(path))
    assert is_same(tree_of(2), load_pytree(tmp_path / INDEX))


def test_a_file_beside_shards_is_replaced_without_them(tmp_path: Path) -> None:
    """A load prefers the file, so a save replaces only the file."""
    path = tmp_path / "model.safetensors"
    save_pytree(tree_of(1), path, max_shard_size=100)
    save_pytree(tree_of(2), tmp_path / "other")
    (tmp_path / "other").rename(path)
    save_pytree(tree_of(3), path)
    assert names_in(tmp_path) == [*shard_names(3), "model.safetensors", INDEX]
    assert is_same(tree_of(3), load_pytree(path))
    with pytest.raises(FileFormatError, match="pass the path of the one to load"):
        load_pytree(tmp_path)


def test_shards_without_an_index_stay_unless_shards_are_saved(tmp_path: Path) -> None:
    """They may be a download in progress."""
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).unlink()
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    save_pytree(tree_of(2), tmp_path / "model.safetensors")
    assert names_in(tmp_path) == [*before, "model.safetensors"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    save_pytree(tree_of(3), tmp_path, max_shard_size="5GB")
    assert names_in(tmp_path) == ["model.safetensors"]


@posix
def test_symbolic_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """A hub's cache has links to files that other revisions share."""
    folder, shared = tmp_path / "m", tmp_path / "shared"
    save_pytree(tree_of(1), folder, max_shard_size=100)
    shared.mkdir()
    before = {}
    for name in names_in(folder):
        (folder / name).rename(shared / name)
        (folder / name).symlink_to(shared / name)
        before[name] = (shared / name).read_bytes()
    assert is_same(tree_of(1), load_pytree(folder))
    save_pytree(tree_of(2), folder, max_shard_size=100)
    assert is_same(tree_of(2), load_pytree(folder))
    assert {name: (shared / name).read_bytes() for name in names_in(shared)} == before
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(tmp_path / "nothing")
    save_pytree(tree_of(3), folder, max_shard_size=100)
    assert is_same(tree_of(3), load_pytree(folder))


@pytest.mark.parametrize("mmap", [False, pytest.param(True, marks=replaces_open_files)])
def test_a_tree_goes_back_over_the_files_it_came_from(tmp_path: Path, mmap: bool) -> None:
    tree = {f"w{i}": jnp.full((3000,), i, jnp.float32) for i in range(4)}
    save_pytree(tree, tmp_path, max_shard_size="15KB")
    assert names_in(tmp_path) == [*shard_names(4), INDEX]
    loaded = load_pytree(tmp_path, mmap=mmap)
    swapped = dict(zip(loaded, reversed(loaded.values()), strict=True))
    save_pytree(swapped, tmp_path, max_shard_size="15KB")
    expected = dict(zip(tree, reversed(tree.values()), strict=True))
    assert is_same(expected, load_pytree(tmp_path))
    assert is_same(tree, loaded)


def test_an_empty_path_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (save_pytree, save_pytree_async):
        with pytest.raises(FileNotFoundError):
            save(tree_of(1), "", max_shard_size=100)
    assert not [*tmp_path.iterdir()]


def test_the_error_for_shards_without_an_index_names_the_path_of_the_save(tmp_path: Path) -> None:
    tree = {"a": np.zeros(9), "b": np.zeros(9)}
    save_pytree(tree, tmp_path / "model.safetensors", max_shard_size=80)
    assert (tmp_path / INDEX).exists()
    (tmp_path / INDEX).unlink()
    for path in (tmp_path, tmp_path / INDEX, tmp_path / "model.safetensors"):
        with pytest.raises(FileFormatError, match="but no index: a save was interrupted"):
            load_pytree(path)


@pytest.mark.parametrize("late", [False, True], ids=["before", "during the save"])
def test_what_cannot_be_removed_afterwards_is_an_error_before(tmp_path: Path, late: bool) -> None:
    def make(*_: int) -> None:
        (tmp_path / "model.safetensors").mkdir(exist_ok=True)

    if not late:
        make()
    text = r"\(the save would replace or remove 'model.safetensors'\)"
    with pytest.raises(IsADirectoryError, match=text):
        save_pytree(
            {"a": np.zeros(9), "b": np.zeros(9)}, tmp_path, max_shard_size=80, progress=make
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

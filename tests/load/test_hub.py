"""Folders of shards: the layout of model hubs, whole or refused at every moment, hostile or not."""

import errno
import functools
import http.server
import json
import os
import random
import re
import shutil
import stat
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors import (
    FileFormatError,
    Pytree2SafetensorsError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._compare import assert_same
from pytree2safetensors._format import index as index_format
from pytree2safetensors._format.header import in_order
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._load.checkpoint import OpenCheckpoint, open_checkpoint
from pytree2safetensors._load.locate import Index
from pytree2safetensors._storage.atomic_file import locked
from pytree2safetensors.testing import pytrees

INDEX = "model.safetensors.index.json"


def tree_of(seed: int) -> Any:
    """Four tensors of 64, 64, 40 and 1 bytes, and a note; every seed gives other values."""
    return {
        "a": jnp.full((16,), seed, jnp.float32),
        "b": (jnp.full((16,), -seed, jnp.int32), None),
        "c": jnp.full((10,), seed / 2, jnp.float32),
        "d": bool(seed % 2),
        "e": f"text {seed}",
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard_names(count: int, stem: str = "model") -> list[str]:
    return [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def is_same(tree: Any, found: Any) -> bool:
    try:
        assert_same(tree, found, "from the folder")
    except AssertionError:
        return False
    return True


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


def test_a_tensor_beyond_the_size_is_alone(tmp_path: Path) -> None:
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


SIZES: dict[str | int, int] = {
    1: 1,
    5_000_000_000: 5 * 10**9,
    "5GB": 5 * 10**9,
    "5gb": 5 * 10**9,
    " 1.5 MB ": 1_500_000,
    "0.29KB": 290,  # of which a float would make 289 or 290
    "2TB": 2 * 10**12,
    "100B": 100,
    "1.9B": 1,
}


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_sizes_are_decimal(size: int | str) -> None:
    assert index_format.parse_size(size) == SIZES[size]


@pytest.mark.parametrize("size", ["", "5", "GB", "5GiB", "-5GB", "5e3KB", "1_0KB", "٥GB", "inf GB"])
def test_other_sizes_are_refused(tmp_path: Path, size: str) -> None:
    message = (
        f"max_shard_size={size!r} is no size; write a number of bytes, or a decimal number and "
        "one of the units B, KB, MB, GB, TB, as in '5GB'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("size", [0, -1, True, "0GB", "0.9B"])
def test_a_shard_takes_a_byte(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size is .*, and a shard takes at least one"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=size)


def test_file_objects_take_no_shards(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("wb") as file,
        pytest.raises(ValueError, match="max_shard_size= writes a folder, and BufferedWriter is"),
    ):
        save_pytree(tree_of(1), file, max_shard_size="5GB")


def test_the_total_size_is_not_the_callers(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the metadata may not set 'total_size', which an"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100, metadata={"total_size": "1"})
    assert not (tmp_path / "m").exists()


def test_an_index_beyond_what_readers_allow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_format, "MAX_HEADER", 400)
    with pytest.raises(FileFormatError, match=r"the index would take 4.. bytes, and readers allow"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100)
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
    # What was saved as this path loads as this path, whatever it became.
    assert is_same(tree_of(1), load_pytree(tmp_path / "ckpt/policy.safetensors"))


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pytree(tree_of(1), "policy.safetensors", max_shard_size=100)
    assert names_in(tmp_path) == [*shard_names(3, "policy"), "policy.safetensors.index.json"]
    assert is_same(tree_of(1), load_pytree("."))
    assert is_same(tree_of(1), load_pytree("policy.safetensors.index.json"))
    save_pytree(tree_of(2), "sub", max_shard_size=100)
    assert is_same(tree_of(2), load_pytree("sub"))


def test_stems_of_any_characters(tmp_path: Path) -> None:
    for stem in ["a b", "ü", "model-00001-of-00002", "a:b", "a\nb", ""]:
        save_pytree(tree_of(1), tmp_path / f"{stem}.safetensors", max_shard_size=100)
        assert is_same(tree_of(1), load_pytree(tmp_path / f"{stem}.safetensors.index.json")), stem


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
    with pytest.raises(IsADirectoryError):
        save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    assert names_in(tmp_path) == [shard_names(3)[1]]


def test_permissions_are_those_of_what_is_replaced(tmp_path: Path) -> None:
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


def test_symbolic_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """A hub's cache is made of links to files that other revisions share."""
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


@pytest.mark.parametrize("mmap", [False, True])
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


# --- loading ----------------------------------------------------------------------------------


def load_quietly(path: Path) -> Any:
    """The tree, or the class of what loading raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAX cannot hold the dtypes")
        try:
            return load_pytree(path)
        except Pytree2SafetensorsError as error:
            return type(error)


@given(pytrees(), st.integers(1, 300), st.booleans())
def test_a_folder_holds_what_a_file_holds(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, limit: int, checksum: bool
) -> None:
    folder = tmp_path_factory.mktemp("m")
    try:
        save_pytree(tree, folder / "one", durable=False, checksum=checksum)
        save_pytree(tree, folder / "m", max_shard_size=limit, durable=False, checksum=checksum)
        one, many = load_quietly(folder / "one"), load_quietly(folder / "m")
        assert one is many or is_same(one, many)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["", INDEX])
def test_every_loader_takes_the_folder_and_the_index(tmp_path: Path, where: str) -> None:
    tree = tree_of(1)
    save_pytree(tree, tmp_path, max_shard_size=100, metadata={"run": "17"}, checksum=True)
    path = tmp_path / where
    assert is_same(tree, load_pytree(path))
    assert is_same(tree, load_pytree(path, mmap=True))
    assert is_same(tree["b"], load_pytree(path, prefix="@b"))
    assert is_same(tree, load_into_pytree(tree_of(2), path))
    assert load_metadata(path) == {"run": "17"}
    abstract = load_abstract(path)
    assert (abstract["a"].shape, abstract["a"].dtype) == ((16,), jnp.float32)
    assert abstract["e"] == "text 1"


def test_a_prefix_reads_its_shards_alone(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    seen: list[tuple[int, int]] = []
    load_pytree(tmp_path, prefix="@c", progress=lambda *report: seen.append(report))
    assert seen == [(40, 40)]


def test_progress_counts_all_shards(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    save_pytree(
        tree_of(1), tmp_path, max_shard_size=100, progress=lambda *report: seen.append(report)
    )
    sizes = [(tmp_path / name).stat().st_size for name in names_in(tmp_path)]
    assert seen == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(4)]
    seen.clear()
    load_pytree(tmp_path, progress=lambda *report: seen.append(report))
    assert seen[-1] == (169, 169)


def test_the_index_of_the_model_comes_first(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path / "a.safetensors", max_shard_size=100)
    save_pytree(tree_of(2), tmp_path, max_shard_size=100)
    assert is_same(tree_of(2), load_pytree(tmp_path))
    assert is_same(tree_of(1), load_pytree(tmp_path / "a.safetensors.index.json"))


def test_an_index_of_a_variant(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).rename(tmp_path / "model.safetensors.index.fp16.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert is_same(tree_of(1), load_pytree(tmp_path))


def test_numbers_in_the_metadata_of_other_programs_are_no_metadata(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100, metadata={"run": "17"})
    index = json.loads((tmp_path / INDEX).read_text())
    index["metadata"] |= {"total_size": 1.5, "total_parameters": 37, "list": []}
    (tmp_path / INDEX).write_text(json.dumps(index | {"more": 1}))
    assert load_metadata(tmp_path) == {"run": "17"}
    assert is_same(tree_of(1), load_pytree(tmp_path))
    del index["metadata"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert load_metadata(tmp_path) == {}
    assert isinstance(load_pytree(tmp_path)["b"], list)  # without the note


# --- folders that are refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no safetensors file and no index"),
        (["config.json"], "has no safetensors file and no index"),
        (
            shard_names(2),
            "has 'model-00001-of-00002.safetensors' and no index: a save was cut short or is under "
            "way, or the index was not copied; save or copy it again",
        ),
        (
            [".pytree2safetensors-0123456789abcdef.tmp"],
            "has '.pytree2safetensors-0123456789abcdef.tmp' and no index: a save was cut short",
        ),
        (
            [INDEX, "model.safetensors"],
            f"has '{INDEX}', 'model.safetensors'; name the one to load",
        ),
        (
            ["a.safetensors.index.json", "model.safetensors"],
            "has 'a.safetensors.index.json', 'model.safetensors'; name the one to load",
        ),
        (
            ["a.safetensors.index.json", "a.safetensors"],
            "has 'a.safetensors.index.json', 'a.safetensors'; name the one to load",
        ),
        (
            [f"{stem}.safetensors.index.json" for stem in "abcdefg"],
            "has 'a.safetensors.index.json', 'b.safetensors.index.json', "
            "'c.safetensors.index.json', 'd.safetensors.index.json', 'e.safetensors.index.json' "
            "and 2 more; name the one to load",
        ),
        (
            ["-00001-of-00002.safetensors"],
            "has '-00001-of-00002.safetensors' and no index: a save was cut short",
        ),
        (["a.safetensors", "b.safetensors"], "has 'a.safetensors', 'b.safetensors'; name the one"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_folders_without_one_checkpoint(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileFormatError) as caught:
        load_pytree(tmp_path)
    assert str(caught.value).startswith(f"the folder {str(tmp_path)!r} {message}")
    assert "\n" not in str(caught.value)


def test_a_single_file_beside_shards_without_an_index_loads(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size="5GB")
    (tmp_path / shard_names(3)[0]).write_bytes(b"")
    assert is_same(tree_of(1), load_pytree(tmp_path))


def test_a_missing_index_beside_shards(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileFormatError, match="and no index: a save was cut short"):
        load_pytree(tmp_path / INDEX)
    with pytest.raises(FileNotFoundError):
        load_pytree(tmp_path / "policy.safetensors.index.json")
    with pytest.raises(FileNotFoundError):
        load_pytree(tmp_path / "none" / INDEX)


FIRST, SECOND, THIRD = shard_names(3)


def replaced(name: str, shard: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index | {"weight_map": index["weight_map"] | {name: shard}}


def said(**metadata: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index | {"metadata": index["metadata"] | metadata}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(index: dict[str, Any]) -> Any:
        del index["weight_map"][name]
        return index

    return change


NO_MAP = "has no weight_map of names to names of files"
NOT_PLAIN = "which is no plain name of a file in its folder"
BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda index: [index], "is no JSON object"),
    "no map": (lambda index: {"metadata": {}}, NO_MAP),
    "the map a list": (lambda index: index | {"weight_map": [FIRST]}, NO_MAP),
    "a number": (replaced("@a", 1), NO_MAP),
    "null": (replaced("@a", None), NO_MAP),
    "nothing": (replaced("@a", ""), f"places '@a' in '', {NOT_PLAIN}"),
    "this folder": (replaced("@a", "."), NOT_PLAIN),
    "above": (replaced("@a", ".."), NOT_PLAIN),
    "up and down": (replaced("@a", f"../m/{FIRST}"), NOT_PLAIN),
    "a detour": (replaced("@a", f"./{FIRST}"), NOT_PLAIN),
    "a folder": (replaced("@a", f"sub/{FIRST}"), NOT_PLAIN),
    "absolute": (replaced("@a", "/etc/passwd"), f"places '@a' in '/etc/passwd', {NOT_PLAIN}"),
    "Windows": (replaced("@a", f"..\\m\\{FIRST}"), NOT_PLAIN),
    "NUL": (replaced("@a", f"{FIRST}\0"), NOT_PLAIN),
    "a surrogate": (replaced("@a", "\ud800"), NOT_PLAIN),
    "no such shard": (
        replaced("@a", "model-00004-of-00003.safetensors"),
        "names the shard 'model-00004-of-00003.safetensors', which is missing; copy the folder",
    ),
    "a shard of another name": (replaced("@a", "x" * 10_000), "(10,000 characters), which is miss"),
    "a pipe": (replaced("@a", "pipe"), "names the shard 'pipe', which is missing"),
    "the index": (replaced("@a", INDEX), "is no safetensors file"),
    "no safetensors file": (replaced("@a", "junk"), "is no safetensors file"),
    "another shard": (replaced("@a", SECOND), f"the shard '{SECOND}' lacks '@a', and "),
    "a name that the shard lacks": (replaced("@x", FIRST), f"the shard '{FIRST}' lacks '@x', and"),
    "a name that the index lacks": (without("@d"), f"the shard '{THIRD}' has '@d', and "),
    "metadata a list": (lambda index: index | {"metadata": []}, "are no JSON object"),
    "metadata null": (lambda index: index | {"metadata": None}, "are no JSON object"),
    "a note that is none": (said(pytree2safetensors=1), "has 'pytree2safetensors', which is no"),
    "digests that are none": (
        said(**{"pytree2safetensors.sha256": {}}),
        "has 'pytree2safetensors.sha256', which is no string",
    ),
    "a note of nothing": (said(pytree2safetensors="{}"), "has no version"),
    "surrogates": (said(run="\udc00"), "hold a lone surrogate"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_is_not_trusted(tmp_path: Path, case: str) -> None:
    change, message = BAD_INDEXES[case]
    folder = tmp_path / "m"
    save_pytree(tree_of(1), folder, max_shard_size=100)
    (folder / "sub").mkdir()
    shutil.copy(folder / FIRST, folder / "sub" / FIRST)
    (folder / "junk").write_bytes(b"\xff" * 100)
    os.mkfifo(folder / "pipe")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index)))
    with pytest.raises(FileFormatError) as caught:
        load_pytree(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


BAD_TEXTS = {
    b"": "is not valid JSON",
    b"{": "is not valid JSON",
    b"\xff{}": "is not valid UTF-8",
    b"\xef\xbb\xbf{}": "is not valid JSON",
    b'{"weight_map": {"@a": "x", "@a": "y"}}': "has '@a' twice",
    b'{"weight_map": {}, "metadata": {"total_size": NaN}}': "is not valid JSON",
    b"[" * 100_000: "is nested too deep",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: repr(text[:20]))
def test_an_index_is_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(FileFormatError) as caught:
        load_pytree(tmp_path)
    assert f"the index {str(tmp_path / INDEX)!r} {BAD_TEXTS[text]}" in str(caught.value)


def test_an_index_has_a_size(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(FileFormatError, match="has 100,000,001 bytes, and an index has at most"):
        load_pytree(tmp_path)


def test_an_index_of_nothing_is_an_empty_tree(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert load_pytree(tmp_path) == {}


def test_a_folder_named_as_an_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(IsADirectoryError):
        load_pytree(tmp_path)


def flips(raw: bytes) -> Iterator[bytes]:
    for position in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


def test_every_flipped_bit_of_an_index_is_found_or_changes_nothing(tmp_path: Path) -> None:
    tree = {"a": np.arange(3, dtype=np.int8), "b": ("x",), "c": np.int8(1)}
    save_pytree(tree, tmp_path, max_shard_size=3, metadata={"k": "v"}, checksum=True)
    found = 0
    for changed in flips((tmp_path / INDEX).read_bytes()):
        (tmp_path / INDEX).write_bytes(changed)
        try:
            loaded, metadata = load_pytree(tmp_path), load_metadata(tmp_path)
        except Pytree2SafetensorsError:
            found += 1
        else:
            # The one name that nothing protects is that of the digests themselves.
            assert metadata["k"] == "v"
            assert loaded["b"] == ("x",)
            assert loaded["a"].tobytes() == b"\0\1\2"
    assert found > 1000


@given(st.randoms(use_true_random=False))
def test_a_mutated_index_is_a_tree_or_an_error(one_folder: Path, source: random.Random) -> None:
    text = bytearray((one_folder / "whole").read_bytes())
    tokens = [
        b"..",
        b"/",
        b"{",
        b"}",
        b'"',
        b"\\u0000",
        b"@a",
        FIRST.encode(),
        b"[",
        b",",
        b"1e999",
    ]
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(text))
        stop = start + source.choice([0, 1, 1, source.randrange(40)])
        text[start:stop] = source.choice([bytes([source.randrange(256)]), *tokens])
    (one_folder / INDEX).write_bytes(text)
    try:
        load_pytree(one_folder)
    except (Pytree2SafetensorsError, OSError) as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    save_pytree(tree_of(1), folder, max_shard_size=100)
    (folder / INDEX).rename(folder / "whole")
    return folder


# --- whole or not at all ----------------------------------------------------------------------

CALLS = [
    "open", "write", "fsync", "close", "replace", "unlink", "mkdir", "rmdir", "listdir", "stat",
    "lstat", "fchmod", "posix_fallocate",
]  # fmt: skip
CHANGES = {"open", "write", "replace", "unlink", "mkdir", "rmdir"}


Fault: TypeAlias = Callable[[Callable[[], Any]], Any]


class System:
    """The system's calls, counted; `act` is asked at each."""

    def __init__(self, act: Callable[[int, str, Callable[[], Any], Any], Any]) -> None:
        self.act, self.count = act, 0

    def __enter__(self) -> "System":
        self.patch = pytest.MonkeyPatch()
        for name in CALLS:
            real = (lambda _: None) if name == "fsync" else getattr(os, name)  # disks are slow
            self.patch.setattr(os, name, functools.partial(self.call, name, real))
        # Small files too are to have their space reserved.
        self.patch.setattr("pytree2safetensors._storage.atomic_file._PREALLOCATED", 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def call(self, name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.count += 1
        return self.act(self.count - 1, name, lambda: real(*args, **options), args)


def fail_with(code: int) -> Fault:
    def fail(real: Callable[[], Any]) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def fail_afterwards(real: Callable[[], Any]) -> Any:
    real()
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt(real: Callable[[], Any]) -> Any:
    raise KeyboardInterrupt


def interrupt_afterwards(real: Callable[[], Any]) -> Any:
    real()
    raise KeyboardInterrupt


FAULTS: dict[str, Fault] = {
    "ENOSPC": fail_with(errno.ENOSPC),
    "EIO": fail_with(errno.EIO),
    "EINTR": fail_with(errno.EINTR),
    "EIO afterwards": fail_afterwards,
    "interrupt": interrupt,
    "interrupt afterwards": interrupt_afterwards,
}
# What was there, and the size of the shards to be: 3 of the same names, 4, or 1.
SCENES: dict[str, tuple[int | str | None, int | str]] = {
    "nothing, then shards": (None, 100),
    "shards of the same names": (100, 100),
    "shards of other names": (100, 40),
    "shards, then one file": (100, "5GB"),
    "one file, then shards": ("5GB", 100),
    "one file, then another": ("5GB", "5GB"),
    "shards without an index": ("cut short", 100),
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what was there in each scene."""
    root = tmp_path_factory.mktemp("before")
    for scene, (there, _) in SCENES.items():
        folder = root / scene / "x/m"
        if there is None:
            (root / scene).mkdir()
            continue
        save_pytree(tree_of(1), folder, max_shard_size=100 if there == "cut short" else there)
        (folder / "config.json").write_text("kept")
        if there == "cut short":
            (folder / INDEX).unlink()
    return root


def outcome(folder: Path) -> str:
    """What a reader finds."""
    try:
        loaded = load_pytree(folder)
    except FileFormatError as error:
        if "and no index: a save was cut short" in str(error):
            return "cut short"
        if "is being replaced by another save" in str(error):
            return "cut short"
        if "has no safetensors file and no index" in str(error):
            return "nothing"
        assert "; name the one to load" in str(error)
        found = {load_pytree(folder / name)["e"] for name in (INDEX, "model.safetensors")}
        assert found == {"text 1", "text 2"}
        return "both"
    except FileNotFoundError:
        return "nothing"
    for seed, name in ((1, "old"), (2, "new")):
        if is_same(tree_of(seed), loaded):
            return name
    raise AssertionError("a mixture")


def save_new(folder: Path, scene: str) -> None:
    save_pytree(tree_of(2), folder, max_shard_size=SCENES[scene][1])


def contents(root: Path) -> dict[str, bytes]:
    """All that is below a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"a folder"
        for path in root.rglob("*")
    }


def each_failure(
    root: Path, before: Path, scene: str, fails: Callable[[int, int, str], bool], fault: Fault
) -> Iterator[tuple[str, BaseException | None]]:
    """Save once for each position at which a call may fail; what failed, and what was raised."""
    position, failing = 0, [""]
    while failing:
        failing.clear()
        if not root.exists() or contents(root) != contents(before / scene):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(before / scene, root)

        def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
            if not fails(position, count, name):
                return real()
            failing.append(f"{name} {args}")
            return fault(real)

        raised: BaseException | None = None
        with System(act):
            try:
                save_new(root / "x/m", scene)
            except (OSError, KeyboardInterrupt) as error:
                raised = error
        yield f"at call {position}: {failing[:1]}", raised
        position += 1
    assert position > 15


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("scene", SCENES)
def test_a_save_that_fails_changes_nothing(
    tmp_path: Path, before: Path, scene: str, kind: str
) -> None:
    """Every call of the system fails in turn."""
    root, was = tmp_path / "root", outcome(before / scene / "x/m")
    there = contents(before / scene)
    for what, raised in each_failure(
        root, before, scene, lambda position, count, _: count == position, FAULTS[kind]
    ):
        now = contents(root)
        left = [path for path in now if ".pytree2safetensors-" in path]
        assert not left or ("['unlink" in what and len(left) == 1), what
        found = outcome(root / "x/m") if now != there else was
        # Once the index is there the save is done; what goes after that may still be there.
        assert found in ({"new"} if raised is None else {was, "new", "both"}), what
        if found == was:
            assert now.items() >= there.items(), what
        if isinstance(raised, OSError):
            assert raised.filename == str(root / "x/m"), what
            assert raised.errno in {errno.ENOSPC, errno.EIO, errno.EINTR}, what


@pytest.mark.parametrize("scene", SCENES)
def test_a_failing_rename_brings_everything_back(tmp_path: Path, before: Path, scene: str) -> None:
    renames = failing = 0

    def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
        nonlocal renames
        renames += name == "replace"
        if name == "replace" and renames == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real()

    root = tmp_path / "root"
    shutil.copytree(before / scene, root)
    while failing == 0 or renames >= failing:
        assert contents(root) == contents(before / scene)
        renames, failing = 0, failing + 1
        with System(act), suppress(OSError):
            save_new(root / "x/m", scene)
    assert outcome(root / "x/m") == "new"
    assert failing > 1


@pytest.mark.parametrize("failing", range(8))
def test_what_cannot_be_looked_at_is_neither_replaced_nor_removed(
    tmp_path: Path, before: Path, failing: int
) -> None:
    """A rename fails (of none, none), and no file can be looked at from then on."""
    there = before / "shards of the same names"
    root, renames, blind = tmp_path / "root", 0, failing == 0
    shutil.copytree(there, root)

    def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
        nonlocal renames, blind
        renames += name == "replace"
        blind = blind or (name == "replace" and renames == failing)
        if blind and (name == "lstat" or (failing and name == "replace")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real()

    with System(act), pytest.raises(OSError, match="Input/output error"):
        save_new(root / "x/m", "shards of the same names")
    assert outcome(root / "x/m") == ("old" if failing < 2 else "cut short")
    assert set(contents(root).values()) >= set(contents(there).values())


@pytest.mark.parametrize("scene", SCENES)
def test_where_all_calls_fail_from_some_moment_on_there_is_no_mixture(
    tmp_path: Path, before: Path, scene: str
) -> None:
    root, was = tmp_path / "root", outcome(before / scene / "x/m")
    for what, _ in each_failure(
        root, before, scene, lambda position, count, _: count >= position, FAULTS["EIO"]
    ):
        assert outcome(root / "x/m") in {was, "new", "both", "cut short"}, what


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    write = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, piece: write(descriptor, piece[:7]))
        save_pytree(tree_of(2), tmp_path, max_shard_size=100)
    assert outcome(tmp_path) == "new"


@pytest.mark.parametrize("scene", SCENES)
def test_a_reader_at_any_moment_finds_the_old_or_the_new_or_says_so(
    tmp_path: Path, before: Path, scene: str
) -> None:
    """Which is what a reader finds after the process was killed at that moment, too."""
    root = tmp_path / "root"
    shutil.copytree(before / scene, root)
    folder = root / "x/m"
    found = [outcome(folder)]
    reading = False

    def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
        nonlocal reading
        result = real()
        if name in CHANGES and not reading:
            reading = True
            found.append(outcome(folder))
            reading = False
        return result

    with System(act):
        save_new(folder, scene)
    stages = [name for name, after in zip(found, [*found[1:], ""], strict=True) if name != after]
    assert (
        stages
        == {
            "nothing, then shards": ["nothing", "cut short", "new"],
            "shards of the same names": ["old", "cut short", "new"],
            "shards of other names": ["old", "new"],
            "shards, then one file": ["old", "both", "new"],
            "one file, then shards": ["old", "both", "new"],
            "one file, then another": ["old", "new"],
            "shards without an index": ["cut short", "new"],
        }[scene]
    )


@pytest.mark.parametrize("durable", [True, False])
def test_files_reach_the_disk_before_their_names(tmp_path: Path, durable: bool) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    steps: list[str] = []

    def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
        if name == "fsync":
            is_folder = stat.S_ISDIR(os.fstat(args[0]).st_mode)
            steps.append("flush folder" if is_folder else "flush")
        elif name == "replace":
            source, target = (Path(path).name for path in args)
            steps.append(f"aside {source}" if target[0] == "." else f"name {target}")
        elif name == "unlink":
            steps.append("remove")
        return real()

    with System(act):
        save_pytree(tree_of(2), tmp_path, max_shard_size=100, durable=durable)
    steps = [step for step in steps if step != "remove"]
    expected = ["flush"] * 4 + [f"aside {INDEX}", "flush folder"]
    for shard in shard_names(3):
        expected += [f"aside {shard}", f"name {shard}"]
    expected += ["flush folder", f"name {INDEX}", "flush folder"]
    assert steps == [step for step in expected if durable or "flush" not in step]


def test_new_folders_reach_the_disk(tmp_path: Path) -> None:
    flushed: set[int] = set()

    def act(count: int, name: str, real: Callable[[], Any], args: Any) -> Any:
        if name == "fsync":
            flushed.add(os.fstat(args[0]).st_ino)
        return real()

    with System(act):
        save_pytree(tree_of(1), tmp_path / "x/y", max_shard_size=100)
    folders = [tmp_path, tmp_path / "x", tmp_path / "x/y"]
    assert {folder.stat().st_ino for folder in folders} <= flushed


def test_an_error_in_a_leaf_changes_nothing(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def fail(done: int, total: int) -> None:
        if done > 400:
            raise Broken

    save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100)
    for folder in (tmp_path / "m", tmp_path / "new/er"):
        with pytest.raises(Broken):
            save_pytree(tree_of(2), folder, max_shard_size=100, progress=fail)
    assert names_in(tmp_path) == ["m"]
    assert names_in(tmp_path / "m") == [*shard_names(3), INDEX]
    assert outcome(tmp_path / "m") == "old"


# --- several at once --------------------------------------------------------------------------


def test_two_savers_never_make_a_mixture(tmp_path: Path) -> None:
    limits: list[int | str] = [100, 40, "5GB", 100]

    def save(seed: int) -> None:
        for step in range(20):
            limit = limits[(step + seed) % 4] if step < 19 else 100
            save_pytree(tree_of(seed), tmp_path, max_shard_size=limit, durable=False)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(save, seed) for seed in (1, 2)]:
            done.result()
    assert names_in(tmp_path) == [*shard_names(3), INDEX]
    assert outcome(tmp_path) in {"old", "new"}


def test_a_reader_beside_a_saver_never_finds_a_mixture(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    done = threading.Event()

    def save() -> None:
        for step in range(60):
            save_pytree(tree_of(2 - step % 2), tmp_path, max_shard_size=100, durable=False)
        done.set()

    saver = threading.Thread(target=save)
    saver.start()
    try:
        while not done.is_set():
            assert outcome(tmp_path) in {"old", "new", "cut short"}
    finally:
        saver.join()
    assert outcome(tmp_path) == "old"


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
    with pytest.raises(FileFormatError, match="is being replaced by another save; load it after"):
        load_pytree(tmp_path)
    assert is_same(tree_of(1), load_pytree(tmp_path))


def test_an_empty_path_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (save_pytree, save_pytree_async):
        with pytest.raises(FileNotFoundError):
            save(tree_of(1), "", max_shard_size=100)
    assert not [*tmp_path.iterdir()]


def descriptors_in(folder: Path) -> int:
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.is_relative_to(folder) for link in links)


def content_of(store: OpenCheckpoint, name: str) -> bytes:
    return b"".join(piece.tobytes() for piece in store.pieces(name))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says what is open")
@pytest.mark.parametrize("mmap", [False, True])
def test_few_shards_are_open_at_once(
    mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.checkpoint._KEPT", 2)
    tree = {f"w{i}": jnp.full(10, i, jnp.float32) for i in range(20)}
    save_pytree(tree, tmp_path, max_shard_size=40, checksum=True)
    monkeypatch.chdir(tmp_path.parent)
    with open_checkpoint(tmp_path.name) as store:
        assert descriptors_in(tmp_path) == 2
        monkeypatch.chdir("/")
        for name, values in tree.items():
            assert content_of(store, f"@{name}") == np.asarray(values).tobytes()
    assert descriptors_in(tmp_path) == 0
    assert is_same(tree, load_pytree(tmp_path, mmap=mmap))
    assert is_same(tree, load_into_pytree(tree, tmp_path, mmap=mmap))


def test_a_shard_that_is_replaced_before_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.checkpoint._KEPT", 1)
    tree = {f"w{i}": jnp.full(10, i, jnp.float32) for i in range(3)}
    save_pytree(tree, tmp_path, max_shard_size=40)
    with open_checkpoint(tmp_path) as store:
        save_pytree(tree, tmp_path, max_shard_size=40)
        assert content_of(store, "@w0") == bytes(40)  # which is open
        with pytest.raises(FileFormatError, match="was replaced while it was read"):
            content_of(store, "@w1")


@pytest.mark.skipif(sys.platform == "win32", reason="a system without locks")
def test_a_lock_ends_with_its_save_whoever_has_the_folder_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, copies = os.open, list[int]()

    def open_twice(*arguments: Any) -> int:  # as a process has that is forked meanwhile
        descriptor = opened(*arguments)
        copies.append(os.dup(descriptor))
        return descriptor

    with monkeypatch.context() as patch, suppress(StopIteration):
        patch.setattr(os, "open", open_twice)
        with locked(str(tmp_path)):
            raise StopIteration
    saver = threading.Thread(target=lambda: save_pytree(tree_of(1), tmp_path, max_shard_size=100))
    saver.start()
    saver.join(30)
    waits = saver.is_alive()
    for copy in copies:
        os.close(copy)
    saver.join()
    assert not waits


# --- huggingface_hub --------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    infos = {f"{i:03}": TensorInfo("U8", (size,), size) for i, size in enumerate(sizes)}
    ordered = {name: infos[name].nbytes for name in in_order(infos)}
    expected = theirs.split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert index_format.split(infos, limit, {}) == list(expected.filename_to_tensors.values())


@pytest.mark.parametrize("size", ["5GB", "1.5MB", "2 TB", "0.5KB"])
def test_sizes_are_those_of_huggingface_hub(size: str) -> None:
    theirs = pytest.importorskip("huggingface_hub.serialization._base")
    assert index_format.parse_size(size) == theirs.parse_size_to_int(size)


def test_what_huggingface_hub_splits_loads(tmp_path: Path) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    tensors = {f"@layers#{i}@w": np.full((5, 5), i, np.float32) for i in range(7)}
    split = theirs.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="0.25KB",
    )
    assert split.is_sharded
    for shard, names in split.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        safetensors.numpy.save_file(part, tmp_path / shard, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (tmp_path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    loaded = load_pytree(tmp_path)
    assert is_same({"layers": [{"w": jnp.full((5, 5), i, jnp.float32)} for i in range(7)]}, loaded)
    # Saved here, the index has the same text, but for the format and for the shards of names.
    save_pytree(loaded, tmp_path / "ours", max_shard_size="0.25KB")
    ours = (tmp_path / "ours" / INDEX).read_text()
    assert ours.replace('    "format": "flax",\n', "") == (tmp_path / INDEX).read_text()


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of a model hub as downloading a file takes."""

    def do_GET(self) -> None:
        self.answer(True)

    def do_HEAD(self) -> None:
        self.answer(False)

    def answer(self, with_content: bool) -> None:
        path = Path(self.directory) / self.path.rpartition("/")[2]
        content = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if path.is_file() else 404)
        if not path.is_file():
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_huggingface_hub_reads_the_folder_and_its_cache_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100, checksum=True)
    handler = functools.partial(Hub, directory=str(tmp_path / "m"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = theirs.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
        found = api.get_safetensors_metadata("somebody/model")
        for name in names_in(tmp_path / "m"):
            path = Path(api.hf_hub_download("somebody/model", name))
        server.shutdown()
    assert found.sharded
    assert found.metadata["total_size"] == 169
    assert found.weight_map == json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert sorted(found.files_metadata) == shard_names(3)
    assert found.files_metadata[shard_names(3)[0]].tensors["@a"].shape == [16]
    assert names_in(path.parent) == [*shard_names(3), INDEX]
    assert path.is_symlink()
    assert is_same(tree_of(1), load_pytree(path.parent))
    assert is_same(tree_of(1), load_pytree(path))


def test_shards_without_an_index_are_told_by_the_path_of_the_save(tmp_path: Path) -> None:
    tree = {"a": np.zeros(9), "b": np.zeros(9)}
    save_pytree(tree, tmp_path / "model.safetensors", max_shard_size=80)
    assert (tmp_path / INDEX).exists()
    (tmp_path / INDEX).unlink()
    for path in (tmp_path, tmp_path / INDEX, tmp_path / "model.safetensors"):
        with pytest.raises(FileFormatError, match="and no index: a save was cut short"):
            load_pytree(path)


def test_what_cannot_be_removed_afterwards_is_an_error_before(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        save_pytree({"a": np.zeros(9), "b": np.zeros(9)}, tmp_path, max_shard_size=80)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_called_like_an_index_is_a_file(tmp_path: Path) -> None:
    save_pytree({"a": 1}, tmp_path / "tree.json")
    assert load_pytree(tmp_path / "tree.json") == {"a": 1}

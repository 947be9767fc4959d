"""Loading a folder of shards: which file a path means, and which folders are refused."""

import errno
import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folders import INDEX, is_same, names_in, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    Pytree2SafetensorsError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._cli.contents import contents
from pytree2safetensors._load import locate, shard_index
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._load.shard_index import Index
from pytree2safetensors._storage import file_source
from pytree2safetensors.testing import pytrees
from versions import posix, replaces_open_files

# --- loading ----------------------------------------------------------------------------------


def load_quietly(path: Path) -> Any:
    """The tree, or the class of the error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAX does not support the dtypes")
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


def test_a_prefix_reads_only_its_shards(tmp_path: Path) -> None:
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


def test_tensors_that_the_index_does_not_place_in_their_shard_are_ignored(tmp_path: Path) -> None:
    tree = {f"w{i}": np.full(10, i, "i4") for i in range(4)}
    save_pytree(tree, tmp_path, max_shard_size=80)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["@w1"]
    first = index["weight_map"]["@w0"]
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / first).read_bytes())
    index["weight_map"]["@w0"] = "copy.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    found = load_pytree(tmp_path)
    assert {name: leaf[0] for name, leaf in found.items()} == {"w0": 0, "w2": 2, "w3": 3}


def test_an_index_may_have_a_byte_order_mark_and_no_metadata(tmp_path: Path) -> None:
    tree = {f"w{i}": np.full(10, i, "i4") for i in range(2)}
    save_pytree(tree, tmp_path, max_shard_size=40)
    index = json.loads((tmp_path / INDEX).read_text())
    text = json.dumps(index | {"metadata": None})
    (tmp_path / INDEX).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_metadata(tmp_path) == {}
    assert len(load_pytree(tmp_path)) == 2


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
        (["config.json"], "has no safetensors file and no index; it has 'config.json'"),
        (
            shard_names(2),
            "has 'model-00001-of-00002.safetensors' but no index: a save was interrupted or is in "
            "progress, or the index was not copied; save or copy the folder again",
        ),
        (
            ["a.safetensors", *shard_names(2)],
            "has 'model-00001-of-00002.safetensors' but no index: a save was interrupted",
        ),
        (
            [".pytree2safetensors-0123456789abcdef.tmp"],
            "has '.pytree2safetensors-0123456789abcdef.tmp' but no index: a save was interrupted",
        ),
        (
            [INDEX, "model.safetensors"],
            f"has '{INDEX}', 'model.safetensors'; pass the path of the one to load",
        ),
        (
            ["a.safetensors.index.json", "model.safetensors"],
            "has 'a.safetensors.index.json', 'model.safetensors'; pass the path of the one to load",
        ),
        (
            ["a.safetensors.index.json", "a.safetensors"],
            "has 'a.safetensors.index.json', 'a.safetensors'; pass the path of the one to load",
        ),
        (
            [f"{stem}.safetensors.index.json" for stem in "abcdefg"],
            "has 'a.safetensors.index.json', 'b.safetensors.index.json', "
            "'c.safetensors.index.json', 'd.safetensors.index.json', 'e.safetensors.index.json' "
            "and 2 more; pass the path of the one to load",
        ),
        *[
            (
                [f"{stem}.safetensors" for stem in "abcdef"[:count]],
                "has 'a.safetensors', 'b.safetensors', 'c.safetensors', 'd.safetensors', "
                f"'e.safetensors'{more}; pass the path of the one to load",
            )
            for count, more in ((5, ""), (6, " and 1 more"))
        ],
        (
            ["weights.bin", "config.json", *"abcd"],
            "has no safetensors file and no index; it has 'a', 'b', 'c', 'config.json', 'd' and 1 more",
        ),
        *[
            (
                [name, "d"],
                "has no safetensors file and no index; Orbax wrote it: restore it with Orbax",
            )
            for name in ("_METADATA", "manifest.ocdbt")
        ],
        (
            ["-00001-of-00002.safetensors"],
            "has '-00001-of-00002.safetensors' but no index: a save was interrupted",
        ),
        (["a.safetensors", "b.safetensors"], "has 'a.safetensors', 'b.safetensors'; pass the path"),
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


@pytest.mark.parametrize(
    ("size", "name"),
    [(100, "model.safetensors"), ("5GB", INDEX), ("5GB", "a.safetensors.index.json")],
)
def test_names_of_folders_are_names_to_choose_from(
    tmp_path: Path, size: int | str, name: str
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=size)
    (tmp_path / name).mkdir()
    with pytest.raises(FileFormatError, match="; pass the path of the one to load"):
        load_pytree(tmp_path)


@pytest.mark.parametrize("variant", ["", "a.b"])
def test_an_index_of_another_name_is_not_an_index(tmp_path: Path, variant: str) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).rename(tmp_path / f"model.safetensors.index.{variant}.json")
    with pytest.raises(FileFormatError, match="but no index"):
        load_pytree(tmp_path)


@pytest.mark.parametrize("stem", ["model", "a"])
def test_a_single_file_beside_shards_without_an_index_loads(tmp_path: Path, stem: str) -> None:
    save_pytree(tree_of(1), tmp_path / f"{stem}.safetensors", max_shard_size="5GB")
    for shard in shard_names(3):
        (tmp_path / shard.replace("model", stem)).write_bytes(b"")
    assert is_same(tree_of(1), load_pytree(tmp_path))


def test_a_missing_index_beside_shards(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileFormatError, match="but no index: a save was interrupted"):
        load_pytree(tmp_path / INDEX)
    with pytest.raises(FileNotFoundError):
        load_pytree(tmp_path / "policy.safetensors.index.json")
    with pytest.raises(FileNotFoundError):
        load_pytree(tmp_path / "none" / INDEX)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_first_shard_without_an_index_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    save_pytree(tree_of(1), tmp_path / "m.safetensors", max_shard_size=100)
    names = sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".json")
    (tmp_path / "m.safetensors.index.json").unlink()
    monkeypatch.setattr(os, "listdir", lambda _: sorted(names, reverse=backwards))
    for path in (tmp_path, tmp_path / "m.safetensors", tmp_path / "m.safetensors.index.json"):
        with pytest.raises(FileFormatError, match=f"has '{names[0]}' but no index"):
            load_pytree(path)


FIRST, SECOND, THIRD = shard_names(3)


def descriptors_in(folder: Path) -> int:
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.is_relative_to(folder) for link in links)


def content_of(store: OpenCheckpoint, name: str) -> bytes:
    with contents(store, [name]) as tensors:
        return b"".join(piece.tobytes() for _, pieces in tensors for piece in pieces)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says what is open")
@pytest.mark.parametrize("mmap", [False, True])
def test_few_shards_are_open_at_once(
    mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.opening._KEPT", 2)
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says what is open")
def test_maps_keep_descriptors_before_python_3_13(tmp_path: Path) -> None:
    tree = {f"w{i}": np.full(10_000, i, np.float32) for i in range(5)}
    save_pytree(tree, tmp_path, max_shard_size=40_000)
    held = list[int]()  # during the load
    loaded = load_pytree(
        tmp_path, mmap=True, progress=lambda *_: held.append(descriptors_in(tmp_path))
    )
    assert descriptors_in(tmp_path) == held[-1] == (5 if sys.version_info < (3, 13) else 0)
    assert is_same(tree, loaded)
    del loaded
    gc.collect()
    assert descriptors_in(tmp_path) == 0


def test_a_load_checks_the_headers_of_shards_that_it_does_not_need(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    with (tmp_path / THIRD).open("ab") as file:
        file.write(b"x")
    with pytest.raises(FileFormatError, match=f"{THIRD}' has bytes after its data"):
        load_pytree(tmp_path, prefix="@a")
    with pytest.raises(FileFormatError, match=f"{THIRD}' has bytes after its data"):
        load_metadata(tmp_path)


@replaces_open_files
def test_a_shard_that_is_replaced_before_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.opening._KEPT", 1)
    tree = {f"w{i}": jnp.full(10, i, jnp.float32) for i in range(3)}
    save_pytree(tree, tmp_path, max_shard_size=40)
    with open_checkpoint(tmp_path) as store:
        save_pytree(tree, tmp_path, max_shard_size=40)
        assert content_of(store, "@w0") == bytes(40)  # which is open
        with pytest.raises(FileFormatError, match="was replaced while it was read"):
            content_of(store, "@w1")


def test_a_file_called_like_an_index_is_a_file(tmp_path: Path) -> None:
    save_pytree({"a": 1}, tmp_path / "tree.json")
    assert load_pytree(tmp_path / "tree.json") == {"a": 1}


# --- what goes wrong with files of the system -------------------------------------------------


def test_a_shard_that_cannot_be_closed_leaves_no_other_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    store = open_checkpoint(tmp_path)
    close, closed = os.close, list[int]()

    def fail_first(descriptor: int) -> None:
        close(descriptor)
        closed.append(descriptor)
        if len(closed) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"), store:
        patch.setattr(os, "close", fail_first)
    assert len(closed) == 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says what is open")
def test_a_folder_loads_with_few_descriptors_left(tmp_path: Path) -> None:
    tree = {f"w{i:02}": jnp.full(10, i, jnp.float32) for i in range(40)}
    save_pytree(tree, tmp_path, max_shard_size=40)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    holes = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while holes[-1] <= used:
            holes.append(os.dup(holes[0]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 12, hard))
        assert is_same(tree, load_pytree(tmp_path))
        if sys.version_info >= (3, 13):  # before that, a map has a descriptor
            assert is_same(tree, load_pytree(tmp_path, mmap=True))
        with open_checkpoint(tmp_path):
            assert descriptors_in(tmp_path) < 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for hole in holes:
            os.close(hole)


def test_a_shard_that_cannot_be_read_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    shards: list[str] = []

    def fail(_: Index, shard: str) -> Any:
        shards.append(shard)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Index, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        load_pytree(tmp_path)
    assert shards == [FIRST]


def test_an_index_that_is_away_for_a_moment_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save sets the old index aside, and the new one is there before the reader looks again."""
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    index, opened = tmp_path / INDEX, os.open
    calls = 0

    def open_too_early(path: Any, *arguments: Any, **options: Any) -> int:
        nonlocal calls
        if os.fspath(path).endswith(INDEX) and not calls:
            calls += 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(index))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_too_early)
    assert is_same(tree_of(1), load_pytree(tmp_path))
    assert calls == 1


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_link_to_nothing_is_a_missing_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("nowhere")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FileNotFoundError) as caught:
            load_pytree(path)
        assert caught.value.filename == str(tmp_path / name)


@replaces_open_files
def test_a_shard_that_is_gone_before_it_is_read_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytree2safetensors._load.opening._KEPT", 1)
    tree = {f"w{i}": jnp.full(10, i, jnp.float32) for i in range(3)}
    save_pytree(tree, tmp_path, max_shard_size=40)
    with open_checkpoint(tmp_path) as store:
        save_pytree(tree, tmp_path, max_shard_size="5GB")
        with pytest.raises(FileFormatError, match="was replaced while it was read; load it again"):
            content_of(store, "@w1")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "model-00001-of-00003.safetensors"])
def test_a_pipe_in_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    if name == "model.safetensors":
        (tmp_path / INDEX).unlink()
    else:
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileFormatError, match=f"{name}' is a pipe or a device, not a regular file"):
        load_pytree(tmp_path)


@posix
@pytest.mark.parametrize("name", [FIRST, THIRD])
def test_a_shard_that_is_there_but_cannot_be_opened_is_not_missing(
    tmp_path: Path, name: str
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)  # a loop
    with pytest.raises(OSError, match=name) as caught:
        load_pytree(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(tmp_path / name))


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, "") for code in (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL)),
        UnicodeEncodeError("ascii", "w\xe9ights", 1, 2, ""),
    ],
    ids=["no such file", "too long", "invalid", "not encodable"],
)
def test_a_shard_whose_name_no_file_can_have_is_missing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    real = file_source.open_source

    def refuse(path: Any, **options: Any) -> Any:
        if Path(path).name == SECOND:
            raise error
        return real(path, **options)

    monkeypatch.setattr(shard_index, "open_source", refuse)
    with pytest.raises(FileFormatError, match=f"names the shard '{SECOND}', which is missing; cop"):
        load_pytree(tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["nothing", "a folder"])
def test_a_shard_that_is_no_file_is_missing(make: Callable[[Path], None], tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    (tmp_path / FIRST).unlink()
    make(tmp_path / FIRST)
    with pytest.raises(FileFormatError, match=f"names the shard '{FIRST}', which is missing; copy"):
        load_pytree(tmp_path)


@pytest.mark.parametrize("then", ["5GB", 100, 40])
def test_a_folder_that_changes_after_it_was_listed_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: int | str
) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100 if then == "5GB" else "5GB")
    saves = [lambda: save_pytree(tree_of(2), tmp_path, max_shard_size=then)]
    located = locate.locate

    def save_meanwhile(path: str) -> str:
        found = located(path)
        if saves:
            saves.pop()()
        return found

    for path in (tmp_path, tmp_path / "model.safetensors"):
        monkeypatch.setattr("pytree2safetensors._load.opening.locate", save_meanwhile)
        assert is_same(tree_of(2), load_pytree(path))


def test_a_listing_that_is_a_mixture_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing is not a snapshot: a file that is renamed in the meantime may be missing or listed twice."""
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    for mixture in ([], shard_names(3), [INDEX, "model.safetensors"]):
        listings = [mixture]
        listdir = os.listdir

        def mixed(path: Any, listings: Any = listings, listdir: Any = listdir) -> Any:
            return listings.pop() if listings else listdir(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", mixed)
            assert is_same(tree_of(1), load_pytree(tmp_path))
        assert not listings


def test_shards_of_another_naming_are_reported(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors-00001-of-00002").write_bytes(b"")
    with pytest.raises(FileFormatError) as caught:
        load_pytree(tmp_path)
    assert str(caught.value) == (
        f"the folder {str(tmp_path)!r} has no safetensors file and no index; "
        "'model.safetensors-00001-of-00002' is not the name of a shard, which has the form "
        "'model-00001-of-00002.safetensors': rename it, or copy the complete folder again"
    )

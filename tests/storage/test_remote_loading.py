"""Loading from URLs: the number of requests, and servers that misbehave."""

import ftplib
import gc
import io
import json
import re
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from upath import UPath

from folders import INDEX, is_same, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._cli.main import main
from pytree2safetensors._load.opening import open_checkpoint
from web_server import Request, WebServer, web_server

MIB = 1 << 20


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as found:
        yield found
    fsspec.filesystem("http").clear_instance_cache()


def large(count: int = 3, size: int = 1 * MIB) -> Any:
    return {f"w{i}": jnp.full(size // 4, i, jnp.float32) for i in range(count)}


def publish(server: WebServer, path: str, folder: Path, tree: Any, **options: Any) -> str:
    """Save a tree, and serve the file or the folder; its URL."""
    save_pytree(tree, folder / "tree", **options)
    saved = folder / "tree"
    for file in [saved] if saved.is_file() else saved.iterdir():
        server.files[path if saved.is_file() else f"{path}/{file.name}"] = file.read_bytes()
    return server.url + path


# --- how much is asked ------------------------------------------------------------------------


def test_one_leaf_takes_four_requests_and_its_own_bytes(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    assert is_same(large()["w1"], load_pytree(url, prefix="@w1"))
    assert [request.method for request in server.requests] == ["HEAD", "GET", "GET", "HEAD"]
    assert [request.sent for request in server.requests] == [0, 100_000, 1 * MIB, 0]


def test_shapes_and_metadata_take_two_requests(server: WebServer, tmp_path: Path) -> None:
    tree = large() | {"step": 7}
    url = publish(server, "/m.safetensors", tmp_path, large(), metadata={"run": "17"})
    assert load_abstract(url)["w0"].shape == (MIB // 4,)
    assert len(server.requests) == 2
    assert load_metadata(url) == {"run": "17"}
    assert len(server.requests) == 4
    url = publish(server, "/scalar.safetensors", tmp_path, tree)
    server.requests.clear()
    assert load_abstract(url)["step"] == 7  # whose value is read, too
    assert len(server.requests) == 4


def test_a_small_file_takes_two_requests(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, tree_of(1))
    assert is_same(tree_of(1), load_pytree(url))
    assert [request.method for request in server.requests] == ["HEAD", "GET"]
    assert server.sent == len(server.files["/m.safetensors"])


def test_a_whole_file_is_asked_for_in_long_ranges_many_at_a_time(
    server: WebServer, tmp_path: Path
) -> None:
    tree = large(6, 16 * MIB) | {"small": jnp.ones(9)}
    url = publish(server, "/m.safetensors", tmp_path, tree)
    server.delay = 0.1
    assert is_same(tree, load_pytree(url))
    assert len(server.requests) < 14
    assert server.most_at_once > 4
    assert server.sent < len(server.files["/m.safetensors"]) + 100_001


def test_many_small_leaves_that_are_neighbors_are_one_range(
    server: WebServer, tmp_path: Path
) -> None:
    tree = {f"{i:05}": np.full(100, i, np.float32) for i in range(3000)}
    url = publish(server, "/m.safetensors", tmp_path, tree)
    assert is_same(tree, load_into_pytree(tree, url))
    assert len(server.requests) < 12


@pytest.mark.parametrize("size", [100, 1024, 8192])
@pytest.mark.parametrize("checksum", [False, True])
def test_leaves_with_short_gaps_between_them_are_one_range(
    size: int, checksum: bool, server: WebServer, tmp_path: Path
) -> None:
    tree = {f"{i:04}": np.full(size, i, np.float32) for i in range(600)}
    url = publish(server, "/m.safetensors", tmp_path, tree, checksum=checksum)
    wanted = dict(list(tree.items())[::2])
    shown: list[tuple[int, int]] = []
    found = load_into_pytree(wanted, url, unexpected="skip", progress=lambda *p: shown.append(p))
    assert is_same(wanted, found)
    assert len(server.requests) < 10
    assert server.sent < len(server.files["/m.safetensors"]) + 200_000
    assert shown[-1] == (300 * size * 4,) * 2
    assert max(done for done, _ in shown) == shown[-1][0]


def test_long_gaps_between_leaves_are_not_read(server: WebServer, tmp_path: Path) -> None:
    tree = {f"{i}": np.full([MIB // 4, 100][i % 2], i, np.float32) for i in range(8)}
    url = publish(server, "/m.safetensors", tmp_path, tree)
    wanted = {name: tree[name] for name in "1357"}
    assert is_same(wanted, load_into_pytree(wanted, url, unexpected="skip"))
    assert server.sent == 100_000 + 4 * 400


def test_a_sharded_template_reads_its_own_ranges(server: WebServer, tmp_path: Path) -> None:
    values = jnp.arange(8 * MIB // 4, dtype=jnp.float32).reshape(8, -1)
    url = publish(server, "/m.safetensors", tmp_path, {"a": values, "b": values})
    mesh = Mesh(np.array(jax.devices()), ("x",))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):  # type: ignore[no-untyped-call]
        server.requests.clear()
        sharding = NamedSharding(mesh, spec)
        wanted = {"a": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}  # type: ignore[no-untyped-call]
        found = load_into_pytree(wanted, url, rename={"@a": "@a"}, strict=False)
        assert is_same({"a": values}, found)
        assert server.sent < 9 * MIB
        assert len(server.requests) < 20


@pytest.mark.parametrize(
    "arguments", [("verify",), ("diff",), ("show", "--json"), ("show", "--all")], ids=" ".join
)
@pytest.mark.parametrize("checksum", [False, True])
def test_the_command_reads_many_small_tensors_at_once(
    arguments: tuple[str, ...], checksum: bool, server: WebServer, tmp_path: Path
) -> None:
    tree = {f"{i:04}": np.full([5, ()][i % 2], i, np.float32) for i in range(2000)}
    url = publish(server, "/m.safetensors", tmp_path, tree, checksum=checksum)
    urls = [url, url] if arguments[0] == "diff" else [url]
    assert main([*arguments, *urls]) == 0
    assert len(server.requests) <= 10 * len(urls)
    assert server.sent < 2 * len(urls) * len(server.files["/m.safetensors"])


def test_the_command_reads_large_tensors_ahead(server: WebServer, tmp_path: Path) -> None:
    tree = large(5, 20 * MIB)
    url = publish(server, "/m.safetensors", tmp_path, tree, checksum=True)
    server.delay = 0.1
    assert main(["verify", url]) == 0
    assert server.most_at_once > 2
    assert len(server.requests) < 16
    assert server.sent < len(server.files["/m.safetensors"]) + 100_001


def test_the_command_reads_no_values_between_which_much_lies(
    server: WebServer, tmp_path: Path
) -> None:
    tree = {f"{i}": np.full([MIB // 4, ()][i % 2], i, np.float32) for i in range(6)}
    url = publish(server, "/m.safetensors", tmp_path, tree)
    assert main(["show", "--json", url]) == 0
    assert server.sent == 100_000 + 3 * 4


@pytest.mark.parametrize("limit", [100, "5GB"])
def test_folders_and_indexes_load(server: WebServer, tmp_path: Path, limit: int | str) -> None:
    url = publish(server, "/run", tmp_path, tree_of(1), max_shard_size=limit)
    paths: list[Any] = [url, url + "/", f"{url}/model.safetensors", UPath(url)]
    for path in [*paths, f"{url}/{INDEX}"] if limit == 100 else paths:
        assert is_same(tree_of(1), load_pytree(path))
        assert is_same(tree_of(1), load_into_pytree(tree_of(2), path))
    server.requests.clear()
    load_pytree(url + "/")
    expected = {f"/run/{name}" for name in [*shard_names(3), INDEX]} if limit == 100 else set()
    assert {request.path for request in server.requests} >= expected


def test_many_shards_are_opened_many_at_a_time(server: WebServer, tmp_path: Path) -> None:
    tree = {f"w{i:02}": jnp.full(10, i, jnp.float32) for i in range(40)}
    url = publish(server, "/run", tmp_path, tree, max_shard_size=40)
    server.delay = 0.05
    opened = 2 + 2 * len(tree) + 1  # requests until the index is found unchanged
    most: list[int] = []

    def note(number: int) -> None:
        if number == opened:
            most.append(server.most_at_once)
            server.most_at_once = 0

    server.before = note
    assert is_same(tree, load_pytree(url + "/"))
    assert len(server.requests) == opened + len(tree)
    assert min(*most, server.most_at_once) > 8  # they are verified many at a time, too


def test_many_shards_keep_little_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytree2safetensors._load.checkpoint._STARTS", 4)
    tree = {f"w{i:02}": jnp.full(10_000, i, jnp.float32) for i in range(40)}
    url = "memory://starts/run"
    save_pytree(tree, url, max_shard_size=40_000)
    with open_checkpoint(url):  # all modules are imported now
        pass
    tracemalloc.start()
    try:
        with open_checkpoint(url):
            gc.collect()
            used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4 * 40_000 < used < 12 * 40_000
    assert is_same(tree, load_pytree(url))


def test_chained_urls_load(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where fsspec keeps what it caches
    url = publish(server, "/m.safetensors", tmp_path, tree_of(1))
    assert is_same(tree_of(1), load_pytree(f"simplecache::{url}"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "tree", "run/model.safetensors")
    for inner in ("run/model.safetensors", "run"):
        assert is_same(tree_of(1), load_pytree(f"zip://{inner}::{tmp_path}/a.zip"))


@pytest.mark.skipif(
    fsspec.__version__ < "2025", reason="this fsspec finds nothing through blockcache"
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec does not close what it maps
def test_a_cache_of_blocks_loads(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = publish(server, "/m.safetensors", tmp_path, tree_of(1))
    assert is_same(tree_of(1), load_pytree(f"blockcache::{url}"))


def test_the_headers_of_a_file_system_are_sent(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    server.key = "secret"
    assert is_same(
        large()["w1"], load_pytree(UPath(url, headers={"X-Key": "secret"}), prefix="@w1")
    )
    with pytest.raises(FileNotFoundError):
        load_pytree(url)


def test_a_server_is_not_asked_to_compress(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    server.compresses = True
    assert is_same(large(), load_pytree(url))


@pytest.mark.parametrize("gone", [True, False])
def test_an_object_that_goes_at_the_end_is_reported(
    server: WebServer, tmp_path: Path, gone: bool
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    server.has_etags = False

    def change(number: int) -> None:
        if number == 3:  # which asks whether it is still the same
            server.files["/m.safetensors"] += b"more"
            if gone:
                server.files.clear()

    server.before = change
    with pytest.raises(FileFormatError, match="was replaced while it was read; load it again"):
        load_pytree(url)


def test_the_command_takes_urls(
    server: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    assert main(["show", url]) == 0
    assert "@w0..2  3 x float32[262144]" in capsys.readouterr().out
    assert len(server.requests) < 4


def test_a_file_that_is_replaced_while_verify_reads_it_is_not_called_damaged(
    server: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large(), checksum=True)

    def replace(number: int) -> None:
        if number == 2:  # when the header was read
            server.files["/m.safetensors"] = bytes(len(server.files["/m.safetensors"]))

    server.before = replace
    assert main(["verify", url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("was replaced while it was read; load it again\n")


# --- what goes wrong --------------------------------------------------------------------------


def test_what_is_missing_is_reported(server: WebServer, tmp_path: Path) -> None:
    for path in ("/m.safetensors", "/run", "/run/", f"/{INDEX}"):
        with pytest.raises(FileNotFoundError) as caught:
            load_pytree(server.url + path)
        assert caught.value.filename == server.url + path
    url = publish(server, "/run", tmp_path, tree_of(1), max_shard_size=100)
    del server.files[f"/run/{shard_names(3)[1]}"]
    with pytest.raises(FileFormatError, match=r"names the shard .* which is missing; copy the"):
        load_pytree(url)


@pytest.mark.parametrize("ranges", ["no", "ignored"])
def test_a_server_without_ranges_is_reported(
    server: WebServer, tmp_path: Path, ranges: str
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    server.has_ranges = ranges
    with pytest.raises(FileFormatError) as caught:
        load_pytree(url, prefix="@w2")
    assert str(caught.value) == (
        f"the server of '{url}' does not support ranges; copy the file, and load the copy"
    )


@pytest.mark.parametrize("etags", ["obeyed", "ignored", "none"])
@pytest.mark.parametrize("size", [1 * MIB, 1 * MIB + 4])
@pytest.mark.parametrize("at", range(1, 5))
def test_an_object_that_changes_in_the_middle_is_never_a_mixture(
    server: WebServer, tmp_path: Path, at: int, size: int, etags: str
) -> None:
    old, new = large(), {name: leaf[: size // 4] + 10 for name, leaf in large(3, 2 * MIB).items()}
    url = publish(server, "/m.safetensors", tmp_path, new)
    changed = server.files["/m.safetensors"]
    publish(server, "/m.safetensors", tmp_path, old)
    server.has_etags, server.obeys_if_match = etags != "none", etags == "obeyed"
    if etags == "none" and size == MIB:
        pytest.skip("nothing tells these two from each other")

    def change(number: int) -> None:
        if number == at:
            server.files["/m.safetensors"] = changed

    server.before = change
    try:
        found = load_pytree(url)
    except FileFormatError as error:
        # Without entity tags, only the size shows it.
        assert "was replaced while it was read" in str(error) or "is truncated" in str(error)
        return
    assert at > 2
    assert is_same(old, found) or is_same(new, found)


def test_a_folder_whose_index_stays_the_same_is_never_a_mixture(
    server: WebServer, tmp_path: Path
) -> None:
    trees = [{name: np.full(9, value, np.float32) for name in "abc"} for value in (1, 2)]
    publish(server, "/run", tmp_path, trees[1], max_shard_size=36)
    newer = dict(server.files)
    url = publish(server, "/run", tmp_path, trees[0], max_shard_size=36)
    older = dict(server.files)
    assert older[f"/run/{INDEX}"] == newer[f"/run/{INDEX}"]
    found = set[str]()
    for at in range(13):

        def change(number: int, at: int = at) -> None:
            server.files.update(newer if number >= at else older)

        server.requests.clear()
        server.before = change
        try:
            loaded = load_pytree(f"{url}/{INDEX}")
        except FileFormatError as error:
            assert "was replaced while it was read" in str(error)
            found.add("error")
        else:
            assert is_same(trees[0], loaded) or is_same(trees[1], loaded), "a mixture"
            found.add("old" if is_same(trees[0], loaded) else "new")
    assert found == {"error", "old", "new"}


def test_a_server_that_refuses_head_is_read_and_asked_again(
    server: WebServer, tmp_path: Path
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    server.has_head = False
    assert is_same(large()["w1"], load_pytree(url, prefix="@w1"))
    asked = [request.method for request in server.requests]
    assert asked == ["HEAD", "GET", "GET", "GET", "HEAD", "GET"]


@pytest.mark.parametrize("name", ["m.safetensors", "run/" + INDEX])
def test_a_server_that_fails_at_the_end_does_not_mean_that_a_file_was_replaced(
    server: WebServer, tmp_path: Path, name: str
) -> None:
    publish(server, "/m.safetensors", tmp_path, large())
    publish(server, "/run", tmp_path / "folder", large(2, 36), max_shard_size=36)
    last = 3 if name == "m.safetensors" else 6

    def fail(number: int) -> None:
        if number >= last:
            server.key, server.refusal = "unknown", 503

    server.before = fail
    with pytest.raises(OSError, match="the server answers 503") as caught:
        load_pytree(f"{server.url}/{name}")
    assert caught.value.filename == f"{server.url}/{name}"
    assert len(server.requests) == last + 2  # the last with HEAD and with GET


def test_an_index_that_changes_is_read_again(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/run", tmp_path, tree_of(2), max_shard_size=100)
    newer = dict(server.files)
    publish(server, "/run", tmp_path, tree_of(1), max_shard_size=100)

    def change(number: int) -> None:
        if number == 4:
            server.files.update(newer)

    server.before = change
    assert is_same(tree_of(2), load_pytree(f"{url}/{INDEX}"))


def test_a_connection_that_is_dropped_is_the_stores_own_error(
    server: WebServer, tmp_path: Path
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())

    def drop(number: int) -> None:
        if number >= 2:
            raise ConnectionError

    server.before = drop
    with pytest.raises(OSError, match=re.escape(url)):
        load_pytree(url)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, FileNotFoundError, "[Errno 2] No such file or directory"),
        (410, FileNotFoundError, "[Errno 2] No such file or directory (the server answers 410)"),
        (401, PermissionError, "[Errno 13] the server answers 401"),
        (403, PermissionError, "[Errno 13] the server answers 403"),
        (429, OSError, "[Errno 5] the server answers 429"),
        (500, OSError, "[Errno 5] the server answers 500"),
        (503, OSError, "[Errno 5] the server answers 503"),
    ],
)
@pytest.mark.parametrize("name", ["m.safetensors", "run", "run/" + INDEX])
def test_the_error_says_why_a_server_does_not_give_a_file(
    server: WebServer, name: str, status: int, kind: type[OSError], text: str
) -> None:
    server.refusal = status
    url = f"{server.url}/{name}"
    with pytest.raises(OSError, match="Errno") as caught:
        load_pytree(f"{url}?X-Signature=abcdef")
    assert type(caught.value) is kind
    assert str(caught.value) == f"{text}: '{url}?...'"
    if kind is OSError:  # no other name is tried
        assert {request.path.partition("?")[0] for request in server.requests} == {f"/{name}"}


def test_a_folder_loads_from_a_server_that_refuses_what_is_missing(
    server: WebServer, tmp_path: Path
) -> None:
    server.refusal = 403  # as S3 without the permission to list objects
    url = publish(server, "/run", tmp_path, tree_of(1), max_shard_size=100)
    assert is_same(tree_of(1), load_pytree(url))
    name = shard_names(3)[1]
    del server.files[f"/run/{name}"]
    with pytest.raises(PermissionError) as caught:
        load_pytree(url + "/")
    assert caught.value.filename == f"{url}/{name}"


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_a_missing_file_is_missing_if_the_server_refuses_other_names(
    server: WebServer, name: str
) -> None:
    url = f"{server.url}/{name}"  # as a presigned URL, whose signature is for this name only

    def refuse(number: int) -> None:
        server.refusal = 404 if server.requests[number].path == f"/{name}" else 403

    server.before = refuse
    with pytest.raises(FileNotFoundError) as caught:
        load_pytree(url)
    assert caught.value.filename == url
    with pytest.raises(PermissionError):
        load_pytree(f"{server.url}/run/")


def test_the_error_says_that_a_server_cannot_be_reached() -> None:
    with pytest.raises(ConnectionError, match=r"Cannot connect to host 127\.0\.0\.1:9 ") as caught:
        load_pytree("http://127.0.0.1:9/m.safetensors")
    assert caught.value.filename == "http://127.0.0.1:9/m.safetensors"


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        (TimeoutError(), TimeoutError, "TimeoutError"),
        (ftplib.error_temp("421 too many"), OSError, "421 too many"),
        (ftplib.error_perm("550 none"), FileNotFoundError, "No such file or directory (550 none)"),
        (KeyError("m"), FileNotFoundError, "No such file or directory ('m')"),
        (None, FileNotFoundError, "No such file or directory"),
    ],
)
def test_an_outage_of_a_store_is_not_a_missing_file(
    misbehaving: "type[Misbehaving]",
    monkeypatch: pytest.MonkeyPatch,
    cause: Exception | None,
    kind: type[OSError],
    text: str,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("m") from cause

    monkeypatch.setattr(misbehaving, "ls", fail)
    monkeypatch.setattr(misbehaving, "info", fail)
    monkeypatch.setattr(misbehaving, "_open", fail)
    for name in ("m.safetensors", "m"):
        with pytest.raises(OSError, match="Errno") as caught:
            load_pytree(f"misbehaving://{name}")
        assert type(caught.value) is kind
        assert (caught.value.strerror, caught.value.filename) == (text, f"misbehaving://{name}")


def test_no_message_shows_credentials(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    secret = f"{url.replace('//', '//user:hunter2@')}?X-Signature=abcdef"

    def refuse(number: int) -> None:
        raise ConnectionError

    for before, load in (
        (refuse, load_pytree),
        (lambda _: None, lambda path: load_pytree(path, prefix="@none")),
        (lambda _: None, lambda path: load_pytree(path, mmap=True)),
        (lambda _: None, lambda path: load_pytree(path.replace("/m.", "/gone."))),
        (lambda _: None, lambda path: save_pytree({"a": 1.5}, path)),
    ):
        server.before = before
        with pytest.raises((OSError, ValueError)) as caught:
            load(secret)
        chain: BaseException | None = caught.value
        while chain is not None:
            assert "hunter2" not in str(chain)
            assert "abcdef" not in str(chain)
            chain = None if chain.__suppress_context__ else chain.__context__ or chain.__cause__


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("words", ["show", "diff", "verify", "show --template math:pi"])
@pytest.mark.parametrize("name", ["m.safetensors", "bad.safetensors", "gone.safetensors"])
def test_the_command_shows_no_credentials(
    server: WebServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    name: str,
    as_json: bool,
) -> None:
    publish(server, "/m.safetensors", tmp_path, large(1))
    publish(server, "/other.safetensors", tmp_path, large(2))
    server.files["/bad.safetensors"] = b"more than eight bytes"
    secret = server.url.replace("//", "//user:hunter2@")
    files = [f"{secret}/{name}?X-Signature=abcdef"]
    if words == "diff":
        files += [f"{secret}/other.safetensors?X-Signature=abcdef"]
    main([*words.split(), *files, *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert name in out + err
    assert "hunter2" not in out + err
    assert "abcdef" not in out + err


def test_a_url_cannot_be_mapped(server: WebServer, tmp_path: Path) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    with pytest.raises(ValueError, match=f"mmap=True maps a file on disk; load '{url}' without"):
        load_pytree(url, mmap=True)
    assert server.requests == []


def test_a_request_is_recorded(server: WebServer) -> None:
    server.files["/x"] = b"1234"
    assert fsspec.filesystem("http").cat_file(server.url + "/x", 1, 3) == b"23"
    assert server.requests == [Request("GET", "/x", 2)]


class OneAtATime(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """A file system with one connection, as those of SFTP and FTP."""

    protocol = "onebyone"
    contents: ClassVar[dict[str, bytes]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[None]:
        assert self.busy.acquire(blocking=False), "two requests at once"
        try:
            time.sleep(0.01)
            yield
        finally:
            self.busy.release()

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        with self.connection():
            if path not in self.contents:
                raise FileNotFoundError(path)
            return {"name": path, "size": len(self.contents[path]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        file = io.BytesIO(self.contents[path])
        file.close = self.close  # type: ignore[method-assign] # which is a request, too
        return file

    def close(self) -> None:
        with self.connection():
            pass

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        with self.connection():
            return self.contents[path][start:end]


def test_a_file_system_with_one_connection_is_asked_one_thing_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("onebyone", OneAtATime, clobber=True)
    monkeypatch.setattr(OneAtATime, "contents", {})
    tree = large(20, 2 * MIB)
    save_pytree(tree, tmp_path / "run", max_shard_size="4MB")
    for file in (tmp_path / "run").iterdir():
        OneAtATime.contents[f"run/{file.name}"] = file.read_bytes()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(load_pytree, [f"onebyone://run/{INDEX}"] * 2):
            assert is_same(tree, found)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (AttributeError("is retired"), ValueError, "cannot be opened with fsspec: is retired"),
        (ConnectionRefusedError("no"), ConnectionRefusedError, ": ConnectionRefusedError: no"),
        (KeyError("login"), OSError, ": KeyError: 'login'"),
    ],
)
def test_the_error_for_a_file_system_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], text: str
) -> None:
    class Unreachable(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
        protocol = "unreachable"
        cachable = False

        def __init__(self, **_: Any) -> None:
            raise error

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(kind) as caught:
        load_pytree("unreachable://host/m")
    assert str(caught.value) == f"'unreachable://host/m'{' ' * (kind is ValueError)}{text}"


class Misbehaving(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """A file system with one file, whose ranges lack their last bytes or cannot be read."""

    protocol = "misbehaving"
    content = b""
    lacks = 0
    error: Exception | None = None

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.content), "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return [self.info(path)] if detail else [path]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return io.BytesIO(self.content)

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        if self.error is not None:
            raise self.error
        return self.content[start : end - self.lacks]


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Misbehaving]:
    fsspec.register_implementation("misbehaving", Misbehaving, clobber=True)
    save_pytree(tree_of(1), tmp_path / "file")
    monkeypatch.setattr(Misbehaving, "content", (tmp_path / "file").read_bytes())
    return Misbehaving


def opened_by(store: type[Misbehaving], monkeypatch: pytest.MonkeyPatch) -> list[io.BytesIO]:
    """The files that the store opens from now on."""
    opened: list[io.BytesIO] = []

    def opening(*_: Any, **__: Any) -> io.BytesIO:
        opened.append(io.BytesIO(store.content))
        return opened[-1]

    monkeypatch.setattr(store, "_open", opening)
    return opened


def test_a_range_that_is_too_short_is_reported(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_same(tree_of(1), load_pytree("misbehaving://m"))
    monkeypatch.setattr(misbehaving, "lacks", 3)
    size = len(misbehaving.content)
    with pytest.raises(FileFormatError) as caught:
        load_pytree("misbehaving://m")
    assert str(caught.value) == (
        f"'misbehaving://m' gave {size - 3:,} bytes for a range of {size:,}: it was replaced while it "
        "was read, or its server does not support ranges; load it again, or load a copy"
    )


def test_a_file_system_that_reports_no_size_is_an_error(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As filecache:: in front of a web server that lists its files.
    monkeypatch.setattr(misbehaving, "info", lambda _, path: {"name": path, "size": None})
    with pytest.raises(FileFormatError, match="the server of 'misbehaving://m' does not report"):
        load_pytree("misbehaving://m")


def test_a_file_that_can_only_not_be_read_is_not_called_damaged(
    server: WebServer,
    misbehaving: type[Misbehaving],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error_of(url: str) -> Any:
        assert main(["verify", "--json", url]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"file", "error"}
        return found["error"]

    with monkeypatch.context() as patch:
        patch.setattr(misbehaving, "info", lambda _, path: {"name": path, "size": None})
        assert "does not report its size" in error_of("misbehaving://m")
    monkeypatch.setattr(misbehaving, "lacks", 3)
    assert f"bytes for a range of {len(misbehaving.content):,}: " in error_of("misbehaving://m")
    url = publish(server, "/m.safetensors", tmp_path, {"w": np.zeros(1 << 20, np.int8)})
    server.has_ranges = "no"
    assert "does not support ranges" in error_of(url)
    server.has_ranges = "yes"

    def replace(number: int) -> None:
        if server.requests[number].method == "GET":
            server.files["/m.safetensors"] += b"more"

    server.before = replace
    assert "was replaced while it was read" in error_of(url)


def test_a_file_that_is_damaged_is_called_so_in_a_store_that_refuses_to_list_it(
    misbehaving: type[Misbehaving],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(misbehaving, "ls", refuse)
    monkeypatch.setattr(misbehaving, "content", misbehaving.content[:-1])
    assert main(["verify", "misbehaving://m"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("misbehaving://m: damaged\nproblem   'misbehaving://m' is truncated")
    assert err.startswith("pytree2safetensors: misbehaving://m is damaged: ")


def test_a_file_system_that_takes_no_type_of_cache_loads(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(
        self: Misbehaving,
        path: str,
        mode: str,
        block_size: Any,
        autocommit: Any,
        cache_options: Any,
    ) -> Any:  # as that of SMB
        return io.BytesIO(self.content)

    monkeypatch.setattr(misbehaving, "_open", opened)
    assert is_same(tree_of(1), load_pytree("misbehaving://m"))


def test_a_file_loads_from_a_store_that_refuses_to_list_it(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(misbehaving, "ls", refuse)
    assert is_same(tree_of(1), load_pytree("misbehaving://m"))
    info = misbehaving.info

    def only_in_folder(self: Misbehaving, path: str) -> Any:
        return info(self, path) if path == "m/model.safetensors" else refuse()

    monkeypatch.setattr(misbehaving, "info", only_in_folder)
    monkeypatch.setattr(
        misbehaving, "_open", lambda self, path, **_: self.info(path) and io.BytesIO()
    )
    assert is_same(tree_of(1), load_pytree("misbehaving://m"))
    monkeypatch.setattr(misbehaving, "info", refuse)
    with pytest.raises(PermissionError, match="'misbehaving://m': PermissionError: Access Denied"):
        load_pytree("misbehaving://m")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
@pytest.mark.parametrize("size", [0, None])
def test_a_folder_of_a_store_is_not_an_empty_file(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch, name: str, size: int | None
) -> None:
    info = {"size": size, "type": "directory"}  # as of the name of an empty object "m/" on S3
    monkeypatch.setattr(misbehaving, "info", lambda _, path: info | {"name": path})
    opened = opened_by(misbehaving, monkeypatch)
    with pytest.raises(IsADirectoryError) as caught:
        load_pytree(f"misbehaving://{name}")
    assert str(caught.value) == f"[Errno 21] Is a directory: 'misbehaving://{name}'"
    assert opened
    assert all(file.closed for file in opened)


@pytest.mark.parametrize("info", [{}, {"size": None}, OSError("no answer")])
def test_a_file_that_cannot_be_loaded_is_closed(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch, info: Any
) -> None:
    def inform(_: Any, path: str) -> Any:
        if isinstance(info, Exception):
            raise info
        return info

    monkeypatch.setattr(misbehaving, "info", inform)
    opened = opened_by(misbehaving, monkeypatch)
    with pytest.raises((FileFormatError, OSError), match=r"does not report its size|no answer"):
        load_pytree("misbehaving://m.safetensors")
    assert opened
    assert all(file.closed for file in opened)


def test_an_error_that_names_the_url_stays_as_it_is(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = KeyError("misbehaving://m is elsewhere")
    monkeypatch.setattr(misbehaving, "error", error)
    with pytest.raises(KeyError) as caught:
        load_pytree("misbehaving://m")
    assert caught.value is error


@pytest.mark.parametrize(
    "key",
    [
        *("ETag", "Content-MD5", "Digest", "Last-Modified"),  # of web servers
        *("LastModified", "VersionId"),  # S3
        *("generation", "updated", "md5Hash"),  # Google
        *("etag", "last_modified", "version_id"),  # Azure
        *("blob_id", "xet_hash"),  # the Hub
        *("mtime", "modify", "unique", "modificationTime"),  # SFTP, SMB, FTP, WebHDFS
        *("modified", "created"),  # WebDAV, memory
        *("server_modified", "content_hash", "rev"),  # Dropbox
        *("modified_at", "modifiedTime", "timeModified"),  # Box, Google Drive, Oracle
        *("checksum", "md5", "e_tag"),  # lakeFS, Oracle, obstore
        *("sha", "hex", "raw_url"),  # GitHub, git, gists
    ],
)
def test_every_store_says_that_a_file_was_replaced(
    misbehaving: type[Misbehaving], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str
) -> None:
    save_pytree(large(1), tmp_path / "large")
    monkeypatch.setattr(misbehaving, "content", (tmp_path / "large").read_bytes())
    info = misbehaving.info
    versions: list[Any] = []

    def versioned(self: Misbehaving, path: str) -> dict[str, Any]:
        return info(self, path) | {key: versions.pop(0), "time": versions}

    monkeypatch.setattr(misbehaving, "info", versioned)
    for same in ([7, 7], [None, 7]):  # the latter says more than the first time
        versions[:] = same
        assert is_same(large(1), load_pytree("misbehaving://m"))
        assert versions == []
    versions[:] = [7, 8]
    with pytest.raises(FileFormatError, match="was replaced while it was read; load it again"):
        load_pytree("misbehaving://m")


def test_a_file_in_memory_that_is_saved_again_is_not_a_mixture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, read = "memory://mixed.safetensors", MemoryFileSystem.cat_file
    save_pytree(large(1), url)
    newer: list[Any] = [{"w0": large(2)["w1"]}]

    def save_between(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
        content: bytes = read(self, path, **options)
        if newer and options["end"] == 100_000:
            save_pytree(newer.pop(), url)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", save_between)
    with pytest.raises(FileFormatError, match="was replaced while it was read; load it again"):
        load_pytree(url)
    assert is_same({"w0": large(2)["w1"]}, load_pytree(url))
    fsspec.filesystem("memory").rm_file("mixed.safetensors")


def test_what_a_store_remembered_before_a_load_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path / "file")
    store, info = fsspec.filesystem("memory"), MemoryFileSystem.info
    path = "/later.safetensors"
    store.pipe_file(path, (tmp_path / "file").read_bytes())
    missing = {path}  # as a listing from before the file was written says

    def remembered(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        if path in missing:
            raise FileNotFoundError(path)
        return info(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", remembered)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: missing.clear())
    with pytest.raises(FileNotFoundError):
        store.info(path)
    assert is_same(tree_of(1), load_pytree(f"memory:/{path}"))
    store.rm_file(path)


def test_an_empty_object_is_no_safetensors_file(server: WebServer) -> None:
    server.files["/m.safetensors"] = b""
    with pytest.raises(FileFormatError, match="has 0 bytes and is no"):
        load_pytree(f"{server.url}/m.safetensors")


def test_a_server_that_reports_no_size_is_an_error(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(server, "/m.safetensors", tmp_path, large())
    files = fsspec.filesystem("http")  # the instance that a load finds
    monkeypatch.setattr(files, "info", lambda _: {"name": url, "size": None, "type": "file"})
    with pytest.raises(FileFormatError) as caught:
        load_pytree(url)
    assert str(caught.value) == (
        f"the server of '{url}' does not report its size; copy the file, and load the copy"
    )


def test_a_store_without_listings_is_explained() -> None:
    class Unlisted(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
        protocol = "unlisted"

        def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
            raise NotImplementedError

    fsspec.register_implementation("unlisted", Unlisted, clobber=True)
    with pytest.raises(ValueError, match="'unlisted://run' is in a store that lists no folders; "):
        load_pytree("unlisted://run")

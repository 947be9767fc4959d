"""A real S3 server on this machine, through s3fs; `tox -e remote` installs both."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from folders import INDEX, is_same, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_pytree,
    save_pytree,
)

s3fs = pytest.importorskip("s3fs", reason="tox -e remote installs it")
moto_server = pytest.importorskip("moto.server", reason="tox -e remote installs it")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

MIB = 1 << 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def calls(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A bucket, and the requests that are made of it from then on."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)
    monkeypatch.setitem(__import__("fsspec.config").config.conf, "s3", {"endpoint_url": endpoint})
    s3fs.S3FileSystem().mkdir("bucket")
    counted: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def recorded(self: Any, method: str, *args: Any, **options: Any) -> Any:
        counted[method] += 1
        return await call(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    yield counted
    s3fs.S3FileSystem().rm("bucket", recursive=True)


def large() -> Any:
    return {f"w{i}": jnp.full(3 * MIB, i, jnp.float32) for i in range(2)}


def test_a_tree_goes_to_s3_and_back(calls: Counter[str], tmp_path: Path) -> None:
    trees: list[Any] = [tree_of(1), large(), {}]
    for tree in trees:
        save_pytree(tree, "s3://bucket/m.safetensors", metadata={"run": "17"})
        save_pytree(tree, tmp_path / "m", metadata={"run": "17"})
        content = s3fs.S3FileSystem().cat_file("bucket/m.safetensors")
        assert content == (tmp_path / "m").read_bytes()
        assert is_same(tree, load_pytree("s3://bucket/m.safetensors"))


def test_one_leaf_takes_three_requests(calls: Counter[str]) -> None:
    save_pytree(large(), "s3://bucket/m.safetensors")
    calls.clear()
    assert is_same(large()["w1"], load_pytree("s3://bucket/m.safetensors", prefix="@w1"))
    assert calls == {"head_object": 1, "get_object": 2}
    calls.clear()
    assert load_abstract("s3://bucket/m.safetensors")["w0"].shape == (3 * MIB,)
    assert calls == {"head_object": 1, "get_object": 1}


@pytest.mark.parametrize("checksum", [False, True])
def test_a_later_folder_replaces_an_earlier_one(calls: Counter[str], checksum: bool) -> None:
    fs = s3fs.S3FileSystem()
    limits: list[int | str] = [100, 40, "5GB", 100, 100]
    for seed, limit in enumerate(limits):
        save_pytree(tree_of(seed), "s3://bucket/run", max_shard_size=limit, checksum=checksum)
        fs.invalidate_cache()
        names = {name.rpartition("/")[2] for name in fs.ls("bucket/run", detail=False)}
        count = {100: 3, 40: 4, "5GB": 0}[limit]
        assert names == ({*shard_names(count), INDEX} if count else {"model.safetensors"})
        for path in ("s3://bucket/run", "s3://bucket/run/model.safetensors"):
            assert is_same(tree_of(seed), load_pytree(path))
            assert is_same(tree_of(seed), load_into_pytree(tree_of(9), path))


def test_a_save_that_fails_leaves_the_old_object_and_no_upload(calls: Counter[str]) -> None:
    url = "s3://bucket/m.safetensors"
    for tree in (large(), tree_of(2)):
        save_pytree(tree_of(1), url)

        def fail(done: int, total: int) -> None:
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            save_pytree(tree, url, progress=fail)
        assert is_same(tree_of(1), load_pytree(url))
    uploads = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket="bucket")
    assert not uploads.get("Uploads")


def test_an_object_that_changes_in_the_middle_is_an_error(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://bucket/m.safetensors"
    save_pytree({name: leaf + 1 for name, leaf in large().items()}, url)
    fs = s3fs.S3FileSystem()
    newer = fs.cat_file("bucket/m.safetensors")
    save_pytree(large(), url)
    call, asked = s3fs.S3FileSystem._call_s3, 0

    async def change(self: Any, method: str, *args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += method == "get_object"
        if asked == 2:
            await call(self, "put_object", Bucket="bucket", Key="m.safetensors", Body=newer)
        return await call(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", change)
    with pytest.raises(FileFormatError, match="was replaced while it was read; load it again"):
        load_pytree(url)


def test_a_load_finds_what_another_program_saved_since(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", True)
    save_pytree(tree_of(2), tmp_path / "newer")
    newer = (tmp_path / "newer").read_bytes()
    save_pytree(tree_of(1), "s3://bucket/run/a.safetensors")
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    s3fs.S3FileSystem().ls("bucket/run")  # whose listing fsspec keeps
    other.copy("bucket/run/a.safetensors", "bucket/run/c.safetensors")
    assert is_same(tree_of(1), load_pytree("s3://bucket/run/c.safetensors"))
    s3fs.S3FileSystem().ls("bucket/run", refresh=True)
    other.pipe_file("bucket/run/c.safetensors", newer)
    calls.clear()
    assert is_same(tree_of(2), load_pytree("s3://bucket/run/c.safetensors"))
    assert calls == {"head_object": 1, "get_object": 1}
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_folder_is_not_an_empty_file(calls: Counter[str]) -> None:
    s3fs.S3FileSystem().pipe_file("bucket/run/", b"")  # as the console of AWS makes folders
    save_pytree(tree_of(1), "s3://bucket/run.safetensors/m.safetensors")
    for url in ("s3://bucket/run", "s3://bucket/run/", "s3://bucket/run.safetensors"):
        with pytest.raises(IsADirectoryError) as caught:
            load_pytree(url)
        assert caught.value.filename == url


def test_what_is_missing_is_reported(calls: Counter[str]) -> None:
    for url in ("s3://bucket/none.safetensors", "s3://bucket/none", "s3://nowhere/none"):
        with pytest.raises(FileNotFoundError) as caught:
            load_pytree(url)
        assert caught.value.filename == url
    with pytest.raises(OSError, match="s3://nowhere/m"):
        save_pytree({"a": np.zeros(9)}, "s3://nowhere/m")

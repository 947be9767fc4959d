"""Servers of other stores on this machine, through fsspec; `tox -e remote` installs them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax.numpy as jnp
import pytest

from folders import INDEX, is_same, shard_names, tree_of
from pytree2safetensors import load_abstract, load_into_pytree, load_pytree, save_pytree
from store_servers import STORES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder of a store."""
    (tmp_path / "store").mkdir()
    with STORES[request.param](tmp_path / "store") as found:
        yield found


def names_in(url: str) -> set[str]:
    fs, path = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)}


def large() -> Any:
    return {
        f"w{i}": jnp.full(3 << 18, i, jnp.float32) for i in range(2)
    }  # more than a block of a store


def test_a_tree_goes_to_a_store_and_back(url: str, tmp_path: Path) -> None:
    trees: list[Any] = [tree_of(1), large(), {}]
    for tree in trees:
        save_pytree(tree, f"{url}/m", metadata={"run": "17"})
        save_pytree(tree, tmp_path / "m", metadata={"run": "17"})
        fs, path = fsspec.url_to_fs(f"{url}/m")
        assert fs.cat_file(path) == (tmp_path / "m").read_bytes()
        assert is_same(tree, load_pytree(f"{url}/m"))
        assert names_in(url) == {"m"}
    save_pytree(large(), f"{url}/m")
    assert is_same(large()["w1"], load_pytree(f"{url}/m", prefix="@w1"))
    assert load_abstract(f"{url}/m")["w0"].shape == (3 << 18,)


@pytest.mark.parametrize("checksum", [False, True])
def test_a_later_folder_replaces_an_earlier_one(url: str, checksum: bool) -> None:
    limits: list[int | str] = [100, 40, "5GB", 100, 100]
    for seed, limit in enumerate(limits):
        save_pytree(tree_of(seed), f"{url}/run", max_shard_size=limit, checksum=checksum)
        count = {100: 3, 40: 4, "5GB": 0}[limit]
        expected = {*shard_names(count), INDEX} if count else {"model.safetensors"}
        assert names_in(f"{url}/run") == expected
        for path in (f"{url}/run", f"{url}/run/model.safetensors"):
            assert is_same(tree_of(seed), load_pytree(path))
            assert is_same(tree_of(seed), load_into_pytree(tree_of(9), path))


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_save_that_fails_leaves_the_old_object(url: str, at: str) -> None:
    for tree in (large(), tree_of(2)):
        save_pytree(tree_of(1), f"{url}/m")

        def fail(done: int, total: int) -> None:
            if at == "first" or done == total:
                raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            save_pytree(tree, f"{url}/m", progress=fail)
        assert is_same(tree_of(1), load_pytree(f"{url}/m"))
        assert names_in(url) == {"m"}


def test_the_error_for_a_missing_file(url: str) -> None:
    save_pytree(tree_of(1), f"{url}/other")
    for name in ("none.safetensors", "none"):
        with pytest.raises(FileNotFoundError) as caught:
            load_pytree(f"{url}/{name}")
        assert caught.value.filename.endswith(f"/folder/{name}")
        assert "secret" not in str(caught.value)


def test_the_error_for_a_wrong_password_hides_it(url: str) -> None:
    if "secret" not in url:
        pytest.skip("it logs in otherwise")
    with pytest.raises(OSError, match=r"ftp://\.\.\.@127\.0\.0\.1:\d+/.*/?m': ") as caught:
        load_pytree(url.replace("secret", "hunter2") + "/m")
    assert "hunter2" not in str(caught.value)

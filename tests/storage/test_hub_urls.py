"""URLs of the Hugging Face Hub, with the client of huggingface_hub and a simulated server."""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from folders import INDEX, is_same, shard_names, tree_of
from hub_server import REPOSITORY, HubServer, hub_server
from pytree2safetensors import load_abstract, load_pytree, save_pytree

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import HfFileSystem

    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


URL = f"hf://{REPOSITORY}"


def test_a_file_of_the_hub_loads_in_ranges(hub: HubServer, tmp_path: Path) -> None:
    tree = {f"w{i}": jnp.full(1 << 18, i, jnp.float32) for i in range(3)}
    save_pytree(tree, tmp_path / "m")
    hub.files["m.safetensors"] = (tmp_path / "m").read_bytes()
    assert is_same(tree, load_pytree(f"{URL}/m.safetensors"))
    hub.requests.clear()
    assert is_same(tree["w1"], load_pytree(f"{URL}/m.safetensors", prefix="@w1"))
    assert sum("resolve" in request for request in hub.requests) == 2
    assert len(hub.requests) == 6  # each time, two are for the repository and its list of files
    hub.requests.clear()
    assert load_abstract(f"{URL}/m.safetensors")["w0"].shape == (1 << 18,)
    assert len(hub.requests) == 3
    assert load_abstract(f"{URL}@main/m.safetensors")["w0"].shape == (1 << 18,)


@pytest.mark.parametrize("limit", [100, "5GB"])
def test_a_folder_of_the_hub_loads(hub: HubServer, tmp_path: Path, limit: int | str) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=limit)
    for file in tmp_path.iterdir():
        hub.files[file.name] = file.read_bytes()
    assert is_same(tree_of(1), load_pytree(URL))
    assert is_same(tree_of(1), load_pytree(f"{URL}/model.safetensors"))


def test_a_tree_is_committed_to_the_hub(hub: HubServer, tmp_path: Path) -> None:
    save_pytree(tree_of(1), f"{URL}/m.safetensors")
    save_pytree(tree_of(1), tmp_path / "m")
    assert hub.files == {"m.safetensors": (tmp_path / "m").read_bytes()}
    assert is_same(tree_of(1), load_pytree(f"{URL}/m.safetensors"))


def test_a_folder_is_committed_to_the_hub(hub: HubServer) -> None:
    for seed, limit in ((1, 100), (2, 100), (3, "5GB"), (4, 40)):
        save_pytree(tree_of(seed), URL, max_shard_size=limit)
        count = {100: 3, 40: 4, "5GB": 0}[limit]
        assert set(hub.files) == ({*shard_names(count), INDEX} if count else {"model.safetensors"})
        assert is_same(tree_of(seed), load_pytree(URL))


@pytest.mark.parametrize("at", ["first", "last", "commit"])
def test_a_save_that_fails_commits_nothing_and_leaves_no_local_file(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    save_pytree(tree_of(1), f"{URL}/m.safetensors")
    before = dict(hub.files)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(done: int, total: int) -> None:
        if at == "first" or (at == "last" and done == total):
            raise OSError("no more")

    hub.commits = False
    large = {"w": jnp.full(3 << 20, 1, jnp.float32)}  # more than is collected in memory
    for tree in tree_of(2), large:
        with pytest.raises(OSError, match="no more" if at != "commit" else "m.safetensors"):
            save_pytree(tree, f"{URL}/m.safetensors", progress=fail)
        assert hub.files == before
        assert not [*tmp_path.iterdir()]


def test_what_is_missing_is_reported(hub: HubServer) -> None:
    hub.files["other"] = b""
    with pytest.raises(FileNotFoundError) as caught:
        load_pytree(f"{URL}/m.safetensors")
    assert caught.value.filename == f"{URL}/m.safetensors"


def test_a_load_finds_what_another_program_committed_since(hub: HubServer, tmp_path: Path) -> None:
    def commit(name: str, seed: int, size: int = 9) -> None:
        save_pytree({"a": jnp.full(size, seed, jnp.float32)}, tmp_path / "m")
        hub.files[name] = (tmp_path / "m").read_bytes()

    commit("1.safetensors", 1)
    load_pytree(URL)  # fsspec keeps the list of the files
    commit("2.safetensors", 2)
    commit("1.safetensors", 3, size=99)
    for name, expected in (("2", jnp.full(9, 2.0)), ("1", jnp.full(99, 3.0))):
        assert is_same({"a": expected}, load_pytree(f"{URL}/{name}.safetensors"))

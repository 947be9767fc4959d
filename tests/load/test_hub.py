"""Folders of shards and huggingface_hub, in both directions."""

import functools
import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folders import INDEX, is_same, names_in, shard_names, tree_of
from pytree2safetensors import Rule, load_into_pytree, load_pytree, save_pytree

P: Any = PartitionSpec  # JAX gives its constructor no types
STRUCT: Any = jax.ShapeDtypeStruct


def split_by(theirs: Any, tensors: dict[str, Any], folder: Path) -> None:
    """Save tensors in a folder of shards, as the hub's library divides them."""
    split = theirs.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="0.25KB",
    )
    assert split.is_sharded
    for shard, names in split.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        safetensors.numpy.save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def test_what_huggingface_hub_splits_loads_by_rules_and_is_exported(tmp_path: Path) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    names = ["k", "q", "v"]  # sorted, as tensors of one size are saved
    tensors = {
        f"model.layers.{i}.{p}_proj.weight": np.arange(24, dtype=np.float32).reshape(8, 3) + i
        for i in range(5)
        for p in names
    }
    split_by(theirs, tensors, tmp_path)
    rules = [
        Rule("model.layers.{l}.{p:q,k,v}_proj.weight", "layers.{p}", "(h d) e -> l e h d"),
    ]
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    template = {
        "layers": {
            "q": STRUCT((5, 3, 4, 2), np.float32),
            "k": np.zeros((5, 3, 4, 2), np.float32),
            "v": STRUCT((5, 3, 4, 2), np.float32, sharding=NamedSharding(mesh, P(None, None, "x"))),
        }
    }
    loaded = load_into_pytree(template, tmp_path, rename=rules)
    for p in names:
        expected = [tensors[f"model.layers.{i}.{p}_proj.weight"] for i in range(5)]
        whole = np.stack(expected).reshape(5, 4, 2, 3).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(np.asarray(loaded["layers"][p]), whole)
    other = tmp_path / "other"
    save_pytree(loaded, other, rename=rules, metadata={"format": "pt"}, max_shard_size="0.25KB")
    weight_map = json.loads((other / INDEX).read_text())["weight_map"]
    assert weight_map == json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for name, shard in weight_map.items():
        found = safetensors.numpy.load_file(other / shard)[name]
        np.testing.assert_array_equal(found, tensors[name])


def test_what_huggingface_hub_splits_loads(tmp_path: Path) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    split_by(theirs, {f"@layers#{i}@w": np.full((5, 5), i, np.float32) for i in range(7)}, tmp_path)
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


@pytest.mark.filterwarnings("ignore:`huggingface_hub` cache-system uses symlinks")  # on Windows
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
    assert path.is_symlink() or os.name == "nt"  # where few users may make links
    assert is_same(tree_of(1), load_pytree(path.parent))
    assert is_same(tree_of(1), load_pytree(path))

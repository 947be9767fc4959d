"""Hashing while a file is written."""

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import FileFormatError, load_pytree, save_pytree
from pytree2safetensors._save import hashing
from pytree2safetensors._storage import threads
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.threads import Task


def test_few_blocks_wait_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks keep their memory until they are hashed, so only few may wait."""
    tree = {f"w{n}": np.full(20_000, n, np.float32) for n in range(12)}  # each a block, and a chunk
    save_pytree(tree, tmp_path / "plain", checksum=True)
    waiting: list[int] = []
    futures: list[Task[bytes]] = []
    real = threads.start

    def start(pool: Any, task: Any) -> Any:
        def slow() -> Any:
            time.sleep(0.01)
            return task()

        waiting.append(sum(not future.done() for future in futures))
        futures.append(real(pool, slow))
        return futures[-1]

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(hashing, "ALONE", 1)
    monkeypatch.setattr(hashing, "start", start)
    save_pytree(tree, tmp_path / "watched", checksum=True)
    assert len(waiting) == len(tree)
    assert max(waiting) == 1  # and the one that is started then
    assert (tmp_path / "watched").read_bytes() == (tmp_path / "plain").read_bytes()
    assert load_pytree(tmp_path / "watched").keys() == tree.keys()


def test_a_load_hashes_only_large_blocks_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {f"w{n}": np.full(8, n, np.float32) for n in range(100)}
    tree |= {"large": np.zeros(1 << 18, np.uint8), "z": np.zeros((1 << 18) - 1, np.uint8)}
    save_pytree(tree, tmp_path / "file", checksum=True)
    sizes: list[int] = []
    real = ReadPool.map

    def watched(pool: ReadPool, function: Any, values: Any) -> Any:
        sizes.extend(len(piece) for pieces in values for piece in pieces)
        return real(pool, function, values)

    monkeypatch.setattr(ReadPool, "map", watched)
    assert_same(load_pytree(tmp_path / "file"), jax.tree.map(jnp.asarray, tree))
    assert sizes == [1 << 18]
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1  # of the smallest dtype, which comes last
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"'@z' in .* does not match its digest"):
        load_pytree(tmp_path / "file")

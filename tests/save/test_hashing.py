"""Hashing while a file is written."""

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytree2safetensors import load_pytree, save_pytree
from pytree2safetensors._save import hashing
from pytree2safetensors._storage import threads


def test_few_blocks_wait_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep their memory, so a save of any size needs little."""
    tree = {f"w{n}": np.full(20_000, n, np.float32) for n in range(12)}  # each a block, and a chunk
    save_pytree(tree, tmp_path / "plain", checksum=True)
    waiting: list[int] = []
    futures: list[Future[bytes]] = []
    real = threads.start

    def start(pool: Any, task: Any) -> Any:
        def slow() -> Any:
            time.sleep(0.01)
            return task()

        waiting.append(sum(not future.done() for future in futures))
        futures.append(real(pool, slow))
        return futures[-1]

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(hashing, "_ALONE", 1)
    monkeypatch.setattr(hashing, "start", start)
    save_pytree(tree, tmp_path / "watched", checksum=True)
    assert len(waiting) == len(tree)
    assert max(waiting) == 1  # and the one that is started then
    assert (tmp_path / "watched").read_bytes() == (tmp_path / "plain").read_bytes()
    assert load_pytree(tmp_path / "watched").keys() == tree.keys()

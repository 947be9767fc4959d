"""The limits that the pages state are those of the code."""

import os
from pathlib import Path

import pytest

from pytree2safetensors._format.digests import BLOCK
from pytree2safetensors._format.header import MAX_HEADER
from pytree2safetensors._format.layout import MAX_SHARD_HEADER
from pytree2safetensors._leaves.to_jax import _MANY, TAKEN_OVER
from pytree2safetensors._load.reading import _BATCH, _STAGED_READERS
from pytree2safetensors._messages import _LISTED
from pytree2safetensors._save.meeting import _PATIENCE as LATE
from pytree2safetensors._save.work import _READERS
from pytree2safetensors._storage.folder import _DAY, _PATIENCE
from pytree2safetensors._storage.remote_file import RemoteSource
from pytree2safetensors._storage.threads import workers
from pytree2safetensors._tree.keys import MAX_INDEX
from pytree2safetensors._tree.literal import MAX_DIGITS
from pytree2safetensors._tree.unflatten import MAX_GAPS

DOCS = Path(__file__).parents[2] / "docs"
MOST = 4  # threads that hash, on a machine with at least as many cores

STATED = {
    "format": [
        f"The header has at most {MAX_HEADER:,} bytes",
        f"including the padding, larger than {MAX_SHARD_HEADER:,} bytes",
        f"A block is {BLOCK >> 20} MiB ({BLOCK:,} bytes)",
        f"must accept {MAX_GAPS:,} such gaps",
        f"is at most {MAX_INDEX:,}.",
        f"an `int` of at most {MAX_DIGITS:,} digits",
    ],
    "interface": [
        f"wait for more than {_PATIENCE:.0f} seconds",
        f"older than {'a day' if _DAY == 24 * 60 * 60 else _DAY}",
        f"memory of at most {_BATCH >> 20} MiB",
        f"Arrays of less than {TAKEN_OVER >> 10} KiB",
        f"the first {_LISTED} of each list",
        f"the first {_LISTED}, and the number of the others",
    ],
    "guides/multi-host": [f"within {'ten' if LATE == 600 else LATE / 60} minutes"],
    "measurements": [f"sends up to {RemoteSource.in_flight} requests at a time"],
    "performance": [
        f"at least {_MANY:,} arrays of the same dtype and shape, of less than {TAKEN_OVER:,} bytes",
        f"{'Twelve' if _STAGED_READERS == 12 else _STAGED_READERS} threads read into pinned memory",
    ],
    "scale": [f"blocks of {BLOCK >> 20} MiB", f"{MOST * BLOCK >> 20} MiB at a time"],
}


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="one thread hashes without this call")
def test_no_more_threads_hash() -> None:
    assert workers(MOST) == _READERS


@pytest.mark.parametrize("page", STATED)
def test_pages_state_the_limits_of_the_code(page: str) -> None:
    text = " ".join((DOCS / f"{page}.md").read_text("utf-8").split())
    assert [sentence for sentence in STATED[page] if sentence not in text] == []

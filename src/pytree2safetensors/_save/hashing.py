"""Hashing of the written bytes, block by block, in other threads.

Specification: *Digests*.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from pytree2safetensors._format.digests import ALONE, BLOCK, digest_tensor, hash_block
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._save.plan import FilePlan
from pytree2safetensors._storage.threads import Task, start, workers
from pytree2safetensors._types import Chunk

_MOST_THREADS: Final = 4


class Hashing:
    """Hashes chunks while they are written, and then has the digest of each tensor."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._hashes: dict[str, list[Task[bytes] | bytes]] = {}
        count = workers(_MOST_THREADS)
        self._pool = ThreadPoolExecutor(count, "pytree2safetensors-hash")
        self._partial: Task[Any] | None = None  # the state of a block of several pieces
        self._running: deque[Task[bytes]] = deque()
        self._most = 2 * count  # waiting or running blocks, which keep their memory

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def through(self, file: FilePlan, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks of the data of a file after their hashing has started.

        The chunks must be in order, and their memory must not change later.
        """
        tensors = iter(zip(file.tensors, file.starts(self.infos), strict=True))
        name: str | None = None  # of the current tensor
        stop = room = 0  # where it ends, and how many bytes its block still lacks
        for offset, chunk in chunks:
            rest, position = chunk, offset
            while len(rest):
                while name is None or position == stop:
                    name, first = next(tensors)
                    stop = first + self.infos[name].nbytes
                room = room or min(BLOCK, stop - position)
                piece = rest[:room]
                self._add(name, piece, len(piece) == room)
                rest, position, room = rest[len(piece) :], position + len(piece), room - len(piece)
            yield offset, chunk

    def _add(self, name: str, piece: memoryview, is_last: bool) -> None:
        """Hash the next piece of a block; most blocks are one piece."""
        if is_last and self._partial is None:
            self._hashes.setdefault(name, []).append(self._begin(piece))
            return
        state = hashlib.sha256() if self._partial is None else self._partial.result()
        # One piece at a time, so that only one piece stays in memory.
        self._partial = start(self._pool, partial(_updated, state, piece))
        if is_last:
            self._hashes.setdefault(name, []).append(self._partial.result().digest())
            self._partial = None

    def _begin(self, block: memoryview) -> Task[bytes] | bytes:
        if len(block) < ALONE:
            return hash_block(block)
        if len(self._running) >= self._most:
            self._running.popleft().result()
        future = start(self._pool, partial(hash_block, block))
        self._running.append(future)
        return future

    def digests(self) -> dict[str, str]:
        """Return the digest of each tensor, after all chunks."""
        return {
            name: digest_tensor(
                name,
                info,
                (h if isinstance(h, bytes) else h.result() for h in self._hashes.get(name, ())),
            )
            for name, info in self.infos.items()
        }


def _updated(state: Any, piece: memoryview) -> Any:
    found = state.copy()
    found.update(piece)
    return found

"""Checks of the digests of whole tensors, block by block, in threads.

Specification: *Digests*.
"""

from collections.abc import Sequence
from itertools import chain, groupby

from pytree2safetensors._format.digests import ALONE, block_bounds, check_digest, hash_blocks
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.regions import Part, gather
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.ranges import Place
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.threads import Task


def check_digests(checkpoint: OpenCheckpoint, places: Sequence[Place], pool: ReadPool) -> None:
    """Raise an error if there are digests, and the bytes of tensors are not those that were saved.

    A tensor that was read only in part cannot be checked.
    """
    digests = checkpoint.digests
    if digests is None:
        return
    checks: list[tuple[str, TensorInfo, str, Sequence[Task[list[bytes]]]]] = []
    for name, group in groupby(places, key=lambda place: place.slot.name):
        mine = list(group)
        info = checkpoint.infos[name]
        file = checkpoint.places[name][0].label
        whole = next((place for place in mine if place.slot.region is None), None)
        if whole is not None:
            if info.nbytes < ALONE:
                check_digest(name, info, hash_blocks([whole.raw]), digests, file)
                continue
            blocks = [[whole.raw[start:stop]] for start, stop in block_bounds(whole.slot.nbytes)]
            checks.append((name, info, file, pool.map(hash_blocks, blocks)))
            continue
        for _, parts in groupby(mine, key=lambda place: place.slot.info.shape):
            found = list(parts)
            if sum(place.slot.nbytes for place in found) == info.nbytes:
                checks.append((name, info, file, pool.map(_hash_all, [found])))
                break
    for name, info, file, futures in checks:
        hashes = chain.from_iterable(future.result() for future in futures)
        check_digest(name, info, hashes, digests, file)


def _hash_all(places: list[Place]) -> list[bytes]:
    """Hash the blocks of a tensor from its regions."""
    info = places[0].slot.info
    parts = [Part(place.slot.region or (), place.items()) for place in places]
    return hash_blocks(piece for _, piece in gather(parts, info.shape, info.itemsize))

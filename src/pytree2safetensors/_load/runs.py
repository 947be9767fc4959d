"""Runs: small tensors of one dtype and shape that follow each other in the file are read as one.

Specification: *Loading*.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pytree2safetensors._leaves.staging import ALIGNMENT
from pytree2safetensors._leaves.to_jax import TAKEN_OVER
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.slots import Batch, Slot, Wanted
from pytree2safetensors._load.template import TemplateLeaf


def is_small_plain(
    checkpoint: OpenCheckpoint, keeps_memory: Callable[[TemplateLeaf], bool]
) -> Callable[[str, TemplateLeaf], bool]:
    """Return which leaves may be read in runs: small plain arrays for the default device."""
    known: dict[tuple[int, int], bool] = {}
    if checkpoint.digests is not None:  # of single tensors
        return lambda _, __: False

    def is_small(source: str, leaf: TemplateLeaf) -> bool:
        info = checkpoint.infos[source]
        key = id(info), id(leaf)
        found = known.get(key)
        if found is None:
            plain = info.kind is None and leaf.leaf.kind == "array" and leaf.sharding is None
            apart = leaf.target != "jax" or leaf.format is not None or keeps_memory(leaf)
            found = known[key] = plain and not apart and 0 < info.nbytes < TAKEN_OVER
        return found

    return is_small


def plan_runs(
    checkpoint: OpenCheckpoint,
    wanted: Sequence[Wanted],
    small: Sequence[tuple[int, int, str]],
    limit: int,
) -> Iterator[Batch]:
    """Plan small tensors: equal ones that follow each other in the file are one slot."""
    infos, places = checkpoint.infos, checkpoint.places
    slots: list[Slot] = []
    size = 0
    run: list[int] = []
    run_info: Any = None  # of the tensors of the run, as the next two
    run_leaf: Any = None
    run_file: Any = None
    stop = -1  # where the run ends in the file
    room = nbytes = 0  # for how many more tensors of the run, each of so many bytes

    def close() -> None:
        nonlocal size
        if run:
            nbytes = run_info.nbytes * len(run)
            whole = run_info._replace(shape=(len(run), *run_info.shape), nbytes=nbytes)
            slots.append(Slot(wanted[run[0]].name, whole, None, size, nbytes, [], None, run))
            size += nbytes

    for _, position, source in small:
        info, leaf = infos[source], wanted[position][1]
        file, offset = places[source]
        if (
            offset != stop
            or info is not run_info
            or leaf is not run_leaf
            or file is not run_file
            or room < 1
        ):
            close()
            nbytes = info.nbytes
            size = -(-size // ALIGNMENT) * ALIGNMENT
            if size + nbytes > limit:
                yield Batch(slots, size)
                slots, size = [], 0
            run, run_info, run_leaf, run_file = [], info, leaf, file
            room = (limit - size) // nbytes
        run.append(position)
        room -= 1
        stop = offset + nbytes
    close()
    if slots:
        yield Batch(slots, size)

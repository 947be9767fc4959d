"""Saves by several processes, when one is killed."""

import inspect
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings

import pytree2safetensors as p2s
from pytree2safetensors._save import coordination, work
from together import Group, arrays_of, checkpoint, number_in

pytestmark = pytest.mark.multiprocess

THOROUGH = (settings.default or settings()).max_examples >= 10_000
NOTICES = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters

# The actions in a save that other processes or a reader can see.
VISIBLE: list[tuple[Any, str]] = [
    (coordination.CoordinationKeys, "set"),
    (coordination.CoordinationKeys, "wait"),
    (work, "write_at"),
    (work, "set_size"),
    (work, "flush"),
    (os, "replace"),
    (os, "unlink"),
    (os, "fsync"),
]


@pytest.fixture
def mortals() -> Iterator[Group]:
    """Two processes. A test may kill one."""
    group = Group(2, 2, heartbeat=8)
    yield group
    group.end()


def die_while_saving(
    path: str, where: int, count: int, options: dict[str, Any], background: bool
) -> None:
    """Save, and let one process die before its n-th call of a function."""
    calls: list[str] = []

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    if jax.process_index() == where:
        for place, name in VISIBLE:
            setattr(place, name, counting(name, getattr(place, name)))
    if background:
        p2s.save_pytree_async(checkpoint(2), path, **options).result()
    else:
        p2s.save_pytree(checkpoint(2), path, **options)


def check_death(
    group: Group,
    path: Path,
    where: int,
    count: int,
    options: dict[str, Any],
    *,
    background: bool = False,
) -> int | None:
    """Return the number of the checkpoint that a kill left; None if a load says that a save was interrupted."""
    p2s.save_pytree(checkpoint_alone(1), path, **options)
    answers = group.ask(die_while_saving, path, where, count, options, background)
    number = number_or_none(path)
    if answers[where] == {"result": None}:  # it did less than that
        assert number == 2
    else:
        # JAX may end it first, if the machine is so slow that it seems to be dead.
        assert answers[where] in ({"ended": -9}, {"ended": -6}), group.said()
        # JAX informs or ends the other process, unless the save was finished.
        assert number == 2 or answers[1 - where] != {"result": None}
        # Only process 0 commits, and between the first and the last name of a folder.
        assert number is not None or (where == 0 and "max_shard_size" in options)
    # A temporary file may remain, and does not hinder the next save.
    p2s.save_pytree(checkpoint_alone(3), path, **options)
    assert number_in(path) == 3
    return number


def number_or_none(path: Path) -> int | None:
    try:
        return number_in(path)
    except p2s.FileFormatError as error:
        assert "but no index: a save was interrupted" in str(error)
        return None


def checkpoint_alone(number: int) -> dict[str, Any]:
    return {name: np.asarray(values) for name, values in arrays_of(number).items()}


@pytest.mark.parametrize(
    ("where", "count", "options"),
    [(0, 4, {}), (1, 2, {}), (1, 3, {"max_shard_size": "700kB", "checksum": True})],
)
def test_a_process_that_is_killed_leaves_the_old_checkpoint(
    mortals: Group, tmp_path: Path, where: int, count: int, options: dict[str, Any]
) -> None:
    options["durable"] = False
    assert check_death(mortals, tmp_path / "file", where, count, options) == 1


@pytest.mark.skipif(not THOROUGH, reason="a minute for five: for the thorough profile")
@pytest.mark.skipif(not NOTICES, reason="this JAX takes minutes to notice a death")
@pytest.mark.parametrize("number", range(60))
def test_kills_at_random(mortals: Group, tmp_path: Path, number: int) -> None:
    chosen = random.Random(number)
    where = chosen.randrange(2)
    count = chosen.randrange(1, 40)
    options: dict[str, Any] = {
        "durable": chosen.random() < 0.5,
        "checksum": chosen.random() < 0.5,
    }
    if number % 2:
        options["max_shard_size"] = "700kB"
    background = chosen.random() < 0.3
    check_death(mortals, tmp_path / "saved", where, count, options, background=background)

"""Saves and loads of every kind, in any order. After each of them, all paths agree with a dict."""

import gc
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oracle import assert_loaded
from pytree2safetensors import (
    Rule,
    UnsupportedLeafError,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from system_calls import FAULTS, Fault, Recorder, watched
from versions import litter, open_descriptors, version

RULES = [Rule("{*}.renamed", "{*}")]
SIZE = 100
# The paths to save to and to load: a file, a folder, and a folder whose shards have a stem.
PATHS = {"file": "file", "folder": "folder", "named/x.safetensors": "named"}


class Held(NamedTuple):
    """The checkpoint at a path: the number of its tree, and whether rules gave its names."""

    number: int
    is_renamed: bool

    def tree(self) -> Any:
        tree = version(self.number, SIZE)
        if self.is_renamed:  # a file of rules has no note
            del tree["pair"]
        return tree


class Reader(NamedTuple):
    """A tree whose arrays are maps of a file, and the descriptors that it keeps open."""

    tree: Any
    number: int
    descriptors: int


class How(NamedTuple):
    """The options of a save."""

    is_renamed: bool
    checksum: bool
    durable: bool
    max_shard_size: int | str

    def options(self, path: str) -> dict[str, Any]:
        metadata = {"renamed": str(self.is_renamed)}
        options: dict[str, Any] = {
            "checksum": self.checksum,
            "durable": self.durable,
            "metadata": metadata,
        }
        if path != "file":
            options["max_shard_size"] = self.max_shard_size
        return options | ({"rename": RULES} if self.is_renamed else {})


paths = st.sampled_from(sorted(PATHS))
hows = st.builds(
    How, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([200, 420, "1GB"])
)


class Checkpoints(RuleBasedStateMachine):
    """Some paths, and the model of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.model: dict[str, Held] = {}
        self.pending: list[tuple[str, Held, Future[None]]] = []
        self.readers: list[Reader] = []
        self.number = 0
        self.descriptors = open_descriptors()

    def teardown(self) -> None:
        gc.enable()
        for _, _, future in self.pending:
            future.exception(60)
        shutil.rmtree(self.root)

    def next(self, how: How) -> Held:
        self.number += 1
        return Held(self.number, how.is_renamed)

    def settle(self) -> None:
        """Add the background saves to the model, in the order of the calls."""
        for path, held, future in self.pending:
            assert future.done()
            future.result()
            self.model[path] = held
        self.pending.clear()

    # --- saves ---

    @rule(path=paths, how=hows)
    def save(self, path: str, how: How) -> None:
        held = self.next(how)
        save_pytree(held.tree(), self.root / path, **how.options(path))
        self.settle()  # what was requested earlier ended first
        self.model[path] = held

    @rule(path=paths, how=hows)
    def save_in_the_background(self, path: str, how: How) -> None:
        held = self.next(how)
        future = save_pytree_async(held.tree(), self.root / path, **how.options(path))
        self.pending.append((path, held, future))

    @precondition(lambda self: self.pending)
    @rule()
    def wait(self) -> None:
        self.pending[-1][2].result(60)
        self.settle()

    @precondition(lambda self: not self.pending)
    @rule(path=paths, how=hows, at=st.integers(0, 80), fault=st.sampled_from(FAULTS))
    def save_while_a_call_fails(self, path: str, how: How, at: int, fault: Fault) -> None:
        held, recorder = self.next(how), Recorder(at, fault)
        try:
            with watched(recorder, flushing=False):
                save_pytree(held.tree(), self.root / path, **how.options(path))
        except (OSError, KeyboardInterrupt):
            call = recorder.calls[at].name
            if call == "open" and fault.after:  # it cannot be closed
                self.descriptors += 1
            if call == "unlink":  # nothing else could remove it
                for file in self.litter():
                    file.unlink()
            if self.find(path, held):
                self.model[path] = held
        else:
            self.model[path] = held

    @rule(path=paths, how=hows)
    def save_what_cannot_be_saved(self, path: str, how: How) -> None:
        tree = {**self.next(how).tree(), "data": print}
        with pytest.raises(UnsupportedLeafError):
            save_pytree(tree, self.root / path, **how.options(path))

    # --- readers ---

    def find(self, path: str, held: Held | None) -> bool:
        """Return whether a path has exactly this checkpoint, or none."""
        where = self.root / PATHS[path]
        if held is None:
            return not where.exists() or not any(where.iterdir())
        if not where.exists() or (where.is_dir() and not any(where.iterdir())):
            return False
        is_renamed = load_metadata(where)["renamed"] == "True"
        if is_renamed != held.is_renamed:
            return False
        if is_renamed:
            template = {"data": np.zeros(SIZE, np.int32), "step": 0}
            tree: Any = load_into_pytree(template, where, rename=RULES)
        else:
            tree = load_pytree(where)
        found = Held(tree["step"], is_renamed)
        assert_loaded(tree, found.tree())  # it is never a mixture
        return found == held

    @precondition(lambda self: not self.pending)
    @rule(path=paths)
    def map(self, path: str) -> None:
        held, before = self.model.get(path), open_descriptors()
        if held is not None and not held.is_renamed:
            tree = load_pytree(self.root / PATHS[path], mmap=True)
            opened = open_descriptors() - before
            self.readers.append(Reader(tree, held.number, opened))
            self.descriptors += opened

    @precondition(lambda self: self.readers)
    @rule()
    def unmap(self) -> None:
        self.descriptors -= self.readers.pop(0).descriptors

    # --- the process ---

    @precondition(lambda self: not self.pending)
    @rule()
    def switch_the_collector(self) -> None:
        (gc.disable if gc.isenabled() else gc.enable)()
        self.collects = gc.isenabled()

    collects = True

    def litter(self) -> list[Path]:
        return [file for folder in (self.root, *self.root.iterdir()) for file in litter(folder)]

    @invariant()
    def maps_keep_what_they_had(self) -> None:
        for tree, number, _ in self.readers:
            assert_loaded(tree, version(number, SIZE))

    @precondition(lambda self: not self.pending)
    @invariant()
    def every_path_holds_what_the_model_says(self) -> None:
        for path in PATHS:
            assert self.find(path, self.model.get(path)), path

    @precondition(lambda self: not self.pending)
    @invariant()
    def nothing_is_left_behind(self) -> None:
        assert not self.litter()
        assert gc.isenabled() is self.collects
        if open_descriptors() != self.descriptors:
            gc.collect()  # a traceback may have some
        assert open_descriptors() == self.descriptors


Checkpoints.TestCase.settings = settings(
    max_examples=max(10, settings().max_examples // 10), stateful_step_count=20
)
TestCheckpoints = pytest.mark.skipif(
    not open_descriptors(), reason="nothing says which descriptors are open"
)(Checkpoints.TestCase)

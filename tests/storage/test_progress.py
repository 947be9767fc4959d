"""Progress: bars that end, and errors of the caller's function."""

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import tqdm.auto

from folders import tree_of
from pytree2safetensors import load_into_pytree, load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._storage.progress import reporter


def fail(done: int, total: int) -> None:
    raise FileNotFoundError(2, "No such file or directory", "the caller's own")


def wait_for_async(*arguments: Any, **options: Any) -> None:
    save_pytree_async(*arguments, **options).result()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100}], ids=["file", "folder"])
@pytest.mark.parametrize("save", [save_pytree, wait_for_async])
def test_an_error_of_the_callers_function_keeps_its_file(
    tmp_path: Path, save: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        save(tree_of(1), tmp_path / "model", progress=fail, **options)
    assert caught.value.filename == "the caller's own"
    save_pytree(tree_of(1), tmp_path / "model", **options)
    with pytest.raises(FileNotFoundError) as caught:
        load_pytree(tmp_path / "model", progress=fail)
    assert caught.value.filename == "the caller's own"


class Bar:
    opened: ClassVar[list["Bar"]] = []

    def __init__(self, **_: Any) -> None:
        self.n, self.closed = 0, False
        self.opened.append(self)

    def update(self, count: int) -> None:
        self.n += count
        if self.n > 100:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_the_bar_of_work_that_fails_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(tree_of(1), tmp_path / "model", checksum=True)
    monkeypatch.setattr("pytree2safetensors._storage.progress._STEP", 1)
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    for work in (
        lambda: load_pytree(tmp_path / "model", progress=True),
        lambda: load_into_pytree(tree_of(1), tmp_path / "model", progress=True),
        lambda: save_pytree(tree_of(1), tmp_path / "other", progress=True),
        lambda: wait_for_async(tree_of(1), tmp_path / "other", progress=True),
        lambda: save_pytree(tree_of(1), tmp_path / "new", max_shard_size=100, progress=True),
    ):
        Bar.opened.clear()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert [bar.closed for bar in Bar.opened] == [True]


class Counting(Bar):
    def update(self, count: int) -> None:
        self.n += count


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100}], ids=["file", "folder"])
def test_a_bar_ends_with_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("pytree2safetensors._storage.progress._STEP", 1)
    monkeypatch.setattr(tqdm.auto, "tqdm", Counting)
    Counting.opened.clear()
    totals: list[int] = []
    for progress in (True, lambda _, total: totals.append(total)):
        save_pytree(tree_of(1), tmp_path / "model", progress=progress, **options)
        load_pytree(tmp_path / "model", progress=progress)
    assert [bar.closed for bar in Counting.opened] == [True, True]
    assert [bar.n for bar in Counting.opened] == [totals[0], totals[-1]]


def test_a_bar_that_never_appeared_needs_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tqdm.auto, "tqdm", Counting)
    Counting.opened.clear()
    with pytest.raises(FileNotFoundError):
        save_pytree(tree_of(1), tmp_path / "missing" / "model", progress=True)
    assert not Counting.opened


def test_only_process_0_shows_a_bar() -> None:
    assert reporter(True, "saving", lambda: 1) is None
    assert reporter(True, "saving", lambda: 0) is not None


def test_a_bar_says_what_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    class Shown(Counting):
        def __init__(self, *, total: int, desc: str, **_: Any) -> None:
            super().__init__()
            seen.append((total, desc))

    monkeypatch.setattr(tqdm.auto, "tqdm", Shown)
    save_pytree({"a": 1.0}, tmp_path / "model", progress=True)
    load_pytree(tmp_path / "model", progress=True)
    load_into_pytree({"a": 0.0}, tmp_path / "model", progress=True)
    save_pytree({"a": np.ones(3)}, tmp_path / "model")
    load_into_pytree({"a": np.zeros(3)}, tmp_path / "model")
    load_into_pytree({"a": np.zeros(3)}, tmp_path / "model", progress=True)
    assert [desc for _, desc in seen] == ["saving", "loading", "loading", "loading"]
    assert seen[-1] == (24, "loading")


def test_progress_counts_the_data_of_keys(tmp_path: Path) -> None:
    key = jax.random.key(0)
    save_pytree({"k": key}, tmp_path / "model")
    calls: list[tuple[int, int]] = []
    load_into_pytree({"k": key}, tmp_path / "model", progress=lambda *call: calls.append(call))
    assert calls[-1] == (8, 8)


@pytest.mark.parametrize("checksum", [False, True])
def test_a_function_is_called_at_least_every_64_mib(tmp_path: Path, checksum: bool) -> None:
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"progress": lambda *call: calls.append(call)}
    tree = {"a": np.zeros(130 << 20, np.uint8)}
    for work in (
        lambda: save_pytree(tree, tmp_path / "model", durable=False, checksum=checksum, **options),
        lambda: load_pytree(tmp_path / "model", **options),
    ):
        calls.clear()
        work()
        done = [0, *(count for count, _ in calls)]
        assert max(after - before for before, after in pairwise(done)) <= 64 << 20
        assert calls[-1][0] == calls[-1][1]


def test_a_map_calls_the_function_only_at_its_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    save_pytree({"a": np.zeros(70 << 20, np.uint8)}, tmp_path / "model", durable=False)
    load_pytree(tmp_path / "model", mmap=True, progress=lambda *call: calls.append(call))
    assert calls == [(70 << 20, 70 << 20)]

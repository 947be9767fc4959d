"""Saving to stores: objects appear whole or not at all, and folders are never a mixture."""

import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from upath import UPath

from folders import INDEX, is_same, outcome, shard_names, tree_of
from oracle import assert_same
from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from web_server import web_server


class Full(OSError):
    pass


class ObjectFile(AbstractBufferedFile):  # type: ignore[misc] # fsspec has no types
    """A file that is uploaded in parts, as those of object stores are."""

    def _initiate_upload(self) -> None:
        self.parts = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        content = self.buffer.getvalue()
        self.fs.spend(len(content))
        self.parts += content
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        self.fs.spend(1)
        self.fs.objects[self.path] = self.parts

    def discard(self) -> None:
        self.parts = b""


class ObjectStore(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """A store whose objects appear whole; it fails when its budget of bytes is spent."""

    protocol: Any = ("objects", "gs")  # as that of Google, it is known to keep an object until then
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    budget: ClassVar[int] = 1 << 60
    steps: ClassVar[list[str]] = []
    block: ClassVar[int] = 50

    def spend(self, count: int) -> None:
        type(self).budget -= count
        if self.budget < 0:
            raise Full(28, "No space left in the store")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        self.steps.append(f"begin {path}")
        options["block_size"] = self.block
        return ObjectFile(self, path, mode, **options)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        content = self.cat_file(path)
        return {"name": path, "size": len(content), "type": "file", "ETag": hash(content)}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = [name for name in self.objects if name.startswith(f"{path}/") or name == path]
        if not found:
            raise FileNotFoundError(path)
        return [self.info(name) for name in found] if detail else found

    def rm_file(self, path: str) -> None:
        self.steps.append(f"remove {path}")
        self.spend(1)
        del self.objects[path]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


class InPlaceFile(io.RawIOBase):
    """A file that has its name from the start, as those of sshfs, and gets some bytes later."""

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self.fs, self.path, self.late = fs, path, b""
        fs.spend(1)
        fs.objects[path] = b""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.flush()
        self.fs.spend(1)
        self.late = bytes(content)
        return len(content)

    def flush(self) -> None:
        if self.late:
            self.fs.spend(1)
            self.fs.objects[self.path] += self.late
            self.late = b""

    def close(self) -> None:
        if not self.closed:
            self.flush()
        super().close()


class InPlaceStore(ObjectStore):
    """A store that writes in place, as `sshfs`."""

    protocol: Any = "inplace"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode, **options)
        return InPlaceFile(self, path)


class InPlaceMemory(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """A store whose files get their names when they are opened, and that cannot discard them."""

    protocol: Any = "inmemory"

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("inmemory://"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ObjectStore]]:
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    fsspec.register_implementation("inplace", InPlaceStore, clobber=True)
    fsspec.register_implementation("inmemory", InPlaceMemory, clobber=True)
    monkeypatch.setattr(ObjectStore, "objects", {})
    monkeypatch.setattr(ObjectStore, "steps", [])
    monkeypatch.setattr(ObjectStore, "budget", 1 << 60)
    return ObjectStore


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


PREFIXES = ["memory://run/", "objects://bucket/"]


@pytest.mark.usefixtures("memory", "store")
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("save", [save_pytree, lambda *a, **k: save_pytree_async(*a, **k).result()])
def test_what_is_saved_to_a_store_has_the_bytes_of_a_file(
    tmp_path: Path, prefix: str, checksum: bool, save: Any
) -> None:
    options: Any = {"metadata": {"run": "17"}, "checksum": checksum}
    reports: list[tuple[int, int]] = []
    save(tree_of(1), prefix + "m", progress=lambda *r: reports.append(r), **options)
    save_pytree(tree_of(1), tmp_path / "m", **options)
    fs, path = fsspec.core.url_to_fs(prefix + "m")
    content = (tmp_path / "m").read_bytes()
    assert fs.cat_file(path) == content
    assert reports[-1] == (len(content), len(content))
    assert is_same(tree_of(1), load_pytree(prefix + "m"))
    assert is_same(tree_of(1), load_into_pytree(tree_of(2), prefix + "m"))
    assert load_metadata(prefix + "m") == {"run": "17"}
    assert load_abstract(prefix + "m")["a"].shape == (16,)


@pytest.mark.usefixtures("memory", "store")
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("checksum", [False, True])
def test_a_folder_in_a_store_has_the_bytes_of_a_folder(
    tmp_path: Path, prefix: str, checksum: bool
) -> None:
    limits: list[int | str] = [100, 40, "5GB", 100, 100, "5GB"]
    for seed, limit in enumerate(limits):
        url = prefix + ("run" if seed % 2 else "run/model.safetensors")
        for path in (url, tmp_path / "run"):
            save_pytree(tree_of(seed), path, max_shard_size=limit, checksum=checksum)
        local = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
        fs, folder = fsspec.core.url_to_fs(prefix + "run")
        assert {name.rpartition("/")[2] for name in fs.ls(folder, detail=False)} == local.keys()
        for name, content in local.items():
            assert fs.cat_file(f"{folder}/{name}") == content
        loaded: list[Any] = [url, prefix + "run"]
        for where in [*loaded, UPath(prefix + "run")] if "memory" in prefix else loaded:
            assert is_same(tree_of(seed), load_pytree(where))


def test_the_old_index_goes_first_and_the_new_one_comes_last(store: type[ObjectStore]) -> None:
    save_pytree(tree_of(1), "objects://bucket/run", max_shard_size=100)
    committed: list[str] = []
    commit = ObjectFile.commit

    def recorded(file: ObjectFile) -> None:
        committed.append(file.path.rpartition("/")[2])
        store.steps.append(f"commit {file.path}")
        commit(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectFile, "commit", recorded)
        store.steps.clear()
        save_pytree(tree_of(2), "objects://bucket/run", max_shard_size=100)
    names = [*shard_names(3), INDEX]
    assert store.steps == [
        *[f"begin bucket/run/{name}" for name in names],
        f"remove bucket/run/{INDEX}",
        *[f"commit bucket/run/{name}" for name in names],
    ]


def test_a_save_of_one_object_does_not_look_for_shards(store: type[ObjectStore]) -> None:
    save_pytree(tree_of(1), "objects://bucket/run", max_shard_size=100)
    store.steps.clear()
    save_pytree(tree_of(2), "objects://bucket/run/model.safetensors")
    assert store.steps == ["begin bucket/run/model.safetensors"]  # nothing is removed


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [Full, KeyboardInterrupt])
def test_a_store_that_fails_after_any_number_of_bytes_keeps_the_old_object(
    store: type[ObjectStore], monkeypatch: pytest.MonkeyPatch, existing: bool, error: Any
) -> None:
    if error is KeyboardInterrupt:

        def spend(self: ObjectStore, count: int) -> None:
            store.budget -= count
            if store.budget < 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(ObjectStore, "spend", spend)
    url = "objects://bucket/m"
    tree = {"w": np.arange(300, dtype=np.float32)}
    save_pytree(tree, url)
    new = store.objects["bucket/m"]
    save_pytree(tree_of(1), url)
    old = store.objects["bucket/m"]
    faults = 0
    for budget in range(0, len(new) + 1, len(new) // 201):
        store.objects.clear()
        if existing:
            store.objects["bucket/m"] = old
        store.budget = budget
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            save_pytree(tree, url)
        if error is Full:
            assert "'objects://bucket/m'" in str(caught.value)
            assert "No space left in the store" in str(caught.value)
        assert store.objects == ({"bucket/m": old} if existing else {})
        faults += 1
    assert faults > 200
    store.budget = len(new) + 1
    save_pytree(tree, url)
    assert store.objects == {"bucket/m": new}


@pytest.mark.parametrize(
    ("before", "after"), [(100, 100), (100, 40), (100, "5GB"), ("5GB", 100), (None, 100)]
)
def test_a_folder_is_old_or_new_or_cut_short(
    store: type[ObjectStore], before: int | str | None, after: int | str
) -> None:
    url, seen = "objects://bucket/run", set[str]()

    def attempt(budget: int) -> str:
        store.budget = 1 << 60
        store.objects.clear()
        if before is not None:
            save_pytree(tree_of(1), url, max_shard_size=before)
        store.budget = budget
        try:
            save_pytree(tree_of(2), url, max_shard_size=after)
        except OSError:
            store.budget = 1 << 60
            return outcome(url)
        return "saved"

    assert attempt(1 << 60) == "saved"
    cost = (1 << 60) - store.budget
    # The last bytes are what commits and removals cost.
    for budget in [*range(0, cost - 15, 100), *range(cost - 15, cost)]:
        seen.add(attempt(budget))
    assert seen <= {"old", "new", "cut short", "nothing"}
    assert ("old" if before else "nothing") in seen
    assert attempt(cost) == "saved"
    assert outcome(url) == "new"


class Steps:
    """Counts the steps of a save into memory, and fails at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 60
        for kind, name in (
            (MemoryFileSystem, "_open"),
            (MemoryFileSystem, "rm_file"),
            (MemoryFile, "write"),
            (MemoryFile, "commit"),
            (MemoryFile, "close"),
        ):
            patch.setattr(kind, name, self.counted(getattr(kind, name)))

    def counted(self, work: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Full(28, "No space left in the store")
            return work(*args, **options)

        return count


@pytest.mark.parametrize(
    ("before", "after"),
    [(100, 100), (100, 40), (100, "5GB"), ("5GB", 100), ("5GB", "5GB"), (None, 100)],
)
@pytest.mark.parametrize("url", ["inmemory://run/folder", "inplace://bucket/run"])
# The store also refuses to close the files of a failed save, which since Python 3.13 is reported.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_in_a_store_that_writes_in_place_is_never_a_mixture(
    memory: MemoryFileSystem,
    store: type[ObjectStore],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    before: int | str | None,
    after: int | str,
) -> None:
    steps = Steps(monkeypatch)

    def allow(count: int) -> None:
        steps.left = InPlaceStore.budget = count

    def attempt(count: int) -> tuple[str, str]:
        """Whether a save returns that fails at some step, and what a reader finds then."""
        allow(1 << 60)
        gc.collect()  # files of the attempt before, which it would close
        memory.store.clear()
        store.objects.clear()
        if before is not None:
            save_pytree(tree_of(1), url, max_shard_size=before)
        allow(count)
        result = "saved"
        try:
            save_pytree(tree_of(2), url, max_shard_size=after)
        except Full:
            result = "failed"
        except OSError as error:
            assert "No space left in the store" in str(error)
            result = "failed"
        allow(1 << 60)
        try:
            loaded = load_pytree(url)
        except (FileFormatError, FileNotFoundError):
            return result, "nothing"
        is_new = is_same(tree_of(2), loaded)
        assert is_new or is_same(tree_of(1), loaded), "a mixture"
        return result, "new" if is_new else "old"

    attempts = [attempt(0)]
    while attempts[-1][0] == "failed" and len(attempts) < 99:
        attempts.append(attempt(len(attempts)))
    assert attempts[0] == ("failed", "nothing" if before is None else "old")
    assert attempts[-1] == ("saved", "new")
    assert len(attempts) > 5


@pytest.mark.parametrize("before", [None, 100, "5GB"])
@pytest.mark.parametrize("after", [100, 40, None])
def test_a_save_to_memory_that_cannot_finish_changes_nothing(
    memory: MemoryFileSystem, before: int | str | None, after: int | None
) -> None:
    url = "memory://run/m.safetensors"
    save_pytree(tree_of(3), "memory://run/other")
    if before is not None:
        save_pytree(tree_of(1), url, max_shard_size=before)
    old = {name: file.getvalue() for name, file in memory.store.items()}

    def fail(done: int, size: int) -> None:
        raise Full(done, size)

    with pytest.raises(Full) as caught:
        save_pytree(tree_of(2), url, max_shard_size=after, progress=fail)
    done, size = caught.value.args
    assert done == size  # all bytes are written
    del caught
    gc.collect()
    assert {name: file.getvalue() for name, file in memory.store.items()} == old
    save_pytree(tree_of(2), url, max_shard_size=after)
    assert is_same(tree_of(2), load_pytree(url))


def test_a_save_to_memory_does_not_wait_for_the_end_of_a_transaction(
    memory: MemoryFileSystem,
) -> None:
    with memory.transaction:
        save_pytree(tree_of(1), "memory://run/m")
        assert is_same(tree_of(1), load_pytree("memory://run/m"))
        memory.mv("/run/m", "/run/n")
    assert [*memory.store] == ["/run/n"]
    assert is_same(tree_of(1), load_pytree("memory://run/n"))


def test_memory_refuses_a_file_below_a_file(memory: MemoryFileSystem) -> None:
    save_pytree(tree_of(1), "memory://run/m")
    with pytest.raises(OSError, match=r"'memory://run/m/n': FileExistsError: /run/m"):
        save_pytree(tree_of(2), "memory://run/m/n")
    assert [*memory.store] == ["/run/m"]


def test_nothing_is_uploaded_after_a_failure(store: type[ObjectStore]) -> None:
    """Files of fsspec upload what they have when they are collected."""
    store.budget = 120
    with pytest.raises(OSError, match="No space left"):
        save_pytree(tree_of(1), "objects://bucket/m")
    store.budget = 1 << 60
    import gc

    gc.collect()
    assert store.objects == {}


def test_a_web_server_is_not_written_to() -> None:
    with web_server() as server:
        url = server.url + "/m.safetensors"
        with pytest.raises(ValueError, match="cannot be written to: its store is read-only"):
            save_pytree(tree_of(1), url)


def test_the_error_for_several_processes_says_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pytree2safetensors._save.api.is_joint", lambda _: True)
    monkeypatch.setattr("pytree2safetensors._save.processes.current_processes", lambda: None)
    with pytest.raises(FileFormatError) as caught:
        save_pytree(tree_of(1), "memory://run/m")
    assert str(caught.value) == (
        "several processes cannot save together to 'memory://run/m', because they cannot write "
        "parts of the same object; save to a folder that all of them share, and copy it"
    )


def test_trees_go_through_a_store_unchanged(memory: MemoryFileSystem) -> None:
    tree = {"w": np.arange(70_000, dtype=np.float32), "steps": (1, None), "run": "seventeen"}
    save_pytree(tree, "memory://tree")
    assert_same(load_into_pytree(tree, "memory://tree"), tree)


@pytest.mark.skipif(
    [*map(int, fsspec.__version__.split(".")[:2])] < [2024, 9],
    reason="the caches of this fsspec cannot write",
)
@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
@pytest.mark.parametrize("store", ["file", "memory"])
def test_caches_of_stores_that_are_not_asynchronous_work(
    cache: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where fsspec keeps what it caches
    where = f"{store}:{tmp_path.as_uri().removeprefix('file:')}/cached"
    url = f"{cache}::{where}"
    save_pytree(tree_of(1), f"{url}.safetensors")
    assert is_same(tree_of(1), load_pytree(f"{where}.safetensors"))
    assert is_same(tree_of(1), load_pytree(f"{url}.safetensors"))
    save_pytree(tree_of(2), url, max_shard_size=40)
    assert is_same(tree_of(2), load_pytree(url))

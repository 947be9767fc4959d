"""File objects, bytes in memory, and pipes in place of paths."""

import codecs
import gzip
import io
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._format.digests import hash_blocks
from pytree2safetensors._load import reading, verifying
from versions import posix

TREE = {"w": jnp.arange(70_000, dtype=jnp.float32), "steps": (1, None), "run": "seventeen"}


def saved(tree: Any = TREE) -> bytes:
    file = io.BytesIO()
    save_pytree(tree, file, metadata={"run": "17"})
    return file.getvalue()


def test_a_file_object_gets_the_bytes_of_a_file(tmp_path: Path) -> None:
    save_pytree(TREE, tmp_path / "tree.safetensors", metadata={"run": "17"})
    assert (tmp_path / "tree.safetensors").read_bytes() == saved()


def test_bytes_load_through_every_loader() -> None:
    assert_same(load_pytree(io.BytesIO(saved())), TREE)
    assert_same(load_into_pytree(TREE, io.BytesIO(saved())), TREE)
    assert load_metadata(io.BytesIO(saved())) == {"run": "17"}
    assert load_abstract(io.BytesIO(saved()))["w"].shape == (70_000,)


def test_a_stream_is_read_from_its_position_to_its_end() -> None:
    file = io.BytesIO(b"before" + saved())
    file.seek(6)
    assert_same(load_pytree(file), TREE)
    assert not file.closed
    assert file.read() == b""


def test_a_stream_at_its_end_is_an_error_that_says_how_many_bytes_there_are() -> None:
    file = io.BytesIO()
    save_pytree(TREE, file)
    with pytest.raises(FileFormatError, match="0 bytes"):
        load_pytree(file)


def test_fsspec_files_work() -> None:
    with fsspec.open("memory://tree.safetensors", "wb") as file:
        save_pytree(TREE, file)
    with fsspec.open("memory://tree.safetensors", "rb") as file:
        assert_same(load_pytree(file), TREE)


def test_a_pipe_works_both_ways() -> None:
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            save_pytree(TREE, file)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as file:
        assert_same(load_pytree(file), TREE)
    thread.join()


class Forward(io.BytesIO):
    """A file object that can only go forward, such as a pipe."""

    def seekable(self) -> bool:
        return False

    def seek(self, *position: int) -> int:
        raise io.UnsupportedOperation("seek")


def test_a_compressed_pipe_loads() -> None:
    with gzip.GzipFile(fileobj=Forward(gzip.compress(saved()))) as file:
        assert_same(load_pytree(file), TREE)


@pytest.mark.parametrize("kind", [io.BytesIO, Forward])
def test_the_error_of_a_file_object_is_its_own(kind: type[io.BytesIO]) -> None:
    packed = gzip.compress(saved())
    with gzip.GzipFile(fileobj=kind(packed[: len(packed) // 2])) as file, pytest.raises(EOFError):
        load_pytree(file)


def test_a_stream_that_wrongly_claims_to_seek_loads() -> None:
    class Claims(Forward):
        def seekable(self) -> bool:
            return True

    assert_same(load_pytree(Claims(saved())), TREE)


def test_a_file_in_an_archive_that_is_streamed_loads() -> None:
    archive, content = io.BytesIO(), saved()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        member = tarfile.TarInfo("tree.safetensors")
        member.size = len(content)
        files.addfile(member, io.BytesIO(content))
    with tarfile.open(fileobj=Forward(archive.getvalue()), mode="r|gz") as files:
        for member in files:
            stored = files.extractfile(member)
            assert stored is not None
            assert_same(load_pytree(stored), TREE)


class Slow(io.BytesIO):
    """A file object that must begin again to seek backwards, as one that decompresses."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.places = list[int]()

    def read(self, size: int | None = -1, /) -> bytes:
        self.places.append(self.tell())
        time.sleep(0.001)
        return super().read(size)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("checksum", [False, True])
def test_a_file_object_is_read_in_order(
    monkeypatch: pytest.MonkeyPatch, checksum: bool, is_sharded: bool
) -> None:
    """Arrays that are read by other threads alternate with those that the caller would read."""
    monkeypatch.setattr(reading, "_BATCH", 1 << 20)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    sizes = [9 << 18, 1 << 14] * 4
    tree = {f"{n}": np.full(size, n, np.float32) for n, size in enumerate(sizes)}
    file = io.BytesIO()
    save_pytree(tree, file, checksum=checksum)
    file = Slow(file.getvalue())
    template: dict[str, Any] = {name: jnp.asarray(array) for name, array in tree.items()}
    if is_sharded:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("x",))
        spec = jax.sharding.PartitionSpec("x")  # type: ignore[no-untyped-call] # JAX leaves it untyped
        template = jax.device_put(template, jax.sharding.NamedSharding(mesh, spec))
    loaded = load_into_pytree(template, file)
    assert file.places == sorted(file.places)
    assert len(file.places) >= len(tree)
    assert_same(jax.tree.map(np.asarray, loaded), tree)


class Failing(Slow):
    """A file object that fails once, after its first mebibytes."""

    error: OSError | None = OSError("gone")

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        if self.error is None:
            time.sleep(0.05)
        elif self.tell() > 10 << 20:
            error, self.error = self.error, None
            raise error
        return found


def test_nothing_reads_a_file_object_after_a_load_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_BATCH", 1 << 20)
    tree = {f"{n}": np.full(9 << 18, n, np.float32) for n in range(8)}
    file = Failing(saved(tree))
    with pytest.raises(OSError, match="gone"):
        load_into_pytree(tree, file)
    places = [*file.places]
    time.sleep(0.2)
    assert file.places == places


def test_a_compressed_file_is_read_three_times(tmp_path: Path) -> None:
    """To find its size, for its small arrays, and for the others."""
    rewinds = list[int]()

    class Counted(io.BytesIO):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            rewinds.extend([offset] if not (offset or whence) else [])
            return super().seek(offset, whence)

    small = {f"small{n}": np.full(9, n, np.float32) for n in range(9)}
    tree = small | {f"{n}": np.full(1 << 20, n, np.float32) for n in range(9)}
    with gzip.open(tmp_path / "file", "wb", 1) as file:
        save_pytree(tree, file)
    with gzip.GzipFile(fileobj=Counted((tmp_path / "file").read_bytes())) as file:
        assert_same(jax.tree.map(np.asarray, load_pytree(file)), tree)
    assert len(rewinds) <= 2


def test_digests_of_a_file_object_are_checked_in_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    together = threading.Barrier(2)

    def hashed(pieces: Any) -> list[bytes]:
        together.wait(20)
        return hash_blocks(pieces)

    monkeypatch.setattr(verifying, "hash_blocks", hashed)
    tree = {"a": np.zeros(8 << 20, np.float32)}
    file = io.BytesIO()
    save_pytree(tree, file, checksum=True)
    file.seek(0)
    assert_same(load_into_pytree(tree, file), tree)


class Endless:
    """Gives what it begins with, and then zeros without end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.given = content, 0

    def read(self, size: int = -1, /) -> bytes:
        assert size >= 0
        piece = self.content[self.given : self.given + size].ljust(size, b"\0")
        self.given += size
        return piece


def test_of_a_stream_without_end_no_more_is_read_than_its_header_describes() -> None:
    header = (2).to_bytes(8, "little") + b"{}"
    for content, most, text in (
        (b"", 9, "its header does not begin with {"),
        (b"\xff" * 8, 9, "it begins with a header length of"),
        (
            header,
            11,
            "has bytes after its data: its header describes 0 bytes of data, and at least 1 follow",
        ),
        (saved(), len(saved()) + 1, "has bytes after its data"),
    ):
        for load in (load_pytree, load_metadata):
            stream = Endless(content)
            with pytest.raises(FileFormatError, match=text):
                load(stream)
            assert stream.given == most


def test_a_stream_that_gives_a_little_at_a_time_is_read_to_its_end() -> None:
    class Little(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(7777, -1 if size is None else size))

    assert_same(load_pytree(Little(saved())), TREE)
    for cut in (0, 5, 8, 100, len(saved()) - 1):
        with pytest.raises(FileFormatError, match=r"is truncated|has \d bytes and is no"):
            load_pytree(Little(saved()[:cut]))


def test_an_unbuffered_file_that_writes_short_gets_everything(tmp_path: Path) -> None:
    class Short(io.RawIOBase):
        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += bytes(data[:1000])
            return min(1000, len(data))

    file = Short()
    save_pytree(TREE, file, metadata={"run": "17"})
    assert bytes(file.content) == saved()


@posix
def test_a_pipe_with_a_path_is_copied_to_be_mapped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit((tmp_path / "pipe").write_bytes, saved())
        assert_same(load_pytree(tmp_path / "pipe", mmap=True), TREE)
        writing.result()


def test_mapping_needs_a_file_on_disk() -> None:
    class Unseekable:
        def read(self, size: int = -1, /) -> bytes:
            return saved()

    empty = io.BytesIO()
    save_pytree({}, empty)
    for file in (io.BytesIO(saved()), io.BytesIO(empty.getvalue()), Unseekable()):
        with pytest.raises(ValueError, match="mmap=True maps a file on disk"):
            load_pytree(file, mmap=True)
        with pytest.raises(ValueError, match="mmap=True maps a file on disk"):
            load_into_pytree(TREE, file, mmap=True)


def test_a_text_file_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        load_pytree(io.StringIO("text"))  # type: ignore[arg-type] # what is tested
    assert str(caught.value) == "the StringIO gives str, not bytes; open it in binary mode"


def test_a_file_opened_as_text_is_refused_whatever_its_bytes(tmp_path: Path) -> None:
    save_pytree({"a": np.full(3, -1.0)}, tmp_path / "file")
    with (
        (tmp_path / "file").open(encoding="utf-8") as file,  # which these bytes are not
        pytest.raises(TypeError) as caught,
    ):
        load_pytree(file)  # type: ignore[arg-type] # what is tested
    name = str(tmp_path / "file")
    assert str(caught.value) == f"{name!r} gives str, not bytes; open it in binary mode"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text", "the Reader gives str, not bytes; open it in binary mode"),
        (None, "the Reader gives NoneType, not bytes; let it wait for data"),  # as a pipe that does not block
    ],
)  # fmt: skip
def test_a_file_object_that_gives_no_bytes_is_refused(content: Any, said: str) -> None:
    class Reader:
        def read(self, size: int = -1, /) -> Any:
            return content

    with pytest.raises(TypeError) as caught:
        load_pytree(Reader())
    assert str(caught.value) == said


@pytest.mark.parametrize("count", [-1, 10_000, 1.5, True])
def test_a_file_object_that_gives_a_wrong_count_is_refused(count: Any) -> None:
    class Writer:
        def write(self, data: Any) -> Any:
            return count

    said = rf"the Writer returned {count} from write, not how many of \d+ bytes it wrote"
    with pytest.raises(OSError, match=said):
        save_pytree({"w": np.zeros(3)}, Writer())


def test_a_file_object_need_not_be_able_to_flush() -> None:
    class Writer:
        content = b""

        def write(self, data: Any) -> None:
            self.content += bytes(data)

    file = Writer()
    save_pytree(TREE, file, metadata={"run": "17"})
    assert file.content == saved()


def test_a_file_object_need_not_say_where_it_sought_to() -> None:
    class Silent(io.BytesIO):
        def seek(self, *arguments: int) -> None:  # type: ignore[override] # as before Python 3.13 in mmap
            super().seek(*arguments)

    assert_same(load_pytree(Silent(saved())), TREE)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
def test_empty_and_small_arrays_pass_through_streams(shape: tuple[int, ...]) -> None:
    tree = {"a": np.zeros(shape, np.int16)}
    found = load_into_pytree(tree, io.BytesIO(saved(tree)))
    assert_same(found, tree)


def test_a_text_file_is_not_written_to(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as named:
        for file in (named, io.StringIO()):
            with pytest.raises(TypeError) as caught:
                save_pytree(TREE, file)  # type: ignore[arg-type] # what is tested
            said = f"{type(file).__name__} takes text, not bytes; open it in binary mode"
            assert str(caught.value) == said


TEXT_FILES: dict[str, Callable[[], Any]] = {
    "_TemporaryFileWrapper": partial(tempfile.NamedTemporaryFile, "w+", encoding="utf-8"),
    "SpooledTemporaryFile": partial(tempfile.SpooledTemporaryFile, mode="w+", encoding="utf-8"),
    "StreamReaderWriter": partial(codecs.open, "file", "w+", "utf-8"),
}


@pytest.mark.filterwarnings("ignore:codecs.open:DeprecationWarning")  # since Python 3.14
@pytest.mark.parametrize("kind", TEXT_FILES)
def test_a_text_file_that_something_else_wraps_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with TEXT_FILES[kind]() as file:
        with pytest.raises(TypeError) as caught:
            save_pytree(TREE, file)
        assert str(caught.value) == f"{kind} takes text, not bytes; open it in binary mode"
        with pytest.raises(TypeError, match="gives str, not bytes; open it in binary mode"):
            load_pytree(file)


class BytesPath:
    """A path that is bytes, as some file systems have them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def test_a_path_of_bytes_is_a_path(tmp_path: Path) -> None:
    path: Any = BytesPath(tmp_path / "file")
    save_pytree(TREE, path)
    assert_same(load_pytree(path), load_pytree(tmp_path / "file"))


def test_a_binary_file_that_something_else_wraps_is_not_text() -> None:
    with tempfile.SpooledTemporaryFile() as file:
        save_pytree(TREE, file)
        file.seek(0)
        assert_same(load_pytree(file), TREE)


def test_file_objects_may_delegate() -> None:
    # Its class has neither `read` nor `write`, which protocols look for from Python 3.12 on.
    with tempfile.NamedTemporaryFile() as file:
        save_pytree(TREE, file)
        file.seek(0)
        assert_same(load_pytree(file), TREE)
        for load in (load_metadata, load_abstract, lambda source: load_into_pytree(TREE, source)):
            file.seek(0)
            load(file)
        with pytest.raises(FileFormatError, match="0 bytes after its position; seek to the start"):
            load_pytree(file)
    with fsspec.open("simplecache::memory://delegated.safetensors", "wb") as remote:
        save_pytree(TREE, remote)
    with fsspec.open("simplecache::memory://delegated.safetensors", "rb") as remote:
        assert_same(load_pytree(remote), TREE)


MAKERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "signed": lambda content: memoryview(content).cast("b"),
    "wide": lambda content: memoryview(content).cast("d" if len(content) % 8 == 0 else "B"),
    "a row": lambda content: memoryview(content).cast("B", (1, len(content))) if content else b"",
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("more", [0, 8])
@pytest.mark.parametrize("seekable", [True, False])
def test_what_a_file_object_gives_is_bytes_of_any_type(
    seekable: bool, more: int, make: Callable[[bytes], Any]
) -> None:
    class Odd(io.BytesIO):
        def seekable(self) -> bool:
            return seekable

        def read(self, size: int | None = -1, /) -> Any:
            assert size is not None
            return make(super().read(size + more))

    assert_same(load_pytree(Odd(saved())), TREE)


def works(path: Any) -> list[Any]:
    return [lambda: load_pytree(path), lambda: save_pytree(TREE, path)]


def test_a_closed_file_object_is_named(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as file:
        save_pytree(TREE, file)
    for work, purpose in zip(works(file), ("reading", "writing"), strict=True):
        with pytest.raises(ValueError, match=f"m' is closed; open it for {purpose}"):
            work()


def test_a_file_object_for_the_other_direction_is_named(tmp_path: Path) -> None:
    save_pytree(TREE, tmp_path / "m")
    with (
        (tmp_path / "m").open("rb") as file,
        pytest.raises(io.UnsupportedOperation, match="is not open for writing; open it again"),
    ):
        save_pytree(TREE, file)
    with (
        (tmp_path / "m").open("ab") as file,
        pytest.raises(io.UnsupportedOperation, match="is not open for reading; open it again"),
    ):
        load_pytree(file)


def test_a_file_object_that_writes_nothing_is_an_error() -> None:
    class Nothing:
        def write(self, data: Any) -> int:
            return 0

    with pytest.raises(OSError, match="wrote nothing"):
        save_pytree({"a": 1}, Nothing())


def test_a_stream_beyond_its_end_is_no_file() -> None:
    file = io.BytesIO(b"abc")
    file.seek(10)
    with pytest.raises(FileFormatError, match="0 bytes"):
        load_pytree(file)

"""What loading reads and keeps, and that it leaves nothing behind in the process."""

import gc
import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import SingleDeviceSharding

import pytree2safetensors
from oracle import assert_same, identity
from pytree2safetensors import (
    FileFormatError,
    Rule,
    load_abstract,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves import staging
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._load import ahead, assembling, finishing, reading
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._load.slots import Use
from pytree2safetensors._storage.file_source import FileSource
from pytree2safetensors.testing import assert_round_trips

struct: Any = jax.ShapeDtypeStruct

SIZE = 100_000
HEADER = 1 << 16  # what opening a file reads at the most, for a header of this size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tree = {side: {"w": np.full(SIZE, n, np.float32)} for n, side in enumerate("abcd")}
    save_pytree(tree, tmp_path / "file")
    return tmp_path / "file"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of all reads."""
    sizes: list[int] = []
    # Windows has no positioned reads.
    name = "preadv" if hasattr(os, "preadv") else "read"
    real: Callable[..., Any] = getattr(os, name)

    def count(*arguments: Any) -> Any:
        found = real(*arguments)
        sizes.append(found if name == "preadv" else len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, name, count)
        yield sizes


def test_a_prefix_reads_only_its_subtree(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as sizes:
        tree = load_pytree(path, prefix="@b")
    assert np.asarray(tree["w"]).tobytes() == np.full(SIZE, 1, np.float32).tobytes()
    assert 4 * SIZE <= sum(sizes) <= 4 * SIZE + HEADER


def test_a_small_tensor_is_read_by_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree({"w": np.arange(250, dtype=np.float32)}, tmp_path / "file")
    with counted(monkeypatch) as sizes:
        load_pytree(tmp_path / "file")
    assert sizes.count(1000) == 1


def test_a_template_reads_only_what_it_needs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = {side: {"w": np.zeros(SIZE, np.float32)} for side in "ac"}
    with counted(monkeypatch) as sizes:
        tree = load_into_pytree(template, path, strict=False)
    assert tree["c"]["w"][0] == 2
    assert 8 * SIZE <= sum(sizes) <= 8 * SIZE + HEADER


def test_the_header_is_enough_for_shapes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as sizes:
        load_abstract(path)
    assert sum(sizes) <= HEADER


def test_a_mapped_file_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as sizes:
        tree = load_pytree(path, mmap=True)
    assert sum(sizes) <= HEADER
    assert_same(tree, load_pytree(path))


def test_a_mapped_array_of_jax_is_not_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def aligned(size: int) -> Any:
        copied.append(size)
        return staging.aligned(size)

    monkeypatch.setattr(finishing, "aligned", aligned)
    load_pytree(path, mmap=True)
    assert not copied


def test_a_checkpoint_describes_leaves_as_a_save_does(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "a": np.ones((2, 3), np.float16), "b": 2**70, "c": "text", "d": 1.5, "e": jax.random.key(0),
        "f": jnp.asarray(1.0), "g": np.zeros(0, np.int8), "h": True, "i": 1j, "j": 3,
    }  # fmt: skip
    save_pytree(tree, tmp_path / "file")
    with open_checkpoint(tmp_path / "file") as checkpoint:
        assert checkpoint.infos == dict(
            zip((f"@{name}" for name in tree), describe(tree.values()), strict=True)
        )


def test_large_arrays_own_the_memory_that_was_read_into() -> None:
    from pytree2safetensors._leaves.staging import aligned
    from pytree2safetensors._leaves.to_jax import to_jax

    memory = aligned(1 << 20)
    assert memory.base is not None
    alive = weakref.ref(memory.base)
    (array,) = to_jax([memory.view(np.float32)])
    assert array.unsafe_buffer_pointer() == memory.ctypes.data  # nothing was copied
    del memory
    assert alive() is not None
    del array
    gc.collect()
    assert alive() is None  # nothing stays behind


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # older JAX donates nothing on the CPU
def test_a_copy_of_a_loaded_array_is_donated_like_any_array(tmp_path: Path) -> None:
    def is_reused(array: jax.Array) -> bool:
        before = array.unsafe_buffer_pointer()
        after = jax.jit(jnp.negative, donate_argnums=0)(array).unsafe_buffer_pointer()
        return bool(after == before)

    save_pytree(jnp.ones(1_000_000), tmp_path / "file")
    loaded = load_pytree(tmp_path / "file")
    assert is_reused(jnp.copy(loaded)) == is_reused(jnp.ones(1_000_000))
    assert not is_reused(loaded)  # whose memory JAX does not own


@pytest.mark.parametrize("shape", [(), (3,), (0,), (16, 32), (1,) * 32])
@pytest.mark.parametrize("dtype", ["float32", "int32", "float16", "bfloat16", "int8"])
def test_equal_arrays_made_together_have_their_own_bits(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytree2safetensors._leaves import to_jax

    monkeypatch.setattr(to_jax, "_MANY", 300)  # so many take a compiled program
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 256, (300, size), np.uint8)  # NaNs of all kinds
    made = to_jax.to_jax([row.view(jnp.dtype(dtype)).reshape(shape) for row in bits])
    assert {(array.dtype, array.shape) for array in made} == {(jnp.dtype(dtype), shape)}
    assert all(isinstance(array, jax.Array) for array in made)
    assert b"".join(np.asarray(array).tobytes() for array in made) == bits.tobytes()


def test_loaded_numpy_arrays_share_memory_with_nothing(path: Path) -> None:
    template = {side: {"w": np.zeros(SIZE, np.float32)} for side in "abcd"}
    first = load_into_pytree(template, path)
    second = load_into_pytree(template, path, mmap=True)
    arrays = [*pytree2dict(first).values(), *pytree2dict(second).values()]
    for number, array in enumerate(arrays):
        assert array.flags.writeable
        assert not any(np.shares_memory(array, other) for other in arrays[:number])
        array[:] = -1
    assert load_pytree(path)["d"]["w"][0] == 3


def test_two_leaves_that_share_a_tensor_do_not_share_memory(path: Path) -> None:
    template = [np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)]
    rename = {"#0": "@a@w", "#1": "@a@w"}
    first, second = load_into_pytree(template, path, strict=False, rename=rename)
    assert not np.shares_memory(first, second)


def test_arrays_of_a_dictionary_are_copied(path: Path) -> None:
    given = np.zeros(SIZE, np.float32)
    template: dict[str, Any] = {"w": jnp.zeros(SIZE), "n": np.zeros(SIZE, np.float32)}
    placed = set_weights(template, {"@w": given, "@n": given})
    given[:] = 1
    assert not np.asarray(placed["w"]).any()
    assert not placed["n"].any()


def test_arrays_that_rules_join_are_copied_before_jax_reads_them() -> None:
    """JAX copies an array that is not aligned in another thread, after it has returned."""
    given = np.zeros((16 << 20) + 1, np.float32)[1:]
    rules = [Rule("w.{i}", "@w", "a -> i a")]
    template = {"w": struct((2, *given.shape), np.float32)}
    joined = set_weights(template, {"w.0": given, "w.1": jnp.zeros_like(given)}, rename=rules)
    given[:] = 1
    assert not np.asarray(joined["w"]).any()
    given[:] = 0
    tree = {"a": [given, jnp.zeros_like(given)]}
    flat = pytree2dict(tree, rename=[Rule("w", "a.{i}", "i a -> a")])
    given[:] = 1
    assert not np.asarray(flat["w"]).any()


RULES = [Rule("k.{i}", "k.{i}", "b a -> a b"), Rule("{*}", "{*}")]
ONES = [Rule("k.{i}", "k.{i}", "a 1 b -> a b"), Rule("{*}", "{*}")]


@pytest.mark.parametrize(
    ("stored", "wanted", "rules", "keepers"),
    [
        (np.float32, jnp.bfloat16, None, "v"),
        (np.float32, np.float32, RULES, "v"),
        (ml_dtypes.int4, ml_dtypes.int4, None, "v"),
        (np.float32, np.float32, None, "kv"),
        (np.float32, np.float32, ONES, "kv"),
    ],
    ids=["converted", "moved", "packed", "as they are", "with an axis of size 1"],
)
def test_leaves_keep_nothing_alive_that_others_were_made_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: Any,
    wanted: Any,
    rules: Any,
    keepers: str,
) -> None:
    memory: list[tuple[weakref.ref[Any], int]] = []

    def aligned(nbytes: int) -> Any:
        found = staging.aligned(nbytes)
        memory.append((weakref.ref(found.base), nbytes))
        return found

    monkeypatch.setattr(ahead, "aligned", aligned)
    monkeypatch.setattr(finishing, "aligned", aligned)
    tree = {
        "k": [np.full((128, 128), number % 7, stored) for number in range(9)],
        "v": [np.full(2048, number, np.float32) for number in range(9)],
    }
    save_pytree(tree, tmp_path / "file", rename=rules)
    template = {
        "k": [struct((128, 128), wanted)] * 9,
        "v": [struct((2048,), np.float32)] * 9,
    }
    found = load_into_pytree(template, tmp_path / "file", cast=True, rename=rules)
    assert [int(np.asarray(leaf)[-1, -1]) for leaf in found["k"]] == [n % 7 for n in range(9)]
    assert [int(leaf[-1]) for leaf in found["v"]] == [*range(9)]
    gc.collect()
    kept = sum(nbytes for base, nbytes in memory if base() is not None)
    assert kept <= sum(leaf.nbytes for name in keepers for leaf in found[name]) + 4096


def test_a_file_that_is_truncated_before_it_is_mapped_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_, size = FileSource.map, path.stat().st_size

    for left in (size - 1, size // 2, 0):

        def truncated(source: FileSource, left: int = left) -> Any:
            os.truncate(path, left)
            return map_(source)

        monkeypatch.setattr(FileSource, "map", truncated)
        with pytest.raises(FileFormatError, match="was truncated while it was read"):
            load_pytree(path, mmap=True)
        os.truncate(path, size)


def test_files_of_safetensors_load_from_any_offset(tmp_path: Path) -> None:
    for extra in range(9):
        arrays: dict[str, Any] = {
            "@" + "x" * extra: np.arange(20_000, dtype=np.float32),
            "@b": np.arange(5, dtype=np.int8),
            "@c": np.arange(70_000, dtype=np.int16).reshape(7, -1),
        }
        path = tmp_path / f"file{extra}"  # Windows replaces no file that is mapped
        safetensors.numpy.save_file(arrays, path)
        for mmap in (False, True):
            found = pytree2dict(load_pytree(path, mmap=mmap))
            assert found.keys() == arrays.keys()
            for name, array in arrays.items():
                assert identity(np.asarray(found[name])) == identity(array)


@pytest.mark.parametrize("shape", [(4,), (3, 5), ()])
def test_many_equal_leaves_load_in_groups(shape: tuple[int, ...], tmp_path: Path) -> None:
    tree = [np.full(shape, n, np.float32) for n in range(1500)]
    save_pytree(tree, tmp_path / "file", durable=False)
    for saved, leaf in zip(tree, load_pytree(tmp_path / "file"), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape == shape
        assert np.asarray(leaf).tobytes() == saved.tobytes()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_state_of_the_collector_is_restored(enabled: bool, path: Path, tmp_path: Path) -> None:
    works: list[Callable[[], Any]] = [
        lambda: save_pytree({"a": 1}, tmp_path / "other"),
        lambda: load_pytree(path),
        lambda: load_into_pytree({"a": 1}, path),
        lambda: load_pytree(tmp_path / "missing"),
        lambda: save_pytree({"f": len}, tmp_path / "other"),
    ]
    before = gc.isenabled()
    try:
        for work in works:
            (gc.enable if enabled else gc.disable)()
            with suppress(OSError, TypeError, ValueError):
                work()
            assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_no_thread_stays(path: Path) -> None:
    before = threading.active_count()
    load_pytree(path)
    assert threading.active_count() == before


def test_a_header_beyond_the_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tree = {"n" * 60_000_000: np.uint8(1), "m" * 60_000_000: np.uint8(2)}
    with pytest.raises(FileFormatError, match="save with max_shard_size="):
        save_pytree(tree, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_packed_tensor_that_is_not_needed_raises_no_error(tmp_path: Path) -> None:
    header = (
        b'{"@a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"@p":{"dtype":"F4","shape":[2],"data_offsets":[4,5]}}'
    )
    content = len(header).to_bytes(8, "little") + header + np.float32(3).tobytes() + b"\x21"
    (tmp_path / "file").write_bytes(content)
    found = load_into_pytree({"a": np.zeros(1, np.float32)}, tmp_path / "file", strict=False)
    assert found["a"].tolist() == [3]
    with pytest.raises(FileFormatError, match="'@p' is of the packed dtype F4"):
        load_pytree(tmp_path / "file")


def test_load_file_returns_no_leaf_that_has_no_tensor(tmp_path: Path) -> None:
    save_pytree({"a": np.ones(2, np.float32), "s": "text", "i": 2**70}, tmp_path / "file")
    assert list(pytree2safetensors.load_file(tmp_path / "file")) == ["@a"]


def test_load_file_is_safetensors_own_function() -> None:
    import safetensors.flax

    assert pytree2safetensors.load_file is safetensors.flax.load_file


def test_nothing_changes_an_argument(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"b": [np.arange(4)[::2], 1], "a": jnp.ones(2)}
    metadata = {"run": "1"}
    kept = {"b": list(tree["b"]), "a": tree["a"]}
    save_pytree(tree, tmp_path / "file", metadata=metadata, checksum=True)
    assert metadata == {"run": "1"}
    assert list(tree) == ["b", "a"]
    dictionary = pytree2dict(tree)
    before = dict(dictionary)
    set_weights(tree, dictionary)
    load_into_pytree(tree, tmp_path / "file")
    assert dictionary == before
    assert tree["b"][0] is kept["b"][0]
    assert tree["a"] is kept["a"]


@pytest.mark.parametrize("leaf", [struct((), np.int32), np.zeros((), np.int64)])
def test_python_scalars_are_read_together(
    leaf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree([*range(5000)], tmp_path / "file")
    with counted(monkeypatch) as sizes:
        found = load_into_pytree([leaf] * 5000, tmp_path / "file")
    assert len(sizes) < 20
    assert [*map(int, found)] == [*range(5000)]


def test_medium_arrays_own_the_memory_that_was_read_into(tmp_path: Path) -> None:
    tree = [np.full((20, 100 + n), n, np.float32) for n in range(100)]
    save_pytree(tree, tmp_path / "file")
    found = load_pytree(tmp_path / "file")
    assert_same(found, [jnp.asarray(leaf) for leaf in tree])
    places = sorted(leaf.unsafe_buffer_pointer() for leaf in found)
    assert places[-1] - places[0] < 2 * sum(leaf.nbytes for leaf in tree)  # in one piece


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("size", [3, 5000])
def test_any_byte_but_0_is_true(mmap: bool, size: int, tmp_path: Path) -> None:
    raw = np.arange(size, dtype=np.int64).astype(np.uint8)
    content = {"@a": raw.view(np.bool_), "@b": raw.view(np.bool_), "@c": raw > 0}
    content["@s"] = raw[2:3].reshape(()).view(np.bool_)
    note = json.dumps({"version": 1, "leaves": {"@s": "bool"}})
    path = tmp_path / "file"
    safetensors.numpy.save_file(content, path, {"pytree2safetensors": note})
    template: dict[str, Any] = {
        "a": jnp.zeros(size, bool), "b": np.zeros(size, bool), "c": jnp.zeros(size, bool),
    }  # fmt: skip
    for found in (
        load_pytree(path, mmap=mmap),
        load_into_pytree({**template, "s": False}, path, mmap=mmap),
    ):
        assert found["s"] is True
        for name in ("a", "b", "c"):
            assert np.asarray(found[name]).tobytes() == (raw != 0).tobytes()
            assert int(found[name].sum()) == np.count_nonzero(raw)


@pytest.mark.parametrize("size", [(), (3,), (5000,), (70_000,)])
def test_a_boolean_is_stored_as_0_or_1(size: tuple[int, ...], tmp_path: Path) -> None:
    odd = np.full(size, 2, np.uint8).view(np.bool_)
    save_pytree({"a": odd}, tmp_path / "odd", checksum=True)
    save_pytree({"a": np.ones(size, np.bool_)}, tmp_path / "plain", checksum=True)
    assert (tmp_path / "odd").read_bytes() == (tmp_path / "plain").read_bytes()
    taken = set_weights({"a": jnp.zeros(size, bool)}, {"@a": odd})["a"]
    assert int(taken.sum()) == odd.size
    assert_round_trips({"a": odd})


@pytest.mark.parametrize("is_placed", [False, True])
def test_small_arrays_keep_no_memory_that_others_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_placed: bool
) -> None:
    pieces: list[Any] = []

    def aligned(size: int) -> Any:
        pieces.append(staging.aligned(size))
        return pieces[-1]

    monkeypatch.setattr(ahead, "aligned", aligned)
    save_pytree({f"{n}": np.ones(512 + n, np.float32) for n in range(9)}, tmp_path / "file")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if is_placed else None
    template = load_abstract(tmp_path / "file", sharding=sharding)
    loaded = load_into_pytree(template, tmp_path / "file")
    ranges = [(piece.ctypes.data, piece.ctypes.data + piece.nbytes) for piece in pieces]
    assert ranges
    for leaf in jax.tree_util.tree_leaves(loaded):
        pointer = leaf.unsafe_buffer_pointer()
        assert not any(start <= pointer < stop for start, stop in ranges)


def test_pieces_that_arrays_share_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def aligned(size: int) -> Any:
        sizes.append(size)
        return staging.aligned(size)

    monkeypatch.setattr(ahead, "aligned", aligned)
    monkeypatch.setattr(reading, "_BATCH", 1 << 16)
    save_pytree([np.ones(n, np.float32) for n in (4000, 50_000, 5000, 6000)], tmp_path / "file")
    load_pytree(tmp_path / "file")
    assert max(sizes) == 200_000  # alone
    assert all(size <= 1 << 16 for size in sorted(sizes)[:-1])


class Memory:
    """Makes aligned memory, and knows the most bytes that were alive at once."""

    def __init__(self) -> None:
        self._made: list[tuple[weakref.ref[Any], int]] = []
        self.most = 0

    def aligned(self, size: int) -> Any:
        made = staging.aligned(size)
        self._made.append((weakref.ref(made.base), size))  # which views of it keep alive
        alive = [size for base, size in self._made if base() is not None]
        self.most = max(self.most, sum(alive))
        return made


@pytest.mark.parametrize("mmap", [False, True])
def test_arrays_of_numpy_are_converted_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool
) -> None:
    memory = Memory()
    monkeypatch.setattr(ahead, "_AHEAD", 2)
    monkeypatch.setattr(reading, "_BATCH", 1 << 16)
    monkeypatch.setattr(finishing, "aligned", memory.aligned)
    tree = [np.full(8000, n, np.float16) for n in range(40)]
    save_pytree(tree, tmp_path / "file")
    template = [np.zeros(8000, np.float32)] * len(tree)
    found = load_into_pytree(template, tmp_path / "file", mmap=mmap, cast=True)
    # One batch is converted, and three are read meanwhile.
    assert 4 * 16_000 <= memory.most <= 4 << 16
    assert_same(found, [leaf.astype(np.float32) for leaf in tree])


@pytest.mark.parametrize("mmap", [False, True])
def test_arrays_of_numpy_are_reordered_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool
) -> None:
    memory = Memory()
    monkeypatch.setattr(ahead, "_AHEAD", 2)
    monkeypatch.setattr(reading, "_COPIED_BATCH", 1 << 16)
    monkeypatch.setattr(finishing, "aligned", memory.aligned)
    monkeypatch.setattr(assembling, "aligned", memory.aligned)
    tree = [np.arange(n, n + 8000, dtype=np.int16).reshape(80, 100) for n in range(40)]
    rules = [Rule("{n}", "#{n}", "a b -> b a")]
    save_pytree(tree, tmp_path / "file", rename=rules)
    template = [np.zeros((80, 100), np.int16)] * len(tree)
    found = load_into_pytree(template, tmp_path / "file", mmap=mmap, rename=rules)
    # One batch is reordered, and three are read meanwhile.
    assert 4 * 16_000 <= memory.most <= 4 << 16
    assert_same(found, tree)


def test_devices_other_than_the_host_rearrange_their_own_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, other = jax.devices()[:2]
    monkeypatch.setattr(reading, "is_on_host", lambda device: device is host)
    is_far = reading._far(True)
    for device in host, other:
        use = Use(0, SingleDeviceSharding(device), device)
        assert is_far(use) is (device is other)
    for default in None, other:
        with jax.default_device(default):
            assert reading._far(True)(Use(0, None, None)) is (default is other)

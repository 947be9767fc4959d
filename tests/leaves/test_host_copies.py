"""Copies of device arrays. CPU devices replace other devices here."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pytree2safetensors import Rule, load_pytree, save_pytree, save_pytree_async
from pytree2safetensors._leaves import host_copies, placement
from pytree2safetensors._leaves.host import Row, Stack, host_array
from pytree2safetensors._leaves.jax_versions import enable_x64, pinned_sharding
from pytree2safetensors._leaves.spread import Owned, _held
from pytree2safetensors._save import parts, share
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.plan import plan_file

pytestmark = pytest.mark.skipif(
    pinned_sharding(jax.sharding.SingleDeviceSharding(jax.devices()[0])) is None,
    reason="the CPU devices of this JAX have no pinned memory",
)

P: Any = PartitionSpec  # JAX gives its constructor no types


class Link:
    """Records what is copied to the host, and how many bytes of copies live at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        self.real: Any = jax.device_put
        patch.setattr(placement, "is_on_host", lambda _: False)
        patch.setattr(jax, "device_put", self.device_put)

    def device_put(self, values: Any, *arguments: Any) -> Any:
        if isinstance(values, list):
            self.calls.append(sum(map(in_memory, values)))
        return self.real(values, *arguments)


def in_memory(value: Any) -> int:
    """Return the bytes of all copies of an array."""
    if not isinstance(value, jax.Array):
        return int(value.nbytes)
    return sum(shard.data.nbytes for shard in value.addressable_shards)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    with monkeypatch.context() as patch:
        yield Link(patch)


def tree_of_arrays() -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64)
    return {
        "one": [values + i for i in range(8)],
        "rows": jax.device_put(values, NamedSharding(mesh, P("x"))),
        "columns": jax.device_put(values, NamedSharding(mesh, P(None, "y"))),
        "replicated": jax.device_put(values, NamedSharding(mesh, P())),
        "small": jnp.arange(3),
        "bfloat16": jnp.ones((100, 100), jnp.bfloat16),
        "int4": jnp.ones((10, 10), jnp.int4),
        "key": jax.random.key(0),
        "numpy": np.arange(10, dtype=np.int32),
        "step": 3,
    }


@pytest.mark.parametrize("background", [False, True])
def test_many_equal_small_arrays_are_copied_together(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()
    values: list[Any] = [jnp.full((2, 3), i, jnp.float32) for i in range(100)]
    tree = {
        "first": values,
        "second": [jax.device_put(value + 1, devices[1]) for value in values],
        "scalars": [jnp.asarray(i, jnp.bfloat16) for i in range(70)],
        "packed": [jnp.asarray(i % 7, jnp.int4) for i in range(70)],
        "few": [jnp.arange(4) + i for i in range(63)],
        "empty": [jnp.zeros((0, 2)) for _ in range(64)],
    }
    save_pytree(tree, tmp_path / "plain")
    monkeypatch.setattr(host_copies, "_MANY", 64)
    counts: list[int] = []
    link = Link(monkeypatch)

    def device_put(values: Any, *arguments: Any) -> Any:
        counts.append(len(values))
        return link.device_put(values, *arguments)

    monkeypatch.setattr(jax, "device_put", device_put)
    if background:
        future = save_pytree_async(tree, tmp_path / "copied")
        for array in jax.tree.leaves(tree):
            array.delete()
        future.result()
    else:
        save_pytree(tree, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()
    # Each group makes stacks of 64, and the rest move alone. 4-bit arrays are not stacked.
    assert counts[0] == 2 * (1 + 36) + (1 + 6) + 70 + 63 + 1


@pytest.mark.parametrize("batch", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("background", [False, True])
def test_copies_have_the_bytes_of_the_arrays(
    batch: int, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of_arrays()
    save_pytree(tree, tmp_path / "plain")
    monkeypatch.setattr(host_copies, "_BATCH", batch)
    link = Link(monkeypatch)
    if background:
        save_pytree_async(tree, tmp_path / "copied").result()
    else:
        save_pytree(tree, tmp_path / "copied")
    assert link.calls
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_save_copies_batches_of_bounded_size(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copies, "_BATCH", 40_000)
    arrays = [jnp.full((64, 64), i, jnp.float32) for i in range(10)]
    save_pytree(arrays, tmp_path / "file")
    assert link.calls == [2 * arrays[0].nbytes] * 5


def test_copies_are_at_most_two_batches_ahead(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "_BATCH", 1)
    arrays = [jnp.full((64, 64), i, jnp.float32) for i in range(6)]
    copies = host_copies.copied_ahead(arrays)
    for number, (array, copy) in enumerate(zip(arrays, copies, strict=True)):
        assert len(link.calls) <= number + 2
        assert np.array_equal(np.asarray(copy), np.asarray(array))


@pytest.mark.parametrize(("size", "most"), [(1000, 3), (2000, 2), (20_000, 2)])
def test_copies_that_live_at_once_are_few(
    link: Link, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    """If one copy fills the memory, at most one more exists: that which its user still has."""
    monkeypatch.setattr(host_copies, "_BATCH", 1)
    monkeypatch.setattr(host_copies, "_MOST", 3 * 4000)
    copies: list[weakref.ref[Any]] = []
    real, living = link.real, []

    def device_put(values: Any, *arguments: Any) -> Any:
        found = real(values, *arguments)
        copies.extend(map(weakref.ref, found))
        living.append(sum(copy() is not None for copy in copies))
        return found

    link.real = device_put
    arrays = [jnp.full(size, i, jnp.float32) for i in range(8)]
    for number, copy in enumerate(host_copies.copied_ahead(arrays)):
        assert np.asarray(copy)[0] == number
    assert len(living) == 8
    assert max(living) == most


@pytest.mark.parametrize("kind", ["file", "folder", "store", "file object"])
def test_a_save_frees_a_large_copy_before_the_next_one(
    link: Link, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(host_copies, "_BATCH", 1)
    monkeypatch.setattr(host_copies, "_MOST", 1)
    copies: list[weakref.ref[Any]] = []
    living = []

    def device_put(values: Any, *_: Any) -> Any:
        living.append(sum(copy() is not None for copy in copies))
        found = [np.array(value) for value in values]
        copies.extend(map(weakref.ref, found))
        return found

    link.real = device_put
    arrays = [jnp.full(100_000, i, jnp.float32) for i in range(8)]
    if kind == "file object":
        with (tmp_path / "file").open("wb") as file:
            save_pytree(arrays, file)
    elif kind == "store":
        save_pytree(arrays, f"memory://{tmp_path}/file")
    else:
        save_pytree(arrays, tmp_path / "file", max_shard_size="1MB" if kind == "folder" else None)
    assert living == [0] * 8


@pytest.mark.parametrize("kind", ["file", "several processes"])
def test_a_save_frees_the_copy_of_a_shard_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """If shards follow each other in the file, a save copies one after the other."""
    link = Link(monkeypatch)
    monkeypatch.setattr(host_copies, "_BATCH", 1)
    monkeypatch.setattr(host_copies, "_MOST", 1)
    copies: list[weakref.ref[Any]] = []
    living = []

    def device_put(values: Any, *_: Any) -> Any:
        living.append(sum(copy() is not None for copy in copies))
        found = [np.array(value) for value in values]
        copies.extend(map(weakref.ref, found))
        return found

    mesh = Mesh(np.array(jax.devices())[[3, 1, 0, 2]], ("x",))
    values = np.arange(400_000, dtype=np.float32).reshape(4, -1)
    arrays = [jax.device_put(values + i, NamedSharding(mesh, P("x"))) for i in range(3)]
    link.real = device_put
    if kind == "file":
        save_pytree(arrays, tmp_path / "file")
    else:
        monkeypatch.setattr(share, "is_global", lambda _: True)
        contents = collect(arrays, {}, "raise")
        [file] = plan_file(contents, checksum=False).files
        part = share.share_of(contents, 0, copied=False)
        content = bytearray(file.head).ljust(file.size)
        for offset, piece in share.own_chunks(file, contents.infos, part, len(file.head)):
            content[offset : offset + len(piece)] = piece
            del piece
        (tmp_path / "file").write_bytes(content)
    assert link.calls == [400_000] * 12
    assert living == [0] * 12
    monkeypatch.undo()
    for number, found in enumerate(load_pytree(tmp_path / "file")):
        assert np.array_equal(found, values + number)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_background_save_lets_arrays_be_donated_at_once(link: Link, tmp_path: Path) -> None:
    array = jnp.arange(10_000, dtype=jnp.float32)
    expected = np.array(array).tobytes()
    future = save_pytree_async([array], tmp_path / "file")
    jax.jit(lambda x: x * 2, donate_argnums=0)(array).block_until_ready()
    future.result()
    assert link.calls == [40_000]
    [found] = load_pytree(tmp_path / "file")
    assert np.asarray(found).tobytes() == expected


@pytest.mark.parametrize("background", [False, True])
def test_arrays_are_copied_together_from_devices_that_are_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """With JAX_PLATFORMS=cpu,cuda, the default devices are those of the CPU."""
    devices = jax.devices()
    values = np.arange(100_000, dtype=np.float32)
    tree = [jax.device_put(values + number, device) for number, device in enumerate(devices)]
    save_pytree(tree, tmp_path / "plain")
    link = Link(monkeypatch)
    monkeypatch.setattr(placement, "is_on_host", lambda device: device.id < 4)
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:4])
    set_platforms: Any = jax.config.update
    set_platforms("jax_platforms", "cpu,cuda")
    try:
        if background:
            save_pytree_async(tree, tmp_path / "copied").result()
        else:
            save_pytree(tree, tmp_path / "copied")
    finally:
        set_platforms("jax_platforms", "cpu")
    assert link.calls == [4 * values.nbytes]
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_background_save_waits_for_no_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impl: str
) -> None:
    """A program that is still running may make the keys, or the arrays that are copied as one."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    keys = jax.random.split(jax.random.key(0, impl=impl), 8)
    large = jax.random.split(jax.random.key(1, impl=impl), 1 << 13)
    tree: dict[str, Any] = {
        "key": jax.random.key(3, impl=impl),
        "spread": [
            jax.device_put(values, NamedSharding(mesh, spec))
            for values in (keys, large)
            for spec in (P(), P("x"), P(("x", "y")))
        ],
        "many keys": [jax.random.key(i, impl=impl) for i in range(70)],
        "many arrays": [jnp.full(3, i) for i in range(70)],
        "many bools": [jnp.asarray(i > 9) for i in range(70)],
    }
    save_pytree(tree, tmp_path / "plain", checksum=True)
    link = Link(monkeypatch)
    monkeypatch.setattr(host_copies, "_MANY", 64)
    read: list[Any] = []
    real: Any = np.asarray

    def asarray(values: Any, *arguments: Any) -> Any:
        if isinstance(values, jax.Array) and current_thread() is main_thread():
            read.append(values)
        return real(values, *arguments)

    monkeypatch.setattr(np, "asarray", asarray)
    future = save_pytree_async(tree, tmp_path / "copied", checksum=True)
    assert not read
    assert len(link.calls) == 1
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        (jax.random.key_data(leaf) if is_key else leaf).delete()  # as a donation does
    future.result()
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LAYERS = Rule("{*}.{l}", "{*}", "a b -> l a b")
SWAPPED = Rule("{*}", "{*}", "a b c -> c b a")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128", "int4", "bool"])
@pytest.mark.parametrize("rules", [None, [LAYERS], [SWAPPED]])
@pytest.mark.parametrize("limit", [None, 100_000])
def test_a_background_save_copies_each_region_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    rules: list[Rule] | None,
    limit: int | None,
) -> None:
    """Also if several devices hold the same region."""
    if rules and dtype in {"complex128", "int4"}:
        pytest.skip("no rule applies to arrays that need a note")
    devices = jax.devices()
    meshes = [Mesh(np.array(d).reshape(4, 2), ("x", "y")) for d in (devices, devices[::-1])]
    values = np.arange(1 << 19).reshape(8, 256, 256).astype(np.int8).astype(dtype)
    specs = [P("x"), P("y"), P(None, "y"), P(None, None, "x"), P("y", "x"), P()]
    with enable_x64(True):
        tree = {
            f"{name}{number}": jax.device_put(values, NamedSharding(mesh, spec))
            for number, spec in enumerate(specs)
            for name, mesh in zip("ab", meshes, strict=True)
        }
        tree["tied"] = tree["a0"]
    options: Any = {"rename": rules, "max_shard_size": limit, "checksum": True}
    plain, copied = (tmp_path / name for name in ("plain", "copied"))
    for folder in (plain, copied):
        folder.mkdir()
    save_pytree(tree, plain / "model.safetensors", **options)
    link = Link(monkeypatch)
    future = save_pytree_async(tree, copied / "model.safetensors", **options)
    assert link.calls == [sum(array.nbytes for array in tree.values()) - tree["tied"].nbytes]
    for array in tree.values():
        array.delete()  # as a donation does
    future.result()
    assert len(link.calls) == 1
    assert contents_of(copied) == contents_of(plain)


def test_parts_of_small_arrays_are_not_joined_with_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of_arrays()
    save_pytree(tree, tmp_path / "plain", checksum=True)
    monkeypatch.setattr(parts, "_SMALL", 0)
    Link(monkeypatch)
    save_pytree_async(tree, tmp_path / "copied", checksum=True).result()
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("axes", [None, (), ("x",)])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["device", "pinned_host", "unpinned_host"])
def test_a_background_save_shares_no_memory_with_arrays(
    link: Link, tmp_path: Path, kind: str, dtype: str, axes: tuple[str, ...] | None
) -> None:
    """Moving an array to where it is returns an array with the same memory."""
    devices = jax.devices()[:2]
    sharding = (
        jax.sharding.SingleDeviceSharding(devices[0], memory_kind=kind)
        if axes is None
        else NamedSharding(Mesh(np.array(devices), ("x",)), P(*axes), memory_kind=kind)
    )
    array = jax.device_put(np.ones((64, 64), dtype), sharding)
    future = save_pytree_async([array], tmp_path / "file")
    array.delete()  # as a donation does
    future.result()
    [found] = load_pytree(tmp_path / "file")
    assert (np.asarray(found) == np.ones((), dtype)).all()


def test_a_save_leaves_no_copy_inside_the_arrays(link: Link, tmp_path: Path) -> None:
    array: Any = jnp.arange(10_000, dtype=jnp.float32)
    save_pytree([array], tmp_path / "file")
    assert array._npy_value is None


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("spec", [None, P(), P("x")])
def test_no_copy_stays_inside_arrays_in_host_memory_of_another_layout(
    link: Link, tmp_path: Path, spec: Any, background: bool
) -> None:
    """As the pinned memory of TPUs, which NumPy cannot read in place."""
    layouts = pytest.importorskip("jax.experimental.layout")
    if getattr(layouts, "Format", None) in {None, layouts.Layout}:
        pytest.skip("this JAX gives layouts other names")
    if jax.__version_info__ < (0, 10):
        pytest.skip("this JAX gives the pinned memory of CPU devices no layout")
    real, moved = link.real, list[Any]()

    def device_put(values: Any, places: Any) -> Any:
        formats = [layouts.Format(layouts.Layout(major_to_minor=(1, 0)), s) for s in places]
        found = real(values, formats)
        moved.extend(shard.data for array in found for shard in array.addressable_shards)
        return found

    devices = jax.devices()
    sharding = (
        jax.sharding.SingleDeviceSharding(devices[0])
        if spec is None
        else NamedSharding(Mesh(np.array(devices), ("x",)), spec)
    )
    values = np.arange(512 * 64, dtype=np.float32).reshape(512, 64)
    arrays = [real(values, sharding), *device_put([values], [pinned_sharding(sharding)])]
    link.real = device_put
    if background:
        save_pytree_async(arrays, tmp_path / "file").result()
    else:
        save_pytree(arrays, tmp_path / "file")
    assert moved
    assert all(data._npy_value is None for data in moved)
    link.real = real
    for found in load_pytree(tmp_path / "file"):
        assert np.array_equal(found, values)


@pytest.mark.parametrize("level", ["disallow", "disallow_explicit"])
def test_saves_go_on_where_transfers_are_watched_for(
    link: Link, tmp_path: Path, level: str
) -> None:
    tree = tree_of_arrays()
    with jax.transfer_guard(level):
        save_pytree(tree, tmp_path / "file")
        save_pytree_async(tree, tmp_path / "again").result()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "again").read_bytes()


def test_stacks_are_read_where_transfers_are_allowed(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU devices read their memory in place, so this guard would not notice a read."""
    levels: list[str] = []

    class Stack:
        def __array__(self, *_: Any, **__: Any) -> Any:
            levels.append(jax.config.jax_transfer_guard_device_to_host)  # type: ignore[attr-defined] # JAX gives it no type
            return np.arange(64 * 3).reshape(64, 3)

    monkeypatch.setattr(host_copies, "_MANY", 64)
    monkeypatch.setattr(jax, "device_put", lambda values, *_: [Stack() for _ in values])
    with jax.transfer_guard("disallow"):
        copies = host_copies.start_host_copies([jnp.arange(3) for _ in range(64)])
        rows = [host_array(copy) for copy in copies]
    assert levels == ["allow"]
    assert np.array_equal(rows, np.arange(64 * 3).reshape(64, 3))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError])
@pytest.mark.parametrize("background", [False, True])
def test_arrays_are_saved_if_pinned_memory_is_refused(
    link: Link,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: bool,
    error: type[Exception],
) -> None:
    def refuse(*_: Any) -> None:
        raise error("RESOURCE_EXHAUSTED: Out of host memory")

    tree = tree_of_arrays()
    save_pytree(tree, tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", refuse)
        if background:
            future = save_pytree_async(tree, tmp_path / "copied")
            for leaf in jax.tree.leaves(tree):
                if isinstance(leaf, jax.Array):
                    leaf.delete()
            future.result()
        else:
            save_pytree(tree, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


def test_memory_without_a_pinned_kind_is_copied_as_it_is(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copies, "pinned_sharding", lambda _: None)
    tree = tree_of_arrays()
    save_pytree(tree, tmp_path / "file")
    assert link.calls == []
    assert load_pytree(tmp_path / "file")["step"] == 3


def no_setting() -> AbstractContextManager[Any]:
    return nullcontext()


def guarded() -> AbstractContextManager[Any]:
    return jax.transfer_guard("disallow")


def under_a_mesh() -> AbstractContextManager[Any]:
    enter = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh", None)
    if enter is None:
        pytest.skip("this JAX sets no mesh")
    found: AbstractContextManager[Any] = enter(Mesh(np.array(jax.devices()), ("x",)))
    return found


@pytest.mark.parametrize("setting", [no_setting, guarded, under_a_mesh])
@pytest.mark.parametrize("background", [False, True])
def test_parts_of_device_arrays_are_saved_by_rules(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: bool,
    setting: Callable[[], AbstractContextManager[Any]],
) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = jnp.arange(8 * 64 * 3, dtype=jnp.float32).reshape(8, 64, 3)
    tree = {"w": jax.device_put(values, NamedSharding(mesh, P(None, "x"))), "k": values}
    rules = [Rule("w.{l}", "w", "a b -> l a b"), Rule("k.{l}", "k", "a b -> l a b")]
    save_pytree(tree, tmp_path / "plain", rename=rules)
    Link(monkeypatch)
    with setting():
        if background:
            save_pytree_async(tree, tmp_path / "copied", rename=rules).result()
        else:
            save_pytree(tree, tmp_path / "copied", rename=rules)
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_shard_may_be_a_row_of_a_stack() -> None:
    stack = Stack(np.arange(12).reshape(2, 2, 3))
    row: Any = Row(stack, 1)
    [(region, values)] = _held(Owned([(((0, 2), (3, 6)), row)]))
    assert region == ((0, 2), (3, 6))
    assert values.tolist() == [[6, 7, 8], [9, 10, 11]]

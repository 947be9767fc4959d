"""Loads to other devices. CPU devices replace them here, and transfers end as late as possible."""

import time
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from oracle import assert_same
from placed import raw
from pytree2safetensors import Rule, load_into_pytree, load_pytree, save_pytree
from pytree2safetensors._leaves import jax_versions, placement, staging
from pytree2safetensors._leaves.staging import Ring
from pytree2safetensors._load import ahead, finishing, plan, reading
from pytree2safetensors._storage import read_pool
from pytree2safetensors._storage.file_source import FileSource

P: Any = PartitionSpec  # JAX gives its constructor no types
Struct: Any = jax.ShapeDtypeStruct
RING, BATCH = (16 << 10, 48 << 10), 16 << 10
HAS_KINDS = jax_versions.pinned_sharding(SingleDeviceSharding(jax.devices()[0])) is not None


class Link:
    """Transfers that read their memory when they are waited for, and not before."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.moving: list[tuple[list[Any], list[np.ndarray[Any, Any]], list[bytes]]] = []
        self.most = 0  # bytes on their way at once
        self.puts = 0
        self.fails_at = -1
        self.memory: list[tuple[weakref.ref[Any], int]] = []  # of the ring, and of large tensors
        self.most_memory = 0  # bytes at once
        real_put, real_wait, real_ready, real_aligned = (
            jax.device_put,
            jax_versions.block_until_ready,
            ahead._are_ready,
            staging.aligned,
        )

        def device_put(values: Any, *arguments: Any) -> Any:
            if not isinstance(values, list) or not values:
                return real_put(values, *arguments)
            self.puts += 1
            if self.puts == self.fails_at:
                raise RuntimeError("the link is down")
            copies = [np.array(value) for value in values]
            arrays = real_put(copies, *arguments)
            self.moving.append((arrays, values, [copy.tobytes() for copy in copies]))
            self.most = max(
                self.most, sum(v.nbytes for _, moving, _ in self.moving for v in moving)
            )
            return arrays

        def block_until_ready(arrays: Any) -> Any:
            waited = {id(array) for array in arrays}
            for moving in [m for m in self.moving if waited & {id(array) for array in m[0]}]:
                self.arrive(moving)
            return real_wait(arrays)

        def are_ready(arrays: Any) -> bool:
            moving = {id(array) for group, *_ in self.moving for array in group}
            return real_ready(arrays) and moving.isdisjoint(map(id, arrays))

        def aligned(size: int) -> Any:
            memory = real_aligned(size)
            self.memory.append((weakref.ref(memory.base), size))  # which views of it keep alive
            self.most_memory = max(self.most_memory, self.bytes_in_memory())
            return memory

        patch.setattr(jax, "device_put", device_put)
        patch.setattr(staging, "block_until_ready", block_until_ready)
        patch.setattr(staging, "_start_pinning", lambda *_: None)
        patch.setattr(staging, "aligned", aligned)
        patch.setattr(ahead, "block_until_ready", block_until_ready)
        patch.setattr(ahead, "_are_ready", are_ready)
        patch.setattr(reading, "is_on_host", lambda _: False)
        patch.setattr(placement, "is_on_host", lambda _: False)
        patch.setattr(ahead, "RING", RING)
        patch.setattr(reading, "_STAGED_BATCH", BATCH)

    def arrive(self, moving: Any) -> None:
        self.moving = [other for other in self.moving if other is not moving]
        for values, expected in zip(*moving[1:], strict=True):
            assert values.tobytes() == expected, "memory was used again before its transfer ended"

    def reset(self) -> None:
        """Forget what was transferred to save a file."""
        self.moving, self.memory, self.most, self.most_memory, self.puts = [], [], 0, 0, 0

    def bytes_in_memory(self) -> int:
        return sum(size for memory, size in self.memory if memory() is not None)

    def finish(self) -> None:
        for moving in list(self.moving):
            self.arrive(moving)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    return Link(monkeypatch)


def tree_of(count: int, size: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        f"w{i}": jnp.asarray(rng.standard_normal(size, np.float32), jnp.float32)
        for i in range(count)
    }


def test_leaves_pass_through_memory_of_bounded_size(link: Link, tmp_path: Path) -> None:
    tree = tree_of(50, 1500)  # 300 kB through 64 KiB
    save_pytree(tree, tmp_path / "file")
    link.reset()
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert_same(found, tree)
    assert link.puts > 10
    assert link.most <= sum(RING)


def test_templates_of_all_kinds_load_the_same(link: Link, tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    specs = {"rows": P("x"), "columns": P(None, "y"), "both": P("x", "y"), "all": P()}
    tree: dict[str, Any] = {name: values + i for i, name in enumerate(specs)}
    tree |= {"numpy": values, "key": jax.random.key(1), "weak": jnp.asarray(2.0), "step": 3}
    tree |= {"int4": jnp.ones((9, 9), jnp.int4), "flags": jnp.arange(7) % 2 == 0}
    save_pytree(tree, tmp_path / "file")
    template = {
        **tree,
        **{
            name: Struct((64, 64), np.float32, sharding=NamedSharding(mesh, spec))
            for name, spec in specs.items()
        },
    }
    found = load_into_pytree(template, tmp_path / "file")
    link.finish()
    for name in specs:
        assert found[name].sharding == template[name].sharding
        assert np.asarray(found[name]).tobytes() == tree[name].tobytes()
    for name in tree.keys() - specs.keys():
        assert_same(found[name], tree[name])
    found["numpy"][:] = 0  # no one else uses this memory
    again = load_into_pytree(template, tmp_path / "file")
    assert np.asarray(again["numpy"]).tobytes() == values.tobytes()


@pytest.mark.parametrize("spec", [P(), P("x"), P(("x", "y"))])
def test_regions_that_rules_make_of_several_boxes_load_the_same(
    spec: Any, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = np.arange(3 * 8 * 40, dtype=np.float32).reshape(3 * 8, 40)
    layers = {f"w.{n}": values.reshape(3, 8, 40)[:, n] for n in range(8)}
    save_pytree(layers, tmp_path / "file")
    struct = Struct((24, 40), np.float32, sharding=NamedSharding(mesh, spec))
    rule = Rule("@w\\.{l}", "@w", "a b -> (a l) b", l=8)
    found = load_into_pytree({"w": struct}, tmp_path / "file", rename=[rule])["w"]
    link.finish()
    assert found.sharding == struct.sharding
    assert np.asarray(found).tobytes() == values.tobytes()


def test_a_tensor_larger_than_the_ring_has_memory_of_its_own(link: Link, tmp_path: Path) -> None:
    tree = {**tree_of(8, 30_000), **{f"small{i}": jnp.arange(9.0) + i for i in range(20)}}
    save_pytree(tree, tmp_path / "file")
    link.reset()
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert_same(found, tree)
    assert 120_000 <= link.most_memory <= 120_000 + sum(RING)  # one at a time


@pytest.mark.parametrize(
    ("names", "freed_at"),
    # The put at which the array that was transferred first is free: after the put during which its
    # transfer ends, or as soon as another large tensor takes its turn.
    [("abbbbbbbb", 2), ("aabbbbbb", 1)],
)
def test_what_a_large_leaf_was_made_of_is_freed_after_its_transfer(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, freed_at: int
) -> None:
    large = np.arange(30_000, dtype=np.float32).reshape(300, 100)
    small = np.arange(4000, dtype=np.float32).reshape(40, 100)  # a batch of its own
    tree = {f"{kind}{n}": large if kind == "a" else small for n, kind in enumerate(names)}
    save_pytree(tree, tmp_path / "file")
    link.reset()
    put: Any = jax.device_put
    first: list[weakref.ref[Any]] = []
    alive: list[bool] = []  # at each later put

    def device_put(values: Any, *arguments: Any) -> Any:
        made = put(values, *arguments)
        if not isinstance(values, list):
            return made
        if first:
            alive.append(first[0]() is not None)
            link.finish()
        else:
            first.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(jax, "device_put", device_put)
    template = {name: Struct(leaf.shape[::-1], np.float32) for name, leaf in tree.items()}
    rules = [Rule("{=}", "{=}", "x y -> y x")]
    found = load_into_pytree(template, tmp_path / "file", rename=rules)
    link.finish()
    assert len(alive) == len(names) - 1
    assert alive[freed_at - 1 :] == [False] * (len(names) - freed_at)
    for name, leaf in tree.items():
        assert raw(found[name]) == raw(np.ascontiguousarray(leaf.T))


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_transfer_that_fails_is_raised_and_frees_everything(
    link: Link, tmp_path: Path, fails_at: int
) -> None:
    save_pytree(tree_of(50, 1500), tmp_path / "file")
    link.reset()
    link.fails_at = fails_at
    with pytest.raises(RuntimeError, match="the link is down"):
        load_pytree(tmp_path / "file")
    link.finish()
    assert link.bytes_in_memory() == 0


def test_the_memory_is_free_after_a_load(link: Link, tmp_path: Path) -> None:
    save_pytree(tree_of(50, 1500), tmp_path / "file")
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert link.memory
    assert link.bytes_in_memory() == 0
    assert len(found) == 50


def test_arrays_on_the_host_keep_no_memory_of_the_ring(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, other = jax.devices()[:2]
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == host)
    tree = tree_of(40, 2000)
    save_pytree(tree, tmp_path / "file")
    template = {
        name: Struct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding((host, other)[i % 2]))
        for i, (name, leaf) in enumerate(tree.items())
    }
    found = load_into_pytree(template, tmp_path / "file")
    link.finish()
    for name, leaf in tree.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()


def test_arrays_on_the_host_are_never_made_of_the_ring(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are ready at once, so the ring would not wait for what is made of them in turn."""
    host, other, third = jax.devices()[:3]
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == host)
    keys = jax.random.split(jax.random.key(1), (60, 8))
    leaf: dict[str, Any] = {
        "plain": jnp.arange(1500.0),
        "weak": jnp.asarray(0.5),
        "cast": np.ones(700),
    }
    leaf |= {"key": jax.random.key(2), "keys": keys, "int4": jnp.ones((9, 9), jnp.int4)}
    places: list[Any] = [SingleDeviceSharding(device) for device in (host, other)]
    places += [placed_on(other, third), placed_on(host, other)]
    tree = {name: [leaf[name]] * len(places) * 3 for name in leaf}
    tree["default"] = [leaf["plain"], leaf["key"], keys] * 3
    save_pytree(tree, tmp_path / "file")

    def struct(leaf: Any, sharding: Any) -> Any:
        dtype = np.float32 if leaf.dtype == np.float64 else leaf.dtype
        return Struct(leaf.shape, dtype, sharding=sharding)

    template = {
        name: [
            struct(one, places[n % 4] if name != "default" else None) for n, one in enumerate(ones)
        ]
        for name, ones in tree.items()
    }
    link.reset()
    put = jax.device_put
    from_ring = 0

    def device_put(values: Any, *arguments: Any) -> Any:
        nonlocal from_ring
        arrays = put(values, *arguments)
        rings = [found for memory, _ in link.memory if (found := memory()) is not None]
        for value, array in zip(values, arrays, strict=True) if isinstance(values, list) else ():
            if any(np.may_share_memory(value, ring) for ring in rings):
                from_ring += 1
                assert host not in array.devices()
        return arrays

    monkeypatch.setattr(jax, "device_put", device_put)
    with jax.default_device(host):
        found = load_into_pytree(template, tmp_path / "file", cast=True)
    link.finish()
    assert from_ring > 20
    for name, ones in tree.items():
        for one, expected, asked in zip(found[name], ones, template[name], strict=True):
            assert asked.sharding is None or one.sharding.is_equivalent_to(asked.sharding, one.ndim)
            assert raw(one) == raw(expected.astype(asked.dtype) if name == "cast" else expected)


@pytest.mark.skipif(not HAS_KINDS, reason="the CPU devices of this JAX have one kind of memory")
@pytest.mark.parametrize(
    ("kind", "is_shared"), [("device", True), ("pinned_host", True), ("unpinned_host", False)]
)
def test_arrays_in_other_memory_of_the_host_are_never_made_of_the_ring(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_shared: bool
) -> None:
    """A backend might take over memory for them."""
    tree = tree_of(20, 1500)
    save_pytree(tree, tmp_path / "file")
    link.reset()
    shared: set[bool] = set()
    put = jax.device_put

    def device_put(values: Any, *arguments: Any) -> Any:
        rings = [found for memory, _ in link.memory if (found := memory()) is not None]
        if isinstance(values, list):
            shared.update(any(np.may_share_memory(v, ring) for ring in rings) for v in values)
        return put(values, *arguments)

    monkeypatch.setattr(jax, "device_put", device_put)
    sharding = SingleDeviceSharding(jax.devices()[1], memory_kind=kind)
    template = {n: Struct(v.shape, v.dtype, sharding=sharding) for n, v in tree.items()}
    found = load_into_pytree(template, tmp_path / "file")
    link.finish()
    assert shared == {is_shared}
    for name, leaf in tree.items():
        assert found[name].sharding == sharding
        assert raw(found[name]) == raw(leaf)


def test_a_load_that_a_smaller_ring_holds_has_no_larger_one(link: Link, tmp_path: Path) -> None:
    sizes: list[tuple[int, ...]] = []

    class Recorded(Ring):
        def __init__(self, device: Any, pieces: Any) -> None:
            sizes.append(tuple(pieces))
            super().__init__(device, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "Ring", Recorded)
        for count in (6, 50):
            save_pytree(tree_of(count, 1500), tmp_path / "file")
            load_pytree(tmp_path / "file")
    link.finish()
    assert sum(sizes[0]) < 6 * 6000 + BATCH
    assert sizes[1] == RING


def test_what_is_read_is_transferred_while_the_ring_is_full(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link would idle if the oldest transfer were waited for before the next one is begun."""
    waits: list[int] = []
    real = Ring.release

    def release(ring: Ring) -> None:
        waits.append(len(ring.moving))
        real(ring)

    monkeypatch.setattr(Ring, "release", release)
    save_pytree(tree_of(50, 1500), tmp_path / "file")
    found = load_pytree(tmp_path / "file")  # each batch is read before the next step
    link.finish()
    assert len(found) == 50
    assert waits
    assert min(waits) >= 3  # all of the ring is on its way


def test_a_full_ring_waits_for_reads_if_nothing_moves(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead._Reading, "is_read", lambda _: False)
    tree = tree_of(50, 1500)
    save_pytree(tree, tmp_path / "file")
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert_same(found, tree)


def placed_on(*devices: jax.Device) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), ("x",)), P())


HOST, OTHER = 0, 1  # the numbers of the devices that play these roles

# Leaves, and whether each has its own memory: if loaded alone, and if loaded with others.
OWN: dict[str, tuple[Any, tuple[bool, bool]]] = {
    "NumPy": (lambda leaf: np.zeros(leaf.shape, leaf.dtype), (True, True)),
    "host": (lambda leaf: on(leaf, HOST), (False, True)),  # the memory of a batch, or reused memory
    "default": (lambda leaf: Struct(leaf.shape, leaf.dtype), (False, True)),
    "both": (lambda leaf: on(leaf, HOST, OTHER), (True, True)),
    "other": (lambda leaf: on(leaf, OTHER), (False, False)),
}


def on(leaf: Any, *numbers: int) -> Any:
    devices = [jax.devices()[number] for number in numbers]
    sharding = SingleDeviceSharding(devices[0]) if len(devices) == 1 else placed_on(*devices)
    return Struct(leaf.shape, leaf.dtype, sharding=sharding)


@pytest.mark.parametrize("size", [3, 1500])
@pytest.mark.parametrize(("make", "expected"), OWN.values(), ids=OWN)
def test_which_leaves_have_memory_of_their_own(
    link: Link,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Any,
    expected: tuple[bool, bool],
    size: int,
) -> None:
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == jax.devices()[HOST])
    made: list[int] = []

    def aligned(nbytes: int) -> Any:
        made.append(nbytes)
        return staging_aligned(nbytes)

    staging_aligned = staging.aligned
    for module in (ahead, finishing):
        monkeypatch.setattr(module, "aligned", aligned)
    tree = tree_of(20, size)
    save_pytree(tree, tmp_path / "file")
    for beside_others, own in enumerate(expected):
        template = {
            name: on(leaf, OTHER) if beside_others and number % 2 else make(leaf)
            for number, (name, leaf) in enumerate(tree.items())
        }
        made.clear()
        found = load_into_pytree(template, tmp_path / "file")
        link.finish()
        for name, leaf in tree.items():
            assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()
        assert made.count(4 * size) == own * (10 if beside_others else 20)


@pytest.mark.parametrize("make", [OWN["NumPy"][0], OWN["host"][0]], ids=["NumPy", "host"])
def test_values_that_are_converted_wait_for_a_few_batches(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == jax.devices()[HOST])
    monkeypatch.setattr(ahead, "_AHEAD", 2)
    monkeypatch.setattr(ahead._Reading, "is_read", lambda _: False)  # the reads are slow
    monkeypatch.setattr(finishing, "aligned", lambda size: staging.aligned(size))
    tree = tree_of(60, 1500)
    save_pytree(tree, tmp_path / "file")
    link.reset()
    wide = {n: Struct(v.shape, np.complex64) for n, v in tree.items()}
    template = {n: make(leaf) for n, leaf in wide.items()} | {"w0": on(wide["w0"], OTHER)}
    found = load_into_pytree(template, tmp_path / "file", cast=True)
    link.finish()
    # One batch is converted, and three are read meanwhile.
    assert BATCH < link.most_memory <= sum(RING) + 4 * BATCH
    for name, leaf in tree.items():
        assert raw(found[name]) == raw(np.asarray(leaf).astype(np.complex64))


def test_arrays_that_jax_cannot_hold_keep_no_reused_memory(link: Link, tmp_path: Path) -> None:
    tree = tree_of(60, 1500)
    tree |= {name: np.full(900, n, np.int64) for n, name in enumerate([*tree][::2])}
    save_pytree(tree, tmp_path / "file")
    link.reset()
    with pytest.warns(UserWarning, match="x64"):
        found = load_pytree(tmp_path / "file")
    link.finish()
    for name, leaf in tree.items():
        assert found[name].tobytes() == leaf.tobytes()


# Where an array goes, whether JAX cuts it for its devices, and the shape of what is transferred.
REARRANGED: dict[str, tuple[Any, bool, tuple[int, int]]] = {
    "by the default device": (lambda _: None, False, (3, 4)),
    "before JAX cuts them": (lambda other: placed_on(other), True, (4, 3)),
    "by a device": (lambda other: placed_on(other), False, (3, 4)),
    "by the host": (lambda _: placed_on(jax.devices()[1]), False, (4, 3)),
}


@pytest.mark.parametrize(("sharding", "cut", "moved"), REARRANGED.values(), ids=REARRANGED)
def test_which_values_are_rearranged_on_their_device(
    link: Link,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharding: Any,
    cut: bool,
    moved: tuple[int, int],
) -> None:
    default, host = jax.devices()[:2]
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == host)
    if not cut:
        monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_pytree({"w": values, "other": np.ones(9, np.float32)}, tmp_path / "file")
    link.reset()
    template = {
        "w": Struct((4, 3), np.float32, sharding=sharding(default)),
        "other": Struct((9,), np.float32),
    }
    rules = [Rule("@w", "@w", "a b -> b a"), Rule("{=}", "{=}")]
    found = load_into_pytree(template, tmp_path / "file", rename=rules)
    shapes = [value.shape for _, moving, _ in link.moving for value in moving]
    link.finish()
    assert np.array_equal(found["w"], values.T)
    assert [shape for shape in shapes if len(shape) == 2] == [moved]


@pytest.mark.skipif(not HAS_KINDS, reason="the CPU devices of this JAX have one kind of memory")
@pytest.mark.parametrize("kind", ["device", "pinned_host", "unpinned_host"])
@pytest.mark.parametrize("spec", [None, P("x")])
@pytest.mark.parametrize("cut", [False, True])
def test_leaves_that_rules_make_are_in_the_memory_of_their_template(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, spec: Any, cut: bool
) -> None:
    """Programs of a device make arrays in its own memory."""
    if not cut:
        monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    devices = jax.devices()[:2]
    sharding = (
        SingleDeviceSharding(devices[1], memory_kind=kind)
        if spec is None
        else NamedSharding(Mesh(np.array(devices), ("x",)), spec, memory_kind=kind)
    )
    values = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    file = {f"@w.{n}": layer for n, layer in enumerate(values)} | {"@t": values[0]}
    save_pytree(file, tmp_path / "file", rename=[Rule("{*}", "{*}")])
    template = {
        "w": Struct((4, 8, 6), np.float32, sharding=sharding),
        "t": Struct((8, 6), np.float32, sharding=sharding),
    }
    rules = [Rule("@w.{l}", "@w", "a b -> l b a"), Rule("@t", "@t", "a b -> b a")]
    found = load_into_pytree(template, tmp_path / "file", rename=rules)
    link.finish()
    expected = {"w": values.transpose(0, 2, 1), "t": values[0].T}
    for name, leaf in found.items():
        assert leaf.sharding == sharding
        assert leaf.addressable_data(0).sharding.memory_kind == kind
        assert np.asarray(leaf).tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("sharding", [on for on, *_ in REARRANGED.values()], ids=REARRANGED)
def test_tensors_of_several_dtypes_are_converted_before_they_are_joined(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: Any
) -> None:
    default, host = jax.devices()[:2]
    monkeypatch.setattr(reading, "is_on_host", lambda device: device == host)
    values = np.arange(4000, dtype=np.float32).reshape(1000, 4) / 3
    file = {f"w.{n}": values.astype(d) for n, d in enumerate(["<f4", "<f2", "<i4", "<f2"])}
    save_pytree(file, tmp_path / "file", rename=[Rule("{*}", "{*}")])
    link.reset()
    template = {"w": Struct((4, 4, 1000), np.float32, sharding=sharding(default))}
    rules = [Rule("w.{l}", "w", "a b -> l b a")]
    found = load_into_pytree(template, tmp_path / "file", rename=rules, cast=True)
    link.finish()
    expected = np.stack([stored.astype(np.float32).T for stored in file.values()])
    assert np.array_equal(found["w"], expected)


def test_what_is_read_slowly_is_waited_for(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches wait to be read when the ring is full, and before one that is larger than the ring."""
    read_into = FileSource.read_into

    def slowly(source: FileSource, buffers: Any, offset: int) -> int:
        time.sleep(0.002)
        return read_into(source, buffers, offset)

    tree = tree_of(30, 1500)
    tree = {f"{name}{'large' * (i % 10 == 9)}": leaf for i, (name, leaf) in enumerate(tree.items())}
    tree |= {f"w{i}large": jnp.arange(30_000.0) + i for i in (9, 19)}
    save_pytree(tree, tmp_path / "file")
    link.reset()
    monkeypatch.setattr(read_pool, "_INLINE", 0)  # threads read everything
    monkeypatch.setattr(FileSource, "read_into", slowly)
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert_same(found, tree)
    assert 120_000 <= link.most_memory <= 120_000 + sum(RING)


def test_equal_arrays_of_a_group_are_transferred_together(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {f"w{n:04}": jnp.full(3, n, jnp.float32) for n in range(1100)}
    save_pytree(tree, tmp_path / "file")
    put: Any = jax.device_put
    shapes: list[tuple[int, ...]] = []

    def device_put(values: Any, *arguments: Any) -> Any:
        shapes.extend(value.shape for value in (values if isinstance(values, list) else [values]))
        return put(values, *arguments)

    monkeypatch.setattr(jax, "device_put", device_put)
    found = load_pytree(tmp_path / "file")
    link.finish()
    assert_same(found, tree)
    moved = [shape for shape in shapes if shape]  # not what JAX itself makes
    assert moved == [(128, 3)] * 8 + [(3,)] * (1100 - 8 * 128)


def test_the_host_beside_a_device_keeps_no_memory_of_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's array is not copied, so it must not be in memory that is used again."""
    *hosts, device = jax.devices()[:3]
    monkeypatch.setattr(reading, "is_on_host", lambda other: other in hosts)
    monkeypatch.setattr(staging, "_start_pinning", lambda *_: None)
    monkeypatch.setattr(ahead, "RING", RING)
    monkeypatch.setattr(reading, "_STAGED_BATCH", BATCH)
    monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    put = jax.device_put

    def copied(value: Any, sharding: Any) -> Any:
        return np.array(value) if device in sharding.device_set else value

    def device_put(values: Any, *places: Any) -> Any:
        if isinstance(values, list):
            values = [copied(*pair) for pair in zip(values, places[0], strict=True)]
        return put(values, *places)

    monkeypatch.setattr(jax, "device_put", device_put)
    file: dict[str, Any] = {
        "w.0": np.arange(2048, dtype=np.float32),
        "w.1": np.arange(2048, dtype=np.float16),
        **{f"z.{number}": np.full(1024, -number, np.float32) for number in range(50)},
    }
    save_pytree(file, tmp_path / "file", rename=[Rule("{*}", "{*}")])
    rows = NamedSharding(Mesh(np.array(hosts), ("x",)), P("x"))
    template = {
        "w": Struct((2, 2048), np.float32, sharding=rows),
        "z": [Struct((1024,), np.float32, sharding=SingleDeviceSharding(device))] * 50,
    }
    names = [Rule("w.{l}", "w", "a -> l a"), Rule("z.{i}", "z.{i}")]
    found = load_into_pytree(template, tmp_path / "file", cast=True, rename=names)
    assert np.asarray(found["w"]).tolist() == [[*range(2048)]] * 2
    assert [float(array[-1]) for array in found["z"]] == [-number for number in range(50)]


def test_arrays_are_ready_when_all_of_them_are() -> None:
    class Transfer:
        def __init__(self, is_over: bool) -> None:
            self.is_over = is_over

        def is_ready(self) -> bool:
            return self.is_over

    assert ahead._are_ready([Transfer(True), Transfer(True)])
    assert not ahead._are_ready([Transfer(True), Transfer(False)])

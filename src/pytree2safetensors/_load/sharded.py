"""Arrays in shardings: every device gets its slices, read straight from their ranges.

Specification: *Loading into a template*.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from pytree2safetensors._errors import errors_of
from pytree2safetensors._format.digests import check_digest, hash_blocks
from pytree2safetensors._format.tensor import BITS, TensorInfo
from pytree2safetensors._leaves.decode import cast_array, from_bytes
from pytree2safetensors._leaves.encode import host_array
from pytree2safetensors._leaves.extents import (
    BAND,
    Part,
    Region,
    Runs,
    bands_of,
    common,
    gather,
    ranges_of,
    region_of,
    runs_in,
    shape_of,
    span_of,
    starts_of,
    within,
)
from pytree2safetensors._leaves.keys import is_key_dtype
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._leaves.to_jax import weaken, wrap_key
from pytree2safetensors._load.api import aligned, read
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._storage.byte_source import Read, read_ranges
from pytree2safetensors._storage.progress import Progress, Report, part_of

_SMALL: Final = 1 << 20  # bytes: smaller arrays are cut by JAX, which is sooner done
_BATCH: Final = 64 << 20  # bytes that are read into one piece of memory
_LONG: Final = 1 << 16  # bytes: a run worth a read of its own
_GAP: Final = 1 << 14  # bytes between runs: shorter ones are read sooner than skipped
_ALIGNMENT: Final = 64
_ANY_MESH: Final = getattr(jax.sharding, "AbstractMesh", ())  # JAX 0.4.30 has none


def concrete(sharding: Sharding) -> Sharding | None:
    """The sharding itself, or that on the mesh in force where it names no devices; None without."""
    mesh = getattr(sharding, "mesh", None)
    if not isinstance(mesh, _ANY_MESH):
        return sharding
    current: Any = getattr(jax.sharding, "get_mesh", lambda: None)()
    if current is None or current.empty or current.shape_tuple != mesh.shape_tuple:
        return None
    found: Any = sharding  # what has a mesh has a spec
    return jax.sharding.NamedSharding(current, found.spec, memory_kind=found.memory_kind)


def misplaced(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    """Why an array of this shape cannot be in a sharding; None where it can."""
    found = concrete(sharding)
    if found is None:
        return (
            "the sharding that the template has for it names no devices, as its mesh is abstract; "
            "load under jax.set_mesh, or give the template concrete shardings"
        )
    try:
        found.shard_shape(shape)
    except ValueError as error:
        return f"it does not fit the sharding of its template: {error}"
    return None


def place(value: Any, sharding: Sharding) -> jax.Array:
    """Put the values of an array into a sharding, of which this process may hold a part."""
    is_global = not getattr(value, "is_fully_addressable", True)
    if is_global or _is_ordinary(sharding, value.shape):
        moved: jax.Array = jax.device_put(value, sharding)
        return moved
    if is_key_dtype(value.dtype):
        shards = [
            jax.device_put(value[index], _single(device, sharding))
            for device, index in sharding.addressable_devices_indices_map(value.shape).items()
        ]
        return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)
    host = host_array(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_ordinary(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    """Whether JAX itself puts what this process has into a sharding.

    The shards that pmap makes lack an axis, and JAX puts nothing into its shardings.
    """
    return sharding.is_fully_addressable and len(sharding.shard_shape(shape)) == len(shape)


def _single(device: jax.Device, sharding: Sharding) -> Sharding:
    return SingleDeviceSharding(device, memory_kind=getattr(sharding, "memory_kind", None))


# --- what there is to read --------------------------------------------------------------------


class Wanted(NamedTuple):
    """A tensor, the leaf to make of it, and where its values shall live."""

    name: str
    leaf: LeafSpec
    sharding: Sharding


class ShardPlan(NamedTuple):
    """What this process has to read of a tensor, and for which devices."""

    wanted: Wanted
    info: TensorInfo
    regions: dict[Region, list[jax.Device]]
    whole: bool  # whether JAX shall cut it
    size: int  # in bytes, of what is read


def plan_shards(store: OpenCheckpoint, wanted: Wanted) -> ShardPlan:
    """Plan what to read for a sharding."""
    name, leaf, sharding = wanted
    info = store.infos[name]
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    regions: dict[Region, list[jax.Device]] = {}
    for device, index in indices.items():
        regions.setdefault(region_of(index or (), info.shape), []).append(device)
    if info.nbytes < _SMALL and _is_ordinary(sharding, leaf.shape):
        return ShardPlan(wanted, info, regions, True, info.nbytes)
    size = sum(math.prod(shape_of(region)) for region in regions) * _itemsize(info)
    return ShardPlan(wanted, info, regions, False, size)


def _itemsize(info: TensorInfo) -> int:
    return BITS[info.dtype] // 8


def read_sharded(
    store: OpenCheckpoint, plans: Sequence[ShardPlan], mmap: bool, progress: Progress | None
) -> list[jax.Array]:
    """Carry out plans: read, and make the arrays."""
    found: list[Any] = [None] * len(plans)
    total, done = sum(plan.size for plan in plans), 0
    for batch in _batches(plans):
        chosen = [plans[position] for position in batch]
        make = _cut_by_jax if chosen[0].whole else _cut_by_us
        made = make(store, chosen, mmap, part_of(progress, done, total))
        for position, array in zip(batch, made, strict=True):
            found[position] = _finished(store, plans[position].wanted, array)
        done += sum(plan.size for plan in chosen)
    return found


def _batches(plans: Sequence[ShardPlan]) -> Iterator[list[int]]:
    """The positions of plans that are carried out together, of one kind and up to some size."""
    for whole in (True, False):
        batch: list[int] = []
        size = 0
        for position, plan in enumerate(plans):
            if plan.whole is not whole:
                continue
            if batch and size + plan.size > _BATCH:
                yield batch
                batch, size = [], 0
            batch.append(position)
            size += plan.size
        if batch:
            yield batch


def _finished(store: OpenCheckpoint, wanted: Wanted, array: jax.Array) -> jax.Array:
    stored = store.spec_of(wanted.name)
    if not stored.weak or array.dtype != stored.dtype:  # what was cast is as the template has it
        return array
    weak = weaken(array)
    return weak if weak.sharding == wanted.sharding else jax.device_put(weak, wanted.sharding)


def _cut_by_jax(
    store: OpenCheckpoint, plans: Sequence[ShardPlan], mmap: bool, progress: Progress | None
) -> list[jax.Array]:
    names = {plan.wanted.name for plan in plans}
    hosts = read(store, names, mmap, progress)
    if len(names) < len(plans):  # read once, and counted for each
        Report(progress, sum(plan.size for plan in plans)).finish()
    values: list[Any] = []
    for (name, leaf, _), *_ in plans:
        if leaf.kind == "key":
            values.append(wrap_key(hosts[name], leaf.impl))
        else:
            values.append(cast_array(hosts[name], leaf.dtype))
    made: list[jax.Array] = jax.device_put(values, [plan.wanted.sharding for plan in plans])
    return made


# --- shards one by one ------------------------------------------------------------------------


class _Shard(NamedTuple):
    """A region of a tensor, where it stands in the file, and the memory that it has here."""

    plan: ShardPlan
    region: Region
    runs: Runs
    memory: NDArray[np.uint8]
    offset: int

    def raw(self) -> NDArray[np.uint8]:
        return self.memory[self.offset : self.offset + self.runs.number * self.runs.length]

    def items(self) -> NDArray[Any]:
        unit = np.dtype(f"u{_itemsize(self.plan.info)}")
        found: NDArray[Any] = np.ndarray(shape_of(self.region), unit, self.memory, self.offset)
        return found


def _cut_by_us(
    store: OpenCheckpoint, plans: Sequence[ShardPlan], mmap: bool, progress: Progress | None
) -> list[jax.Array]:
    shards = (_mapped if mmap else _read)(store, plans, progress)
    if store.digests is not None:
        for plan, mine in zip(plans, shards, strict=True):
            if plan.wanted.sharding.is_fully_addressable:
                parts = [Part(shard.region, shard.items()) for shard in mine]
                pieces = gather(parts, plan.info.shape, _itemsize(plan.info))
                hashes = hash_blocks(piece for _, piece in pieces)
                check_digest(plan.wanted.name, plan.info, hashes, store.digests, store.label)
    return _assembled(plans, shards, store.label)


def _allocated(plans: Sequence[ShardPlan], is_needed: Callable[[Runs], bool]) -> list[list[_Shard]]:
    """Give each region that needs it a place in memory, all in one piece."""
    shards: list[list[_Shard]] = []
    size = 0
    nothing = np.empty(0, np.uint8)
    for plan in plans:
        mine: list[_Shard] = []
        for region in plan.regions:
            runs = runs_in(region, plan.info.shape, _itemsize(plan.info))
            if is_needed(runs):
                mine.append(_Shard(plan, region, runs, nothing, size))
                size += -(-runs.number * runs.length // _ALIGNMENT) * _ALIGNMENT
            else:
                mine.append(_Shard(plan, region, runs, nothing, -1))
        shards.append(mine)
    memory = aligned(size)
    return [
        [shard if shard.offset < 0 else shard._replace(memory=memory) for shard in mine]
        for mine in shards
    ]


def _mapped(
    store: OpenCheckpoint, plans: Sequence[ShardPlan], progress: Progress | None
) -> list[list[_Shard]]:
    """Shards that are one run as they are in the file, copies of the others."""
    maps: dict[int, NDArray[np.uint8]] = {}
    copies: list[tuple[NDArray[Any], NDArray[Any]]] = []
    found: list[list[_Shard]] = []
    for mine in _allocated(plans, lambda runs: runs.number > 1):
        found.append([])
        for shard in mine:
            source, start = store.places[shard.plan.wanted.name]
            if id(source) not in maps:
                maps[id(source)] = source.map()
            mapped = maps[id(source)]
            if shard.offset < 0:
                info = shard.plan.info
                if shard.runs.number:
                    start += span_of(shard.region, info.shape, _itemsize(info))[0]
                found[-1].append(shard._replace(memory=mapped, offset=start))
            else:
                info, items = shard.plan.info, shard.items()
                whole: NDArray[Any] = np.ndarray(info.shape, items.dtype, mapped, start)
                bounds = tuple((0, size) for size in info.shape)
                copies.append((items, whole[within(shard.region, bounds)]))
                found[-1].append(shard)
    if copies:
        with ThreadPoolExecutor(_workers(len(copies)), "pytree2safetensors-copy") as pool:
            for _ in pool.map(lambda pair: np.copyto(*pair), copies):
                pass
    Report(progress, sum(plan.size for plan in plans)).finish()
    return found


def _workers(tasks: int) -> int:
    return min(4, os.cpu_count() or 1, tasks)


def _read(
    store: OpenCheckpoint, plans: Sequence[ShardPlan], progress: Progress | None
) -> list[list[_Shard]]:
    """Read long runs straight to where they belong, and short ones in bands that are cut here."""
    shards = _allocated(plans, lambda _: True)
    reads: list[Read] = []
    bands: list[tuple[list[_Shard], Region]] = []
    banded = 0
    for plan, mine in zip(plans, shards, strict=True):
        source, start = store.places[plan.wanted.name]
        if all(map(_is_direct, mine)):
            for shard in mine:
                view = memoryview(shard.raw())  # type: ignore[arg-type] # before 3.12 no type says buffer
                length = shard.runs.length
                starts = starts_of(shard.region, plan.info.shape, _itemsize(plan.info))
                for count, position in enumerate(starts.tolist()):
                    piece = view[count * length : (count + 1) * length]
                    reads.append(Read(source, start + position, piece))
        else:
            banded += plan.size
            bands.extend((mine, band) for band in bands_of(plan.info.shape, _itemsize(plan.info)))
    reads.sort(key=lambda read: (id(read.source), read.offset))
    total = sum(plan.size for plan in plans)
    read_ranges(reads, part_of(progress, 0, total))
    if bands:
        _read_bands(store, bands, Report(part_of(progress, total - banded, total), banded))
    return shards


def _is_direct(shard: _Shard) -> bool:
    """Whether the runs of a shard are worth a read each."""
    number, length = shard.runs
    return number <= 1 or length >= _LONG


def _read_bands(
    store: OpenCheckpoint, bands: Sequence[tuple[list[_Shard], Region]], report: Report
) -> None:
    workers = _workers(len(bands))

    def run(worker: int) -> None:
        memory = aligned(BAND)
        for shards, band in bands[worker::workers]:
            memory = _read_band(store, shards, band, memory, report)

    with ThreadPoolExecutor(workers, "pytree2safetensors-read") as pool:
        for _ in pool.map(run, range(workers)):
            pass
    report.finish()


def _read_band(
    store: OpenCheckpoint,
    shards: list[_Shard],
    band: Region,
    memory: NDArray[np.uint8],
    report: Report,
) -> NDArray[np.uint8]:
    """Read what shards need of a band, and copy it to where it belongs."""
    plan = shards[0].plan
    shape, itemsize = plan.info.shape, _itemsize(plan.info)
    cuts = [(shard, common(band, shard.region)) for shard in shards]
    needed = [(shard, cut) for shard, cut in cuts if cut is not None]
    if not needed:
        return memory
    origin, end = span_of(band, shape, itemsize)
    if len(memory) < end - origin:
        memory = aligned(end - origin)
    view = memoryview(memory)  # type: ignore[arg-type] # before 3.12 no type says buffer
    source, start = store.places[plan.wanted.name]
    if plan.size == plan.info.nbytes:  # nothing of the tensor is left out
        ranges = [(origin, end)]
    else:
        ranges = list(ranges_of((cut for _, cut in needed), shape, itemsize, _GAP))
    for first, last in ranges:
        source.fill([view[first - origin : last - origin]], start + first)
    whole: NDArray[Any] = np.ndarray(shape_of(band), f"u{itemsize}", memory)
    for shard, cut in needed:
        shard.items()[within(cut, shard.region)] = whole[within(cut, band)]
        report.add(math.prod(shape_of(cut)) * itemsize)
    return memory


def _assembled(
    plans: Sequence[ShardPlan], shards: Sequence[list[_Shard]], label: str
) -> list[jax.Array]:
    """Hand shards to their devices, all at once, and make arrays of them."""
    hosts: list[Any] = []
    places: list[Sharding] = []
    for shard in (shard for mine in shards for shard in mine):
        with errors_of(label):
            values = _values(shard)
        for device in shard.plan.regions[shard.region]:
            hosts.append(values)
            places.append(_single(device, shard.plan.wanted.sharding))
    made = iter(jax.device_put(hosts, places))
    arrays: list[jax.Array] = []
    for plan in plans:
        _, leaf, sharding = plan.wanted
        parts = [next(made) for devices in plan.regions.values() for _ in devices]
        if leaf.kind == "key":
            parts = [wrap_key(part, leaf.impl) for part in parts]
        by_device = {device: part for part in parts for device in part.devices()}
        order = sharding.addressable_devices_indices_map(leaf.shape)
        parts = [by_device[device] for device in order]
        arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts))
    return arrays


def _values(shard: _Shard) -> NDArray[Any]:
    name, leaf, sharding = shard.plan.wanted
    shape = shape_of(shard.region)
    info = shard.plan.info._replace(shape=shape, nbytes=len(shard.raw()))
    values = from_bytes(shard.memory, info, name, shard.offset)
    values = cast_array(values, leaf.dtype)
    beyond = shape[len(leaf.shape) :] if leaf.kind == "key" else ()
    return values.reshape((*sharding.shard_shape(leaf.shape), *beyond))

"""Arrays in shardings: saved and loaded by the tests of several modules."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec, Sharding
from numpy.typing import NDArray

import pytree2safetensors as p2s
from pytree2safetensors._leaves import placement, regions, staging
from pytree2safetensors._leaves.regions import Region
from pytree2safetensors._load import ahead, plan, reading, slots

P: Any = PartitionSpec  # JAX gives its constructor no types
Struct: Any = jax.ShapeDtypeStruct

SPECS: dict[str, Any] = {
    "rows": P("x"),
    "all rows": P(("x", "y")),
    "columns": P(None, "x"),
    "all columns": P(None, ("y", "x")),
    "mixed": P("x", "y"),
    "mixed, the other way": P("y", "x"),
    "partly replicated": P("y"),
    "replicated": P(),
}

ROUTES = ("by JAX", "direct", "bands")


def take_route(route: str, patch: pytest.MonkeyPatch) -> None:
    """Read small arrays as large ones are read."""
    if route == "by JAX":
        return
    patch.setattr(plan, "_CUT_BY_JAX", 0)
    patch.setattr(regions, "BAND", 256)
    if route == "direct":
        patch.setattr(slots, "_LONG", 1)


def pretend_that_devices_are_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Let arrays pass through a ring of memory, which a transfer copies."""
    put = jax.device_put

    def transfer(values: Any, *arguments: Any) -> Any:
        is_list = isinstance(values, list)
        return put([np.array(value) for value in values] if is_list else values, *arguments)

    patch.setattr(jax, "device_put", transfer)
    patch.setattr(staging, "_start_pinning", lambda *_: None)
    patch.setattr(ahead, "RING", (1 << 10,))
    patch.setattr(reading, "_STAGED_BATCH", 1 << 8)
    for module in (placement, reading):
        patch.setattr(module, "is_on_host", lambda _: False)


def is_key(array: Any) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))  # type: ignore[attr-defined] # public, and not exported


def raw(array: Any) -> bytes:
    values = np.asarray(jax.random.key_data(array) if is_key(array) else array)
    packed = values.dtype.name in {"int4", "uint4"}  # half of each byte means nothing
    return (values.astype(np.int8) if packed else values).tobytes()


def assert_in_place(found: Any, expected: Any, sharding: Sharding) -> None:
    """Assert the sharding, the dtype, the shape, and the bits on each device."""
    assert isinstance(found, jax.Array)
    if is_key(found):  # JAX writes the shardings of keys differently
        assert found.sharding.is_equivalent_to(sharding, found.ndim)
    else:
        assert found.sharding == sharding
    assert is_committed(found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert {shard.device for shard in found.addressable_shards} == sharding.addressable_devices
    expected = expected if is_key(expected) else np.asarray(expected)
    for shard in found.addressable_shards:
        # The index of keys also has the axes of their data.
        index = shard.index[: len(expected.shape)]
        assert raw(shard.data) == raw(expected[index])


def is_committed(array: jax.Array) -> bool:
    committed = getattr(array, "committed", None)  # public since JAX 0.5
    return bool(array._committed if committed is None else committed)  # type: ignore[attr-defined] # the older name


def values_of(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> NDArray[Any]:
    """An array of random bits, NaNs among them."""
    dtype = np.dtype(dtype)
    count = math.prod(shape)
    bits = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype == np.bool_:
        bits = bits % 2
    found: NDArray[Any] = (
        bits.astype(dtype) if dtype.name in {"int4", "uint4"} else bits.view(dtype)
    )
    return found.reshape(shape)


def into(path: Any, shape: Any, dtype: Any, sharding: Sharding, **options: Any) -> Any:
    return p2s.load_into_pytree([Struct(shape, dtype, sharding=sharding)], path, **options)[0]


def select(array: NDArray[Any], region: Region) -> NDArray[Any]:
    part: NDArray[Any] = array[tuple(slice(*bounds) for bounds in region)]
    return part

"""Which device saves which region of an array."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pytree2safetensors import UnsupportedLeafError
from pytree2safetensors._leaves.ownership import ownership
from pytree2safetensors._leaves.regions import region_of

P: Any = PartitionSpec  # JAX gives its constructor no types

SPECS: list[Any] = [
    P(), P("x"), P("y"), P(("x", "y")), P(("y", "x")), P(None, "x"), P("x", "y"), P(None, ("x", "y")),
]  # fmt: skip


@given(
    st.permutations(range(8)),
    st.sampled_from([(2, 4), (8, 1), (4, 2)]),
    st.sampled_from(SPECS),
    st.sampled_from([(8, 8), (16, 24), (0, 8), (8, 8, 3)]),
)
def test_the_owners_tile_an_array(
    order: list[int], sizes: tuple[int, int], spec: Any, shape: tuple[int, ...]
) -> None:
    devices = np.array(jax.devices())[order].reshape(sizes)
    sharding = NamedSharding(Mesh(devices, ("x", "y")), spec)
    times = np.zeros(shape, np.int8)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if device in ownership(sharding, shape).devices:
            times[index] += 1
    assert (times == 1).all()


def test_of_equal_copies_the_device_with_the_lowest_id_has_the_owned_one() -> None:
    for order in (0, 1, 2, 3), (3, 1, 0, 2):
        mesh = Mesh(np.array(jax.devices())[list(order)].reshape(2, 2), ("x", "y"))
        (owner,) = ownership(NamedSharding(mesh, P()), (4,)).devices
        assert owner.id == 0
    assert ownership(SingleDeviceSharding(jax.devices()[3]), (4,)).devices == {jax.devices()[3]}


def test_the_digest_is_of_devices_and_regions() -> None:
    devices = np.array(jax.devices()[:4])
    mesh, turned = Mesh(devices, ("x",)), Mesh(devices[::-1], ("x",))
    digests = {
        ownership(NamedSharding(mesh, spec), shape).digest
        for spec in (P("x"), P(None, "x"), P())
        for shape in ((4, 4), (8, 4))
    }
    assert len(digests) == 6
    rows = ownership(NamedSharding(mesh, P("x")), (4, 4)).digest
    assert rows in digests
    assert ownership(NamedSharding(turned, P("x")), (4, 4)).digest not in digests
    # The order of the mesh does not matter if it changes no region.
    assert ownership(NamedSharding(turned, P()), (4, 4)).digest in digests


class Overlapping:
    """A sharding with two devices whose parts overlap."""

    def __init__(self, indices: list[slice]) -> None:
        self.indices = indices

    def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, tuple[slice, ...]]:
        return {d: (i,) for d, i in zip(jax.devices(), self.indices, strict=False)}

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        ((start, stop),) = region_of((self.indices[0],), shape)
        return (stop - start,)


@pytest.mark.parametrize(
    "indices",
    [
        [slice(0, 3), slice(2, 5)],
        [slice(0, 2), slice(4, 6)],
        [slice(0, 2), slice(2, 4)],
        [slice(0, 4), slice(4, 6)],
        [slice(0, 3)],
    ],
)
def test_shards_that_do_not_tile_an_array_are_refused(indices: list[slice]) -> None:
    with pytest.raises(UnsupportedLeafError, match=r"of an array of shape \(6,\) do not tile it"):
        ownership(Overlapping(indices), (6,))


def test_shards_without_values_do_not_tile_an_array_with_values() -> None:
    class Empty:
        def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
            return {device: tuple(slice(0, 0) for _ in shape) for device in jax.devices()}

    assert len(ownership(Empty(), (0, 3)).devices) == 1
    with pytest.raises(UnsupportedLeafError, match=r"of shape \(4,\) do not tile it"):
        ownership(Empty(), (4,))

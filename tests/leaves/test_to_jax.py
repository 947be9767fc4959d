"""JAX arrays from values: their weak types, and many equal arrays at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from placed import P, is_committed
from pytree2safetensors._leaves.to_jax import to_jax, weaken


def test_a_dtype_without_a_weak_type_stays_as_it_is() -> None:
    array = jnp.asarray(3, jnp.int8)
    assert weaken(array) is array
    assert weaken(jnp.asarray(3, jnp.int32)).weak_type


@pytest.mark.parametrize("keeps_memory", [True, False])
def test_many_equal_arrays_have_their_own_values(keeps_memory: bool) -> None:
    arrays = [np.full(3, number, np.float32) for number in range(1200)]
    found = to_jax(arrays, keeps_memory=keeps_memory)
    for array in arrays if keeps_memory else []:
        array[:] = -1
    assert [np.asarray(array).tolist() for array in found] == [[n] * 3 for n in range(1200)]


def test_many_equal_arrays_are_transferred_together(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.full(3, number, np.float32) for number in range(1300)]
    first, second = jax.devices()[:2]
    on_mesh = NamedSharding(Mesh(np.array([first]), ("x",)), P())
    real: Any = jax.device_put
    puts: list[Any] = []

    def device_put(values: Any, *arguments: Any) -> Any:
        puts.append(values)
        return real(values, *arguments)

    monkeypatch.setattr(jax, "device_put", device_put)
    for sharding in (None, SingleDeviceSharding(first), SingleDeviceSharding(second), on_mesh):
        puts.clear()
        found = to_jax(arrays, [sharding] * len(arrays), keeps_memory=False)
        assert len(puts) == (1 if sharding is on_mesh else 11)  # stacks of 128, and the rest
        assert [np.asarray(array).tolist() for array in found] == [[n] * 3 for n in range(1300)]
        for array in found:
            assert is_committed(array) is (sharding is not None)
            assert sharding is None or array.sharding == sharding

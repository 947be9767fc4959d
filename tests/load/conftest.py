"""The devices that arrays are loaded into."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import Mesh


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call] # JAX gives it no types
    yield
    jax.config.update("jax_enable_x64", False)  # type: ignore[no-untyped-call] # JAX gives it no types

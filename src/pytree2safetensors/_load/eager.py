"""Making JAX arrays that have values, whatever JAX traces here.

Specification: *Loading*.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from pytree2safetensors._leaves.jax_versions import enable_x64, has_mesh
from pytree2safetensors._leaves.to_jax import is_mapped, own_programs
from pytree2safetensors._storage.threads import start

T = TypeVar("T")


def eagerly(make: Callable[[], T]) -> T:
    """Call a function that makes arrays. They have values, and no mesh decides where they are.

    A trace keeps the mesh that it began with. Then another thread, which has none, makes the arrays.
    """
    with jax.ensure_compile_time_eval(), own_programs():
        if not has_mesh() or is_mapped():
            return make()
    config: Any = jax.config
    device, wide = config.jax_default_device, config.jax_enable_x64

    def make_apart() -> T:
        with jax.default_device(device), enable_x64(wide), own_programs():
            return make()

    with ThreadPoolExecutor(1, "pytree2safetensors") as pool:
        return start(pool, make_apart).result()

"""Making JAX arrays that have values, whatever JAX traces here.

Specification: *Loading*.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import jax

from pytree2safetensors._leaves.jax_versions import enable_x64, has_mesh
from pytree2safetensors._leaves.to_jax import is_mapped, own_programs
from pytree2safetensors._storage.threads import start

T = TypeVar("T")


# In a thread that makes arrays for another: set if a signal has interrupted that one.
_interrupted: Final = ContextVar[threading.Event | None]("interrupted", default=None)


def check_interrupt() -> None:
    """Raise a CancelledError if a signal has interrupted the thread that waits for this one."""
    interrupted = _interrupted.get()
    if interrupted is not None and interrupted.is_set():
        raise CancelledError


def eagerly(make: Callable[[], T]) -> T:
    """Call a function that makes arrays. They have values, and no mesh decides where they are.

    A trace keeps the mesh that it began with. Then another thread, which has none, makes the arrays.
    """
    with jax.ensure_compile_time_eval(), own_programs():
        if not has_mesh() or is_mapped():
            return make()
    config: Any = jax.config
    device, wide = config.jax_default_device, config.jax_enable_x64
    interrupted, working = threading.Event(), threading.Lock()

    def make_apart() -> T:
        token = _interrupted.set(interrupted)
        try:
            with working, jax.default_device(device), enable_x64(wide), own_programs():
                check_interrupt()
                return make()
        finally:
            _interrupted.reset(token)

    with ThreadPoolExecutor(1, "pytree2safetensors") as pool:
        try:
            return start(pool, make_apart).result()
        except BaseException:
            interrupted.set()  # so that the thread ends soon
            with working:  # the pool does not wait for a thread if its start was interrupted
                raise

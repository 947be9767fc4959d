"""Every shim for a version of JAX: what newer versions have under another name, or older ones lack."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any, Final

import jax
import jax.experimental
import numpy as np

ShapeDtypeStruct: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped
# The type of references to arrays, where it has a public name: since JAX 0.8.
REFERENCE: Final[Any] = getattr(jax, "Ref", ())


@lru_cache(maxsize=1)
def structs_are_weak() -> bool:
    try:
        ShapeDtypeStruct((), np.float32, weak_type=True)
    except TypeError:  # before JAX 0.4.34 a struct has no weak type
        return False
    return True


@contextmanager
def no_mesh() -> Iterator[None]:
    sharding: Any = jax.sharding
    current = getattr(sharding, "get_abstract_mesh", None)  # JAX 0.5.0 lacks it, and older ones
    with ExitStack() as stack:
        if current is not None and not current().empty:
            enter = getattr(jax, "set_mesh", None) or sharding.use_mesh  # its name before JAX 0.8
            with suppress(ValueError):  # a trace keeps the mesh that it began with
                stack.enter_context(enter(sharding.Mesh(np.empty((), object), ())))
        yield


def enable_x64(enabled: bool) -> Any:
    experimental: Any = jax.experimental  # where it was before JAX 0.8
    return (jax if hasattr(jax, "enable_x64") else experimental).enable_x64(enabled)

"""PRNG keys: implementations, and the shapes of their data.

Specification: *Leaves*.
"""

from functools import lru_cache
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._errors import UnknownHere
from pytree2safetensors._leaves.jax_versions import ShapeDtypeStruct
from pytree2safetensors._messages import shorten

_is_subdtype: Any = jax.dtypes.issubdtype  # type: ignore[attr-defined] # public, and not exported
_PRNG: Final = ("threefry2x32", "rbg", "unsafe_rbg")  # implementations in every JAX version


def is_key_dtype(dtype: Any) -> bool:
    """Return whether arrays of a dtype are typed PRNG keys."""
    return not isinstance(dtype, np.dtype) and bool(_is_subdtype(dtype, jax.dtypes.prng_key))


def implementation_name(leaf: Any) -> str | None:
    """Return the registered name of a key's implementation."""
    found = jax.random.key_impl(leaf)
    if isinstance(found, str):
        return found
    # Otherwise it has no name. Older versions always return an object, which can only be compared.
    return next((name for name in _PRNG if key_dtype(name) == leaf.dtype), None)


def key_shape(impl: str, name: str) -> tuple[int, ...]:
    """Return the shape of the data of one key of an implementation."""
    try:
        return data_shape(impl)
    except ValueError:
        reason = (
            f"is a key of the PRNG implementation {shorten(impl)}, which this process does not know; "
            "register it, or install a newer JAX"
        )
        raise UnknownHere(name, reason) from None


@lru_cache(maxsize=16)
def data_shape(impl: str) -> tuple[int, ...]:
    """Return the shape of the data of one key, or raise JAX's error if the implementation is unknown."""
    data: jax.ShapeDtypeStruct = jax.eval_shape(
        lambda: jax.random.key_data(jax.random.key(0, impl=impl))
    )
    return tuple(data.shape)


@lru_cache(maxsize=16)
def key_dtype(impl: str) -> Any:
    """Return the dtype of keys of an implementation, without making a key."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


@lru_cache(maxsize=16)
def implementation_of(dtype: Any) -> str | None:
    """Return the registered name of the implementation of keys with this dtype."""
    found: list[str | None] = []  # from a traced key: key_impl takes no ShapeDtypeStruct
    key = ShapeDtypeStruct((), dtype)
    jax.eval_shape(lambda key: found.append(implementation_name(key)), key)
    return found[0]

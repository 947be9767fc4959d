"""Arrays of floats as their bits.

Even if an operation only moves values, XLA may compute with them: it joins parts on several devices by
adding zeros, and on CPUs it converts narrow floats to wider ones and back. This changes the bits of
NaNs, and subnormal numbers become zero.

Specification: *Leaves*.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

_BITS: Final = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def moved_as_bits(move: Callable[[list[Any]], Any], arrays: Sequence[Any]) -> Any:
    """Call a function that only moves values, with JAX arrays of one dtype. No bit changes."""
    dtype = arrays[0].dtype
    if jnp.issubdtype(dtype, np.complexfloating):
        parts = [[part(array) for array in arrays] for part in (jnp.real, jnp.imag)]
        return jax.lax.complex(*(moved_as_bits(move, part) for part in parts))
    bits = _bits_of(dtype)
    if bits is None:
        return move([*arrays])
    cast = jax.lax.bitcast_convert_type
    return cast(move([cast(array, bits) for array in arrays]), dtype)


def narrow_as_bits(array: jax.Array) -> jax.Array:
    """Return an array of floats of at most 16 bits as integers; other arrays as they are.

    Wider floats on one device keep their bits without this.
    """
    bits = _bits_of(array.dtype)
    if bits is None or array.dtype.itemsize > 2:
        return array
    found: jax.Array = jax.lax.bitcast_convert_type(array, bits)
    return found


def _bits_of(dtype: Any) -> Any:
    """Return the dtype of the bits of floats; None for other dtypes, and for those below a byte."""
    info: Any = jnp.finfo  # which JAX leaves untyped
    return _BITS.get(info(dtype).bits) if jnp.issubdtype(dtype, np.floating) else None

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
    info: Any = jnp.finfo  # which JAX leaves untyped
    bits = _BITS.get(info(dtype).bits) if jnp.issubdtype(dtype, np.floating) else None
    if bits is None:
        return move([*arrays])
    cast = jax.lax.bitcast_convert_type
    return cast(move([cast(array, bits) for array in arrays]), dtype)

"""Strategies for leaves: every kind that a file can hold."""

import math
import struct
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from hypothesis.strategies import SearchStrategy

from pytree2safetensors._arguments import checked
from pytree2safetensors.testing._arrays import Draw, arrays, values_of
from pytree2safetensors.testing._keys import limits


@st.composite
def _weak_arrays(draw: Draw) -> Any:
    """Generate weakly typed 0-d JAX arrays, such as counters and hyperparameters."""
    scalar = draw(st.sampled_from([0, 0.0, 0j, False]))
    if scalar is False:  # only comparisons give weak bools
        return jax.lax.eq(jnp.asarray(draw(st.integers(0, 1))), jnp.asarray(1))
    weak = jnp.asarray(scalar)
    size = weak.dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    values = values_of(np.dtype(weak.dtype), 1, raw, draw(st.booleans())).reshape(())
    return jax.lax.full_like(weak, jax.device_put(values))


_PRNGS: Final = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}  # the words of one key
# Implementations that a program registers itself are left out.


@st.composite
def _prng_keys(draw: Draw) -> Any:
    """Generate typed PRNG key arrays of every implementation."""
    impl = draw(st.sampled_from(list(_PRNGS)))
    shape = draw(array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=2))
    raw = draw(st.binary(min_size=16, max_size=16))
    shape = (*shape, _PRNGS[impl])
    data = values_of(np.dtype(np.uint32), math.prod(shape), raw, edges=False).reshape(shape)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)


@cache
def _floats() -> SearchStrategy[float]:
    raw = st.binary(min_size=8, max_size=8)
    return (
        st.floats()
        | st.sampled_from((-0.0, math.nan, -math.nan, math.inf))
        | raw.map(lambda bits: float(struct.unpack("<d", bits)[0]))
    )


@checked
def leaves(
    arrays: SearchStrategy[Any] = arrays(),  # noqa: B008 - strategies have no state
) -> SearchStrategy[Any]:
    """Generate every kind of leaf that a file can hold.

    These are arrays, Python ints (including ints beyond 64 bits), floats (including NaNs with
    payloads and -0.0), bools, complex numbers, strs, typed PRNG key arrays, and weakly typed 0-d JAX
    arrays.

    Args:
        arrays: A strategy for the arrays.

    Specification: *Leaves*.

    >>> from hypothesis import given
    >>> @given(leaves())
    ... def test_leaf(leaf):
    ...     assert jax.tree_util.all_leaves([leaf])
    >>> test_leaf()
    """
    # Ints that Python does not print are left out, and so are strs with lone surrogates.
    return st.one_of(
        arrays,
        st.integers() | limits(),
        _floats(),
        st.booleans(),
        st.builds(complex, _floats(), _floats()),
        st.text(),
        _weak_arrays(),
        _prng_keys(),
        arrays,  # twice, because most leaves are arrays
    )

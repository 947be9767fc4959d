"""Values that a tree may hold, one for each row of the table of what survives, and how two of them are compared."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


class Point(NamedTuple):
    """A namedtuple."""

    x: Any
    y: Any


@jax.tree_util.register_pytree_with_keys_class
@dataclass
class Pair:
    """A dataclass that is a node."""

    left: Any
    right: Any

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Return the children with their keys."""
        key = jax.tree_util.GetAttrKey
        return ((key("left"), self.left), (key("right"), self.right)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Pair":
        """Make the node of its children."""
        return cls(*children)


def array() -> jax.Array:
    """Return a plain JAX array."""
    return jnp.array([1.5, -2.5, 3.5], jnp.float32)


def bits(dtype: Any, *data: int) -> np.ndarray[Any, Any]:
    """Return a NumPy array of that dtype that has these bytes."""
    return np.frombuffer(bytes(data), dtype)


def weak() -> jax.Array:
    """Return a 0-d array that is weakly typed, as a counter becomes under `jit`."""
    return jax.jit(lambda: 3)()


SPECIMENS: dict[str, Callable[[], Any]] = {
    "list": lambda: [array(), array()],
    "tuple": lambda: (array(), array()),
    "tuple in a list": lambda: [(array(), array()), array()],
    "``None``": lambda: None,
    "``None`` in a list": lambda: [array(), None],
    "empty dict": dict,
    "empty list": list,
    "empty tuple": tuple,
    "``OrderedDict``, its order": lambda: OrderedDict(b=array(), a=array()),
    "namedtuple": lambda: Point(array(), array()),
    "dataclass": lambda: Pair(array(), array()),
    "dict with ``int`` keys": lambda: {1: array(), 20: array()},
    "dict with ``tuple`` keys": lambda: {(0, "a"): array(), (1, "b"): array()},
    "dict key ``a.b``": lambda: {"a.b": array()},
    "dict key ``a/b``": lambda: {"a/b": array()},
    "dict key ``a@b#0``": lambda: {"a@b#0": array()},
    "dict key of no characters": lambda: {"": array()},
    "Python ``bool``": lambda: True,
    "Python ``int``": lambda: 7,
    "Python ``int``, 2**40": lambda: 2**40,
    "Python ``int``, 2**70": lambda: 2**70,
    "Python ``float``": lambda: 0.1,
    "Python ``complex``": lambda: 0.1 + 2j,
    "Python ``str``": lambda: "adam",
    "typed PRNG key": lambda: jax.random.key(1),
    "typed PRNG keys, ``rbg``": lambda: jax.random.split(jax.random.key(1, impl="rbg"), 3),
    "weak type": weak,
    "0-d array": lambda: jnp.float32(1.5),
    "array of no elements": lambda: jnp.zeros((0, 3), jnp.float32),
    "bool array": lambda: jnp.array([True, False]),
    "bfloat16": lambda: jnp.array([1.5, -2.5], jnp.bfloat16),
    "float16 NaN with a payload": lambda: jnp.asarray(bits(np.float16, 0x01, 0x7D, 0x55, 0xFE)),
    "float32 NaN with a payload": lambda: bits(np.float32, 1, 2, 0x83, 0x7F, 0, 0, 0, 0x80),
    "float8_e4m3fn": lambda: jnp.array([1.5, -2.5], jnp.float8_e4m3fn),
    "float8_e5m2": lambda: jnp.array([1.5, -2.5], jnp.float8_e5m2),
    "float8_e4m3b11fnuz": lambda: jnp.array([1.5, -2.5], jnp.float8_e4m3b11fnuz),
    "int4": lambda: jnp.array([1, -2, 7], jnp.int4),
    "uint4": lambda: jnp.array([1, 2, 15], jnp.uint4),
    "float4_e2m1fn": lambda: np.array([1.5, -2], ml_dtypes.float4_e2m1fn),
    "complex64": lambda: jnp.array([1 + 2j], jnp.complex64),
    "complex128, x64 off": lambda: np.array([0.1 + 2j], np.complex128),
    "float64, x64 off": lambda: np.array([0.1], np.float64),
    "int64, x64 off": lambda: np.array([2**40], np.int64),
    "NumPy scalar": lambda: np.float32(1.5),
    "NumPy, Fortran order": lambda: np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "NumPy, every second": lambda: np.arange(6, dtype=np.float32)[::2],
    "NumPy, reversed": lambda: np.arange(6, dtype=np.float32)[::-1],
    "NumPy, broadcast": lambda: np.broadcast_to(np.float32(3), (2, 3)),
    "NumPy, big-endian": lambda: np.arange(3, dtype=">f4"),
    "JAX, transposed": lambda: jnp.arange(6, dtype=jnp.float32).reshape(2, 3).T,
    "a tree that is one leaf": array,
}
BARE = {"a tree that is one leaf"}


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is a typed PRNG key array."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array or a scalar, of NumPy or of JAX."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def content(leaf: Any) -> tuple[Any, ...]:
    """Return what must be equal in two leaves that are the same."""
    if is_key(leaf):
        return "key", str(jax.random.key_impl(leaf)), content(jax.random.key_data(leaf))
    if not is_array(leaf):
        return type(leaf), leaf
    held = np.asarray(leaf)
    native = held.astype(held.dtype.newbyteorder("="))
    return native.dtype, native.shape, native.tobytes(), bool(getattr(leaf, "weak_type", False))


def same(value: Any, found: Any) -> bool:
    """Compare two trees: structure, types of leaves, dtypes, shapes, bits; NumPy or JAX may hold an array."""
    leaves, treedef = jax.tree.flatten(value)
    others, other = jax.tree.flatten(found)
    return bool(treedef == other) and list(map(content, leaves)) == list(map(content, others))


def kept(value: Any, found: Any) -> bool:
    """Return whether the values are there, in whatever structure and type."""
    leaves, others = jax.tree.leaves(value), jax.tree.leaves(found)
    return len(leaves) == len(others) and all(map(_equal, leaves, others))


def _equal(leaf: Any, found: Any) -> bool:
    if is_key(leaf):
        leaf, found = (
            jax.random.key_data(leaf),
            jax.random.key_data(found) if is_key(found) else found,
        )
    if isinstance(leaf, str) or isinstance(found, str):
        return str(leaf) == str(found)
    if not is_array(leaf):
        return bool(np.ndim(found) == 0 and np.asarray(found).item() == leaf)
    if not is_array(found):
        return bool(np.ndim(leaf) == 0 and np.ndim(found) == 0 and leaf.item() == found)
    return content(leaf)[:3] == content(found)[:3]


def describe(found: Any) -> str:
    """Say in few words what a value is."""
    if found is None or (isinstance(found, dict | list | tuple) and not found):
        return f"``{found}``"
    if is_key(found):
        return f"PRNG key, ``{jax.random.key_impl(found)}``"
    if is_array(found):
        weak_type = ", weak" if getattr(found, "weak_type", False) else ""
        return f"{found.dtype} array{weak_type}"
    if isinstance(found, dict):
        return f"``{type(found).__name__}`` with the keys " + ", ".join(
            f"``{key!r}``" for key in found
        )
    if isinstance(found, list | tuple) and any(isinstance(child, list | tuple) for child in found):
        return f"``{type(found).__name__}`` of " + ", ".join(
            type(child).__name__ for child in found
        )
    return f"``{type(found).__name__}``"

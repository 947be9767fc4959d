"""The trees in the golden files of the current format: every kind of leaf and node. They never change.

A tree that is here stays as it is, and so does its file. What is new gets a file of its own.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors import PyTreeContainer, UnkeyedContainer, save_pytree

FOLDER = Path(__file__).parent / "data" / "golden"

# NumPy's own, and those that every version of ml_dtypes has.
NATIVE = (
    "bool", "uint8", "int8", "uint16", "int16", "float16", "bfloat16", "uint32", "int32", "float32",
    "complex64", "uint64", "int64", "float64", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)  # fmt: skip
NOTED = ("complex128", "float8_e4m3b11fnuz", "int4", "uint4")
NEWER = (
    "float8_e8m0fnu", "float8_e3m4", "float8_e4m3", "int2", "uint2", "float4_e2m1fn",
    "float6_e2m3fn", "float6_e3m2fn", "int1", "uint1",
)  # fmt: skip
_WIDTHS = {"int1": 1, "int2": 2, "int4": 4, "float4": 4, "float6": 6}


class Golden(NamedTuple):
    """A tree, and how it is saved."""

    tree: Callable[[], Any]
    options: Mapping[str, Any] = {}
    needs: str = ""  # the dtype without which it cannot be made


def values(name: str, count: int = 6) -> NDArray[Any]:
    """Values of a dtype from fixed bytes, those of its edges among them."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    raw = np.arange(count * dtype.itemsize, dtype=np.uint32) * 37 + 127
    width = next((w for word, w in _WIDTHS.items() if word in name), 8)
    limit = 1 if name == "bool" else (1 << width) - 1
    return (raw & limit).astype(np.uint8).view(dtype)


def _array(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.arange(math.prod(shape)).astype(dtype).reshape(shape)


def _dtypes(names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    return {name: values(name).reshape(2, 3) for name in names}


def _scalars() -> Any:
    return {
        "bool": [False, True],
        "int": [0, -1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 10**40],
        "float": [0.0, -0.0, 0.1, math.inf, -math.inf, 5e-324],
        "complex": [0j, complex(-0.0, 1.5), complex(math.inf, -0.0)],
        "str": ["", "text", '\0\n"\\', "é\u202e\U0001f600", "\ud800"],
    }


def _arrays() -> Any:
    return {
        "0-d": np.float32(1.5),
        "empty": [_array(0), _array(3, 0, 2, dtype=np.int16), np.zeros(0, bool)],
        "order": {str(n): _array(n, dtype=np.uint8) for n in (64, 1, 63, 128, 65)},
        "sizes": [_array(3, dtype=d) for d in (np.int8, np.float64, np.float16, np.float32)],
        "fortran": np.asfortranarray(_array(2, 3)),
        "big-endian": _array(2, 3).astype(">f4"),
        "broadcast": np.broadcast_to(_array(3), (2, 3)),
        "deep": _array(*[1] * 8),
        "jax": jnp.asarray(_array(2, 2)),
        "weak": [jnp.asarray(2), jnp.asarray(-0.0), jnp.asarray(1j), jax.lax.full((), True)],
        "nan": np.array([0x7FC00001, 0xFF800001, 0x80000000, 1], np.uint32).view(np.float32),
    }


def _keys() -> Any:
    return {
        "one": jax.random.wrap_key_data(jnp.arange(2, dtype=jnp.uint32), impl="threefry2x32"),
        "many": jax.random.wrap_key_data(
            jnp.arange(24, dtype=jnp.uint32).reshape(3, 2, 4), impl="rbg"
        ),
        "none": jax.random.wrap_key_data(jnp.zeros((0, 4), jnp.uint32), impl="unsafe_rbg"),
        "old": jnp.arange(2, dtype=jnp.uint32),
    }


def _nodes() -> Any:
    x = np.float32(1)
    return {
        "dict": {"b": x, "a": {}},
        "OrderedDict": OrderedDict([("b", x), ("a", OrderedDict())]),
        "list": [x, [], [None], [None, x], [x, None]],
        "tuple": (x, (), ((),), (None,)),
        "None": None,
        "container": PyTreeContainer({"b": x, "a": PyTreeContainer(), "c": (1,)}),
        "unkeyed": UnkeyedContainer([x, UnkeyedContainer(), [x], None]),
        "keys": {(1, "x"): x, (1, "y", (None, b"\xff", 1.5, True)): x},
        "numbers": {2: x, -1: x, 10**30: x},
        "marks": {".@#\\": {"": PyTreeContainer({"": x, "__metadata__": x, "a.b": x})}},
        "text": {"é": x, "\0": x, "\u202e": x, "\U0001f600": x, " ": x, "(1)": x},
        "attributes": PyTreeContainer({"__class__": x, "layers": [PyTreeContainer({"w": x})]}),
    }


def _large() -> Any:
    return {"w": _array(512, 513), "b": _array(3)}


GOLDEN: dict[str, Golden] = {
    "arrays": Golden(_arrays),
    "dtypes": Golden(lambda: _dtypes(NATIVE)),
    **{f"dtype-{name}": Golden(partial(_dtypes, (name,)), needs=name) for name in NOTED},
    **{f"dtype-{name}": Golden(partial(_dtypes, (name,)), needs=name) for name in NEWER},
    "scalars": Golden(_scalars),
    "keys": Golden(_keys),
    "nodes": Golden(_nodes),
    "root-leaf": Golden(lambda: _array(2, 2)),
    "root-str": Golden(lambda: "text"),
    "root-none": Golden(lambda: None),
    "root-dict": Golden(dict),
    "root-list": Golden(list),
    "root-tuple": Golden(lambda: (1, 2)),
    "root-container": Golden(lambda: PyTreeContainer({"__metadata__": 1, "b": 2})),
    "root-unkeyed": Golden(lambda: UnkeyedContainer([1, 2])),
    "metadata": Golden(lambda: {"a": 1}, {"metadata": {"z": "1", "é\0": "\U0001f600", "a": ""}}),
    "format": Golden(lambda: {"a": 1}, {"metadata": {"format": "pt"}}),
    "checksum": Golden(lambda: {"a": (_array(2, 3), "text"), "é": 1}, {"checksum": True}),
    "sharded": Golden(
        lambda: {"a": [_array(16), _array(4)], "b": (1, "text"), "c": _array(40)},
        {"max_shard_size": 100, "metadata": {"run": "1"}, "checksum": True},
    ),
    # Only the head of this file is kept. The tests make its data from the tree.
    "large": Golden(_large),
}
HEADS = {"large": 4096}


def can_make(golden: Golden) -> bool:
    """Whether the tree can be made with the installed version of ml_dtypes."""
    return not golden.needs or hasattr(ml_dtypes, golden.needs) or hasattr(np, golden.needs)


def save(name: str, path: Path) -> dict[str, bytes]:
    """Save a tree, and return the files that it makes."""
    tree, options, _ = GOLDEN[name]
    if "max_shard_size" in options:
        save_pytree(tree(), path / name, **options)
        return {f"{name}/{file.name}": file.read_bytes() for file in (path / name).iterdir()}
    file = path / f"{name}.safetensors"
    save_pytree(tree(), file, **options)
    return {file.name: file.read_bytes()[: HEADS.get(name)]}

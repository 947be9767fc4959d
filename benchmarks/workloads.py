"""The trees that every system saves and loads.

A skeleton is a tree of `jax.ShapeDtypeStruct`; `fill` makes the same tree of arrays, always with the same bits, so
that a worker which loads can check what it got without having been told.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(jnp.bfloat16)
SMALL_ARRAY = 1 << 16
DEVICES = 8


class Layer(NamedTuple):
    """Three small arrays with names, the inner node of the train state."""

    kernel: Any
    bias: Any
    scale: Any


class AdamState(NamedTuple):
    """What Adam remembers."""

    count: Any
    mu: Any
    nu: Any


class TrainState(NamedTuple):
    """Parameters and the optimizer's state."""

    step: Any
    params: Any
    opt_state: AdamState


def spec(*shape: int, dtype: np.dtype[Any] = FLOAT32) -> jax.ShapeDtypeStruct:
    """Describe one array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def big(scale: float) -> Any:
    """16 float32 arrays, 1 GiB together at scale 1, in dicts and lists."""
    rows = max(1, int(4096 * scale))
    return {
        "encoder": {"layers": [{"kernel": spec(rows, 4096)} for _ in range(8)]},
        "decoder": {"layers": [{"kernel": spec(rows, 4096)} for _ in range(8)]},
    }


def model(scale: float) -> Any:
    """200 bfloat16 weights of 1 to 4 MB and 200 float32 vectors of 4 to 32 KB, 535 MB together at scale 1."""
    width = max(1, int(1024 * scale))
    block = {
        "attention": {
            "query": spec(width, 512, dtype=BFLOAT16),
            "out": spec(width, 1024, dtype=BFLOAT16),
        },
        "mlp": {"up": spec(width, 2048, dtype=BFLOAT16), "down": spec(width, 1600, dtype=BFLOAT16)},
        "norms": [spec(1024), spec(2048), spec(4096), spec(8192)],
    }
    return {"blocks": [block for _ in range(50)]}


def many(scale: float) -> Any:
    """100,000 leaves of shape (4,) at scale 1, in dicts and lists, five deep."""
    groups = max(1, round(100 * scale))
    return {
        "model": [
            {"heads": [{name: spec(4) for name in ("a", "b", "c", "d", "e")} for _ in range(200)]}
            for _ in range(groups)
        ]
    }


def train_state(scale: float) -> Any:
    """Describe a train state of namedtuples, with 20,000 small leaves at scale 1."""
    layer = Layer(kernel=spec(16, 32), bias=spec(32), scale=spec(16))
    blocks = max(1, round(1111 * scale))
    weights = {"blocks": [{"attention": layer, "mlp": layer} for _ in range(blocks)]}
    counter = spec(dtype=np.dtype(np.int32))
    return TrainState(
        step=counter, params=weights, opt_state=AdamState(count=counter, mu=weights, nu=weights)
    )


def sharded(axis: int) -> Callable[[float], Any]:
    """Make the skeleton whose arrays are divided along `axis` over eight devices."""

    def skeleton(scale: float) -> Any:
        devices = jax.devices()[:DEVICES]
        names = ["x", None] if axis == 0 else [None, "x"]
        sharding = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(devices), ("x",)), jax.sharding.PartitionSpec(*names)
        )
        rows = max(8, int(4096 * scale) // 8 * 8)
        return {
            f"w{i:02}": jax.ShapeDtypeStruct((rows, 5120), FLOAT32, sharding=sharding)
            for i in range(12)
        }

    return skeleton


class Workload(NamedTuple):
    """One tree: its title, its skeleton by scale, and the scale of the tree that warms a system up."""

    title: str
    skeleton: Callable[[float], Any]
    warm_up: float
    devices: int = 1


WORKLOADS = {
    "large": Workload("16 float32 arrays, 1 GiB", big, 1 / 512),
    "model": Workload("400 bfloat16 and float32 arrays, 535 MB", model, 1 / 256),
    # More than 1,024 leaves of each shape: from there on this library compiles a program for a shape.
    "many": Workload("100,000 arrays of shape (4,)", many, 1 / 50),
    "state": Workload("a train state of 20,000 small arrays", train_state, 1 / 6),
    "rows": Workload("1 GB sharded by rows over 8 devices", sharded(0), 1 / 512, DEVICES),
    "columns": Workload("1 GB sharded by columns over 8 devices", sharded(1), 1 / 512, DEVICES),
}


def nbytes(skeleton: Any) -> int:
    """Count the bytes of data in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(skeleton))


def numpy_leaves(skeleton: Any) -> list[np.ndarray[Any, Any]]:
    """Make the arrays of a tree, as NumPy's, in JAX's order: parts of one long row of random numbers."""
    leaves = jax.tree.leaves(skeleton)
    largest = max(leaf.size for leaf in leaves)
    row = np.random.default_rng(0).standard_normal(largest + (1 << 20), np.float32) * 1000

    def array(position: int, leaf: jax.ShapeDtypeStruct) -> np.ndarray[Any, Any]:
        start = position * 104_729 % (1 << 20)
        return row[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)

    return [array(position, leaf) for position, leaf in enumerate(leaves)]


def fill(skeleton: Any) -> Any:
    """Make the tree of JAX arrays; the small ones come out of a jitted function, as those of a training step do."""
    identity = jax.jit(lambda arrays: arrays)
    arrays: list[Any] = []
    small: list[np.ndarray[Any, Any]] = []
    for array in numpy_leaves(skeleton):
        if array.nbytes >= SMALL_ARRAY:
            arrays += [*identity(small), jnp.array(array)]
            small = []
        else:
            small.append(array)
            if len(small) == 300:
                arrays += identity(small)
                small = []
    leaves = [*arrays, *identity(small)]
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(skeleton), leaves))

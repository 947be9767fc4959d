"""The law: any number of processes writes the same bytes as one process."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

import pytree2safetensors as p2s
from together import contents_of, first, group_of, spread

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # JAX gives its constructor no types

DTYPES = [
    "bool", "int4", "uint4", "int8", "uint16", "bfloat16", "float16", "int32", "float32",
    "complex64", "float8_e4m3fn", "float8_e4m3b11fnuz",
]  # fmt: skip
AXES: list[list[Any]] = [
    [None], ["x"], ["y"], [["x", "y"]], [["y", "x"]], [None, "x"], [None, "y"], ["x", "y"],
    ["y", "x"], [None, ["x", "y"]], [None, None, "x"], ["y", None, "x"], [],
]  # fmt: skip


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    """Leaves as JSON: global arrays, and leaves that are local to a process."""
    return st.fixed_dictionaries(
        {
            "shape": st.lists(st.sampled_from([4, 8, 12, 0, 64]), min_size=3, max_size=3),
            "axes": st.sampled_from(AXES),
            "dtype": st.sampled_from([*DTYPES, "key"]),
            "mesh": st.sampled_from([[2, 2], [4, 1], [1, 4]]),
            "order": st.permutations(range(4)),
            "seed": st.integers(0, 2**32 - 1),
            "place": st.sampled_from(["global"] * 6 + ["numpy", "local", "int", "str", "none"]),
        }
    )


def saves() -> st.SearchStrategy[dict[str, Any]]:
    """Trees and options as JSON; each tree has an array that all processes hold."""
    return st.fixed_dictionaries(
        {
            "leaves": st.lists(leaves(), max_size=6),
            "names": st.permutations(range(6)),
            "checksum": st.booleans(),
            "durable": st.sampled_from([False, False, False, True]),
            "max_shard_size": st.sampled_from([None, 1, "2kB", "50kB", "1GB"]),
            "background": st.booleans(),
            "metadata": st.sampled_from([{}, {"a": "b" * 5000}]),
        }
    )


def values_of(leaf: dict[str, Any]) -> Any:
    """The values of an array, as one process has them."""
    shape, seed = tuple(leaf["shape"]), leaf["seed"]
    if leaf["dtype"] == "key":
        return jax.random.wrap_key_data(jnp.asarray(bits_of((*shape, 2), np.uint32, seed)))
    dtype = np.dtype(getattr(ml_dtypes, leaf["dtype"], leaf["dtype"]))
    if dtype.name in {"int4", "uint4"}:
        return jnp.asarray((bits_of(shape, np.uint8, seed) % 8).astype(dtype))
    return jnp.asarray(bits_of(shape, dtype, seed))


def bits_of(shape: tuple[int, ...], dtype: Any, seed: int) -> NDArray[Any]:
    """An array of random bits, so that no part equals another one by chance."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    found: NDArray[Any] = (bits % 2 if dtype == np.bool_ else bits).view(dtype)[..., 0]
    return found


def tree_of(described: dict[str, Any], together: bool) -> dict[str, Any]:
    """The tree, with arrays of all processes or of one device."""
    tree: dict[str, Any] = {"all": make(ALL, together)}
    for name, leaf in zip(described["names"], described["leaves"], strict=False):
        tree[f"leaf {name}"] = make(leaf, together)
    return tree


ALL = {"shape": [4, 4, 4], "axes": ["x"], "dtype": "float32", "mesh": [4, 1], "order": [0, 1, 2, 3]}
ALL |= {"seed": 0, "place": "global"}


def make(leaf: dict[str, Any], together: bool) -> Any:
    others: dict[str, Any] = {"int": leaf["seed"] << 7, "str": str(leaf["seed"]), "none": None}
    if leaf["place"] in others:
        return others[leaf["place"]]
    values = values_of(leaf)
    if leaf["place"] == "numpy" and leaf["dtype"] != "key":
        return np.asarray(values)
    if leaf["place"] != "global" or not together:
        return values
    devices = np.array(jax.devices())[leaf["order"]].reshape(leaf["mesh"])
    spec = [tuple(axis) if isinstance(axis, list) else axis for axis in leaf["axes"]]
    whole = values if leaf["dtype"] == "key" else np.asarray(values)
    return spread(whole, P(*spec), Mesh(devices, ("x", "y")))


def save_described(folder: str, described: dict[str, Any]) -> bool:
    """Save together, and on process 0 only; return whether the bytes are the same."""
    options = {name: described[name] for name in ("checksum", "durable", "max_shard_size")}
    options["metadata"] = described["metadata"]
    if options["max_shard_size"] is not None and first():
        Path(folder, "alone").mkdir()
    tree = tree_of(described, together=True)
    if described["background"]:
        p2s.save_pytree_async(tree, f"{folder}/together", **options).result()
    else:
        p2s.save_pytree(tree, f"{folder}/together", **options)
    if not first():
        return True
    p2s.save_pytree(tree_of(described, together=False), f"{folder}/alone", **options)
    together, alone = (contents_of(Path(folder, name)) for name in ("together", "alone"))
    shutil.rmtree(folder)
    return together == alone


# Fewer examples than for other laws, because each saves on several processes.
EXAMPLES = max(12, min(1000, (settings.default or settings()).max_examples // 20))


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_any_number_of_processes_writes_the_bytes_that_one_writes(count: int, devices: int) -> None:
    @settings(max_examples=EXAMPLES)
    @given(saves())
    def check(described: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "saves").mkdir()
            found = group_of(count, devices).run(save_described, f"{folder}/saves", described)
            assert found == [True] * count

    check()

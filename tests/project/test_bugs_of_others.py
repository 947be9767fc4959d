"""The bugs that the compatibility page lists are in the releases that it names."""

import ctypes
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from handlers import Interrupted, handling, interrupt
from pytree2safetensors import save_pytree

P: Any = PartitionSpec  # whose constructor JAX leaves untyped

with_safetensors_0_8 = pytest.mark.skipif(
    not version("safetensors").startswith("0.8."), reason="the page describes safetensors 0.8"
)


def test_jax_from_0_4_36_to_0_9_has_no_key_none() -> None:
    try:
        DictKey(None)
        is_refused = False
    except TypeError:
        is_refused = True
    assert is_refused == ((0, 4, 36) <= jax.__version_info__ < (0, 10))


def test_only_python_3_14_leaves_with_statements_before_their_body() -> None:
    steps: list[str] = []

    class Lock:
        # A function in C, as that of a lock. A signal comes before it returns.
        __enter__ = staticmethod(ctypes.PYFUNCTYPE(None)(("PyErr_SetInterrupt", ctypes.pythonapi)))

        def __exit__(self, *_: object) -> None:
            steps.append("exit")

    with handling(signal.SIGINT, interrupt), pytest.raises(Interrupted), Lock():
        steps.append("body")
    assert steps or sys.version_info[:2] == (3, 14)


def test_jax_before_0_5_adds_up_copies_of_what_it_concatenates() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    values = np.arange(1, 9, dtype=np.float32)
    array = jax.device_put(values, NamedSharding(mesh, P("x")))
    factor = 2 if jax.__version_info__ < (0, 5) else 1
    joined = np.asarray(jnp.concatenate([array, array]))
    assert joined.tolist() == [*(factor * values).tolist()] * 2


@with_safetensors_0_8
def test_safetensors_saves_arrays_in_the_order_of_their_memory(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(2, 3).T
    safetensors.numpy.save_file({"w": values}, tmp_path / "file")
    found = safetensors.numpy.load_file(tmp_path / "file")["w"]
    assert found.ravel().tolist() == sorted(values.ravel().tolist())


@with_safetensors_0_8
def test_safetensors_replaces_arrays_of_jax_in_the_dict_of_the_caller(tmp_path: Path) -> None:
    arrays = {"w": jnp.ones(2)}
    safetensors.flax.save_file(arrays, tmp_path / "file")
    assert type(arrays["w"]) is np.ndarray


@with_safetensors_0_8
def test_safetensors_loads_no_float8(tmp_path: Path) -> None:
    save_pytree({"w": jnp.ones(2, jnp.float8_e5m2)}, tmp_path / "file")
    with pytest.raises(AttributeError, match="float8_e5m2"):
        safetensors.flax.load_file(tmp_path / "file")

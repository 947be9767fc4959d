"""No public function makes Python or JAX warn, or draws from Python's global random generator.

The test suite turns warnings into errors, too, but pytest imports JAX and the package before it does,
and its runtime checks of internal functions draw random numbers.
"""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import pytree2safetensors as p2s

# One line calls one public function, or more.
CALLS = """
import random
import jax, jax.numpy as jnp
from pytree2safetensors import *

before = random.getstate()
tree = {"layers": [(jnp.ones((2, 3)), jnp.zeros(3, "bfloat16"))], "key": jax.random.key(0), "step": 7}
save_pytree(tree, "tree.safetensors", checksum=True)
save_pytree(tree, "folder", max_shard_size="5GB")
save_pytree_async(tree, "tree.safetensors").result()
load_pytree("tree.safetensors")
load_pytree("folder", mmap=True)
load_into_pytree(load_abstract("tree.safetensors"), "tree.safetensors", cast=True)
save_pytree({"w": jnp.ones(3)}, "renamed.safetensors", rename=[Rule("{=}", "{=}")])
explain(tree, "tree.safetensors")
load_metadata("tree.safetensors")
set_weights(tree, pytree2dict(tree))
dict2pytree(pytree2dict(tree))
keypath2string(string2keypath("@layers#0#1"))
assert random.getstate() == before
load_file("tree.safetensors")  # safetensors' own function, which imports Flax if it is there
"""
# Old releases of JAX import what has since been deprecated in NumPy and elsewhere.
NEWEST = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 10)


def test_every_public_function_is_called() -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse(CALLS))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    functions = {name for name in p2s.__all__ if inspect.isfunction(getattr(p2s, name))}
    assert called - {"Rule"} == functions


@pytest.mark.skipif(not NEWEST, reason="older releases of JAX warn by themselves")
def test_no_public_function_warns_or_draws_random_numbers(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALLS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

"""Runs the command for its tests; and a tree with leaves and nodes of many kinds."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pytree2safetensors import PyTreeContainer

Run: TypeAlias = Callable[..., tuple[int, str, str]]  # the exit code, stdout and stderr


def start(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytree2safetensors", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def layer() -> dict[str, Any]:
    return {"w": jnp.zeros((16, 16)), "b": jnp.zeros(16, jnp.bfloat16)}


def small() -> dict[str, Any]:
    """A tree with leaves of every kind, and four similar layers."""
    return {
        "params": PyTreeContainer({"layers": [layer() for _ in range(4)], "scale": np.float16(1)}),
        "opt": ((), None, (jnp.ones(3),), OrderedDict(mu=1.0, nu=2.0)),
        "name": "a name that is too long to stand on one line of a narrow screen, and so cut",
        "a.b": 2**99,
        "key": jax.random.key(0),
        "step": 7,
    }


def strictly(text: str) -> Any:
    """Read JSON, and refuse NaN and infinities."""

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)

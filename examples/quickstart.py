"""Train a small network on handwritten digits, save it, and load it in a new process.

    pip install pytree2safetensors optax scikit-learn
    python quickstart.py

The parameters and the optimizer state go to one safetensors file. A process that knows nothing but
the file loads them without a template, and one that builds the state anew loads them into it. Both
must report what this process sees: the same accuracy and the same bits in every leaf.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from pytree2safetensors import load_into_pytree, load_pytree, pytree2dict, save_pytree

Params: TypeAlias = dict[str, list[dict[str, jax.Array]]]
OPTIMIZER = optax.adam(1e-2)


class State(NamedTuple):
    """Everything that training needs to go on."""

    params: Params
    opt_state: optax.OptState
    step: int


class Digits(NamedTuple):
    """Images of 8 by 8 pixels as rows, and the digits they show."""

    images: jax.Array
    labels: jax.Array


def digits() -> tuple[Digits, Digits]:
    """Return 1,500 images to train on and 297 to test with."""
    images, labels = load_digits(return_X_y=True)
    everything = Digits(jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels))
    return Digits(*(x[:1500] for x in everything)), Digits(*(x[1500:] for x in everything))


def initial_state(sizes: tuple[int, ...] = (64, 64, 32, 10)) -> State:
    """Return an untrained network, one layer between each two sizes, and its optimizer state."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    layers = [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    params = {"layers": layers}
    return State(params, OPTIMIZER.init(params), step=0)


def logits(params: Params, images: jax.Array) -> jax.Array:
    """Return a score for each image and digit."""
    *hidden, last = params["layers"]
    for layer in hidden:
        images = jax.nn.relu(images @ layer["w"] + layer["b"])
    return images @ last["w"] + last["b"]


@jax.jit
def loss(params: Params, data: Digits) -> jax.Array:
    """Return the mean cross-entropy."""
    chosen = jax.nn.log_softmax(logits(params, data.images))[
        jnp.arange(len(data.labels)), data.labels
    ]
    return -chosen.mean()


@jax.jit
def update(
    params: Params, opt_state: optax.OptState, data: Digits
) -> tuple[Params, optax.OptState]:
    """Take one step of the optimizer."""
    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params, data), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(state: State, data: Digits, steps: int) -> State:
    """Train on batches of 100, which the step alone decides."""
    params, opt_state, step = state
    for step in range(state.step, state.step + steps):
        start = step * 100 % len(data.labels)
        batch = Digits(data.images[start : start + 100], data.labels[start : start + 100])
        params, opt_state = update(params, opt_state, batch)
    return State(params, opt_state, step + 1)


def accuracy(params: Params, data: Digits) -> float:
    """Return the share of images whose digit gets the highest score."""
    return float((logits(params, data.images).argmax(axis=1) == data.labels).mean())


def bits(tree: Any) -> dict[str, str]:
    """Return type, shape and a digest of the bytes of each leaf."""
    return {name: _describe(leaf) for name, leaf in pytree2dict(tree).items()}


def _describe(leaf: Any) -> str:
    array = np.asarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{type(leaf).__name__} {array.dtype} {array.shape} {digest}"


def report(file: str) -> dict[str, dict[str, Any]]:
    """Load `file` in both ways and say what came back: what the new process does."""
    training, test = digits()
    without = load_pytree(file)
    into = load_into_pytree(initial_state(), file)
    resumed = train(into, training, 30)
    return {
        "without a template": {"bits": bits(without), "accuracy": accuracy(without.params, test)},
        "into a new state": {"bits": bits(into), "accuracy": accuracy(into.params, test)},
        "after 30 more steps": {"bits": bits(resumed), "accuracy": accuracy(resumed.params, test)},
    }


def main() -> None:
    """Train, save, let a new process load, and compare."""
    training, test = digits()
    state = train(initial_state(), training, 90)
    resumed = train(state, training, 30)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "digits.safetensors")
        save_pytree(state, file, metadata={"data": "scikit-learn digits"})

        print("The file:\n", flush=True)
        show = [sys.executable, "-m", "pytree2safetensors", "show", str(file)]
        subprocess.run(show, check=True)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
        print(f"\n{size:,} bytes of arrays in a file of {file.stat().st_size:,} bytes")

        command = [sys.executable, __file__, str(file)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"\n{'test accuracy':<28}{'here':>8}{'in a new process':>20}")
    for how, found in json.loads(answer).items():
        want = resumed if how == "after 30 more steps" else state
        here = {"bits": bits(want), "accuracy": accuracy(want.params, test)}
        print(f"  {how:<26}{here['accuracy']:8.4f}{found['accuracy']:20.4f}")
        if found != here:
            sys.exit(f"{how}: what came back differs")
    print(f"\nEvery bit of {len(bits(state))} leaves is the same, both ways, and so is every bit")
    print("after 30 more steps of training from the loaded state.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(report(sys.argv[1])))
    else:
        main()

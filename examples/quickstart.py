"""Train a small network on handwritten digits, save it, and load it in a new process.

    pip install . optax scikit-learn
    python examples/quickstart.py

The parameters and the optimizer state go to one safetensors file. A new process loads that file
twice: without a template, and into a freshly initialized state. Then it trains for 30 more steps.
Each time, every leaf must have the same bits as in this process.
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
    """Everything that training needs to continue."""

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
    order = np.random.default_rng(0).permutation(len(labels))
    everything = Digits(jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order]))
    return Digits(*(x[:1500] for x in everything)), Digits(*(x[1500:] for x in everything))


def initial_state(sizes: tuple[int, ...] = (64, 64, 10)) -> State:
    """Return an untrained network with layers of these sizes, and its optimizer state."""
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
    """Train on batches of 100; the step number decides which."""
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
    """Return the type, the shape and a digest of the bytes of each leaf."""
    return {name: _describe(leaf) for name, leaf in pytree2dict(tree).items()}


def _describe(leaf: Any) -> str:
    array = np.asarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{type(leaf).__name__} {array.dtype} {array.shape} {digest}"


def outcome(state: State, test: Digits) -> dict[str, Any]:
    """Return what both processes must agree on."""
    return {"accuracy": accuracy(state.params, test), "bits": bits(state)}


def load_and_resume(file: str) -> dict[str, Any]:
    """Load the file in both ways and train on: the work of the new process."""
    training, test = digits()
    loaded = load_into_pytree(initial_state(), file)
    return {
        "loaded without a template": outcome(load_pytree(file), test),
        "loaded into a new state": outcome(loaded, test),
        "after 30 more steps": outcome(train(loaded, training, 30), test),
    }


def main() -> None:
    """Train, save, load in a new process, and compare."""
    print("Training a network ...", file=sys.stderr)
    training, test = digits()
    state = train(initial_state(), training, 600)
    here = outcome(state, test)
    expected = dict.fromkeys(("loaded without a template", "loaded into a new state"), here)
    expected["after 30 more steps"] = outcome(train(state, training, 30), test)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "digits.safetensors")
        save_pytree(state, file, metadata={"data": "scikit-learn digits"})
        print("Loading it in a new process ...\n", file=sys.stderr)
        command = [sys.executable, __file__, str(file)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        equal = found == expected

        passed = f"PASSED: all {len(here['bits'])} leaves have equal bits in both processes."
        print(passed if equal else "FAILED: what was loaded differs from what was saved.")
        print(f"\n{'accuracy on 297 test images':<30}{'this process':>14}{'new process':>14}")
        for how, want in expected.items():
            print(f"  {how:<28}{want['accuracy']:>14.4f}{found[how]['accuracy']:>14.4f}")

        print(
            "\nThe parameters in the file, as `pytree2safetensors show` lists them:\n", flush=True
        )
        show = [sys.executable, "-m", "pytree2safetensors", "show", "--prefix", "params"]
        subprocess.run([*show, str(file)], check=True)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(load_and_resume(sys.argv[1])))
    else:
        main()

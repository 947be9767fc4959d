"""In each framework, training that is saved and resumed has the same losses as without interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from pytree2safetensors import load_into_pytree, save_pytree
from trees import LinenNet, NnxNet

Step = Callable[[Any], tuple[Any, jax.Array]]
X = jax.random.normal(jax.random.key(0), (8, 5, 1))
Y = jax.random.normal(jax.random.key(1), (8, 2))


def linen(seed: int) -> tuple[Any, Step]:
    net = LinenNet()
    variables = net.init(jax.random.key(seed), X)
    state = train_state.TrainState.create(
        apply_fn=net.apply, params=variables["params"], tx=optax.adam(1e-2)
    )

    @jax.jit
    def step(carry: Any) -> tuple[Any, jax.Array]:
        state, statistics = carry

        def loss(params: Any) -> Any:
            out, new = net.apply(
                {"params": params, "batch_stats": statistics}, X, mutable=["batch_stats"]
            )
            return jnp.mean((out - Y) ** 2), new["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return (state.apply_gradients(grads=gradients), statistics), value

    return (state, variables["batch_stats"]), step


def equinox(seed: int) -> tuple[Any, Step]:
    model = eqx.nn.MLP(5, 2, 8, 2, key=jax.random.key(seed))
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)

    @eqx.filter_jit
    def step(carry: Any) -> tuple[Any, jax.Array]:
        model, state = carry
        value, gradients = eqx.filter_value_and_grad(
            lambda model: jnp.mean((jax.vmap(model)(X[..., 0]) - Y) ** 2)
        )(model)
        updates, state = optimizer.update(gradients, state)
        return (eqx.apply_updates(model, updates), state), value

    return (model, optimizer.init(eqx.filter(model, eqx.is_array))), step


def haiku(seed: int) -> tuple[Any, Step]:
    net = hk.without_apply_rng(hk.transform(lambda values: hk.nets.MLP([8, 2])(values[..., 0])))
    params = net.init(jax.random.PRNGKey(seed), X)
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9))

    @jax.jit
    def step(carry: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradients = jax.value_and_grad(
            lambda params: jnp.mean((net.apply(params, X) - Y) ** 2)
        )(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    return (params, optimizer.init(params)), step


def flax_nnx(seed: int) -> tuple[Any, Step]:
    model = NnxNet(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state: Any) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(
            lambda model: jnp.mean((model(X[..., 0][:, :3])[:, :2] - Y) ** 2)
        )(model)
        optimizer.update(model, gradients)
        return nnx.split((model, optimizer))[1], value

    return state, step


class Noisy(eqx.Module):
    layer: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array) -> None:
        self.layer = eqx.nn.Linear(5, 2, key=key)
        self.norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, state: Any, key: Any) -> tuple[Any, Any]:
        x, state = self.norm(self.layer(x), state)
        return self.dropout(x, key=key), state


def equinox_with_state(seed: int) -> tuple[Any, Step]:
    model, state = eqx.nn.make_with_state(Noisy)(jax.random.key(seed))
    schedule = optax.cosine_decay_schedule(1e-2, 10)
    optimizer = optax.apply_if_finite(optax.chain(optax.clip(1.0), optax.adamw(schedule)), 2)

    @eqx.filter_jit
    def step(carry: Any) -> tuple[Any, jax.Array]:
        model, state, moments, key = carry
        key, drawn = jax.random.split(key)

        def loss(model: Any) -> Any:
            keys = jax.random.split(drawn, len(X))
            batched = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
            out, new = batched(X[..., 0], state, keys)
            return jnp.mean((out - Y) ** 2), new

        (value, state), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, moments = optimizer.update(gradients, moments, arrays)
        return (eqx.apply_updates(model, updates), state, moments, key), value

    moments = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return (model, state, moments, jax.random.key(seed)), step


def halves(seed: int) -> tuple[Any, Step]:
    """Parameters in bfloat16, with an optimizer that makes its state float32 in the first step."""
    params = {"w": jax.random.normal(jax.random.key(seed), (5, 2), jnp.bfloat16)}
    optimizer = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), 2)

    @jax.jit
    def step(carry: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradients = jax.value_and_grad(
            lambda params: jnp.mean((X[..., 0] @ params["w"] - Y) ** 2)
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    # As a template, the state after a step has the dtypes of all later ones.
    start = params, optimizer.init(params)
    return step(start)[0], step


@pytest.mark.parametrize("framework", [linen, equinox, equinox_with_state, haiku, flax_nnx, halves])
def test_resumed_training_gives_the_same_losses(
    framework: Callable[[int], tuple[Any, Step]], tmp_path: Path
) -> None:
    carry, step = framework(0)
    for _ in range(3):
        carry, _ = step(carry)
    save_pytree(carry, tmp_path / "state.safetensors", unsupported="skip")
    fresh, fresh_step = framework(5)
    resumed = load_into_pytree(fresh, tmp_path / "state.safetensors")
    for _ in range(3):
        carry, expected = step(carry)
        resumed, found = fresh_step(resumed)
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_orbax_and_this_library_give_each_other_the_same_tree(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    from oracle import assert_same
    from trees import params

    tree = params(3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", tree)
    save_pytree(restored, tmp_path / "tree.safetensors")
    back = load_into_pytree(restored, tmp_path / "tree.safetensors")
    assert_same(back, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "again", back)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "again", tree), tree)

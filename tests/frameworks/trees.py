"""Trees of other libraries, each made from a seed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from penzai import pz

Make = Callable[[int], Any]
TREES: dict[str, Make] = {}


def tree(make: Make) -> Make:
    """Register a maker of trees under its name."""
    TREES[make.__name__] = make
    return make


def key(seed: int) -> jax.Array:
    return jax.random.key(seed)


def params(seed: int) -> dict[str, Any]:
    first, second = jax.random.split(key(seed))
    return {
        "dense": {"kernel": jax.random.normal(first, (3, 4)), "bias": jnp.zeros(4)},
        "head": [jax.random.normal(second, (4, 2)), jnp.full(2, seed, jnp.bfloat16)],
    }


def stepped(optimizer: optax.GradientTransformation, seed: int) -> Any:
    """The state of an optimizer after two steps."""
    values = params(seed)
    state = optimizer.init(values)
    for step in (1, 2):
        gradients = jax.tree.map(lambda leaf, step=step: leaf * step + 0.5, values)
        _, state = optimizer.update(gradients, state, values)
    return state


# --- Equinox ----------------------------------------------------------------------------------


@tree
def equinox_mlp(seed: int) -> Any:
    return eqx.nn.MLP(2, 3, 4, 2, key=key(seed))


@tree
def equinox_filtered_mlp(seed: int) -> Any:
    return eqx.filter(equinox_mlp(seed), eqx.is_array)


@tree
def equinox_conv_stack(seed: int) -> Any:
    return eqx.nn.Sequential(
        [eqx.nn.Conv2d(1, 2, 3, key=key(seed)), eqx.nn.Lambda(jax.nn.relu), eqx.nn.LayerNorm((3,))]
    )


@tree
def equinox_attention(seed: int) -> Any:
    return eqx.nn.MultiheadAttention(2, 8, key=key(seed))


@tree
def equinox_gru(seed: int) -> Any:
    return eqx.nn.GRUCell(3, 4, key=key(seed))


@tree
def equinox_embedding_and_dropout(seed: int) -> Any:
    return (eqx.nn.Embedding(5, 3, key=key(seed)), eqx.nn.Dropout(0.25), eqx.nn.Identity())


@tree
def equinox_batch_norm_with_state(seed: int) -> Any:
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    values = jax.random.normal(key(seed), (5, 3))
    _, state = jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        values, state
    )
    return norm, state


class Stateful(eqx.Module):
    norm: eqx.nn.SpectralNorm[eqx.nn.Linear]
    count: eqx.nn.StateIndex[jax.Array]
    name: str
    rate: float
    width: int = eqx.field(static=True)

    def __init__(self, seed: int) -> None:
        layer = eqx.nn.Linear(3, 3, key=key(seed))
        self.norm = eqx.nn.SpectralNorm(layer, "weight", key=key(seed))
        self.count = eqx.nn.StateIndex(jnp.array(seed))
        self.name, self.rate, self.width = f"net {seed}", seed / 4, 3


@tree
def equinox_stateful(seed: int) -> Any:
    return eqx.nn.make_with_state(Stateful)(seed)


class Sharing(eqx.Module):
    layers: eqx.nn.Shared

    def __init__(self, seed: int) -> None:
        layers = (
            eqx.nn.Embedding(5, 4, key=key(seed)),
            eqx.nn.Linear(4, 5, use_bias=False, key=key(seed)),
        )
        self.layers = eqx.nn.Shared(
            layers, lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )


@tree
def equinox_shared(seed: int) -> Any:
    return Sharing(seed)


@tree
def equinox_stacked_layers(seed: int) -> Any:
    return eqx.filter_vmap(lambda one: eqx.nn.Linear(3, 3, key=one))(jax.random.split(key(seed), 4))


@tree
def equinox_module_with_optimizer(seed: int) -> Any:
    model = eqx.filter(equinox_mlp(seed), eqx.is_array)
    return {"model": model, "opt": optax.adamw(1e-3).init(model), "step": seed}


# --- Flax Linen -------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, values: Any, train: bool = True) -> Any:
        values = nn.Conv(2, (3,))(values)
        values = nn.BatchNorm(use_running_average=not train)(values)
        return nn.Dense(2)(values.reshape(values.shape[0], -1))


@tree
def linen_params(seed: int) -> Any:
    return LinenNet().init(key(seed), jnp.ones((2, 5, 1)))


@tree
def linen_frozen_params(seed: int) -> Any:
    return flax.core.freeze(linen_params(seed))


@tree
def linen_train_state(seed: int) -> Any:
    variables = linen_params(seed)
    return train_state.TrainState.create(
        apply_fn=LinenNet().apply, params=variables["params"], tx=optax.adam(1e-3)
    )


@tree
def linen_partitioned(seed: int) -> Any:
    dense = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    return dense.init(key(seed), jnp.ones((1, 2)))


@tree
def linen_logically_partitioned(seed: int) -> Any:
    kernel_init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    return nn.Dense(3, kernel_init=kernel_init).init(key(seed), jnp.ones((1, 2)))


@tree
def linen_lstm(seed: int) -> Any:
    cell = nn.RNN(nn.LSTMCell(4))
    return cell.init(key(seed), jnp.ones((1, 3, 2)))


@flax.struct.dataclass
class FlaxStruct:
    weights: Any
    count: int
    name: str = flax.struct.field(pytree_node=False, default="static")


@tree
def flax_struct(seed: int) -> Any:
    return FlaxStruct(params(seed), seed)


# --- Flax NNX ---------------------------------------------------------------------------------


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, values: Any) -> Any:
        for layer in self.layers:
            values = layer(values)
        return self.dropout(self.norm(values))


@tree
def nnx_state(seed: int) -> Any:
    return nnx.state(NnxNet(nnx.Rngs(seed)))


@tree
def nnx_split_state(seed: int) -> Any:
    return nnx.split(NnxNet(nnx.Rngs(seed)))[1]


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.head = self.embed
        self.scale = nnx.Param(jnp.ones(4), note="with metadata")


@tree
def nnx_tied_state(seed: int) -> Any:
    return nnx.state(NnxTied(nnx.Rngs(seed)))


@tree
def nnx_pure_dict(seed: int) -> Any:
    return nnx.to_pure_dict(nnx.state(NnxNet(nnx.Rngs(seed))))


@tree
def nnx_param_state(seed: int) -> Any:
    return nnx.state(NnxNet(nnx.Rngs(seed)), nnx.Param)


@tree
def nnx_optimizer_state(seed: int) -> Any:
    model = NnxNet(nnx.Rngs(seed))
    return nnx.state(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))


@tree
def nnx_rngs(seed: int) -> Any:
    return nnx.state(nnx.Rngs(params=seed, dropout=seed + 1))


# --- Haiku ------------------------------------------------------------------------------------


@tree
def haiku_mlp(seed: int) -> Any:
    net = hk.transform(lambda values: hk.nets.MLP([4, 2])(values))
    return net.init(jax.random.PRNGKey(seed), jnp.ones((1, 3)))


@tree
def haiku_with_state(seed: int) -> Any:
    net = hk.transform_with_state(
        lambda values: hk.BatchNorm(True, True, 0.9)(hk.Linear(2)(values), is_training=True)
    )
    return net.init(jax.random.PRNGKey(seed), jnp.ones((2, 3)))


@tree
def haiku_lstm(seed: int) -> Any:
    net = hk.transform(lambda values: hk.LSTM(3)(values, hk.LSTM(3).initial_state(None)))
    return net.init(jax.random.PRNGKey(seed), jnp.ones(2))


# --- Optax ------------------------------------------------------------------------------------


@tree
def optax_adam(seed: int) -> Any:
    return stepped(optax.adam(1e-3), seed)


@tree
def optax_sgd_momentum(seed: int) -> Any:
    return stepped(optax.sgd(1e-2, momentum=0.9, nesterov=True), seed)


@tree
def optax_chain(seed: int) -> Any:
    schedule = optax.cosine_decay_schedule(1e-3, 10)
    return stepped(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule), optax.scale(0.5)), seed
    )


@tree
def optax_masked(seed: int) -> Any:
    return stepped(optax.masked(optax.adam(1e-3), {"dense": True, "head": [False, True]}), seed)


@tree
def optax_multi_transform(seed: int) -> Any:
    return stepped(
        optax.multi_transform(
            {"a": optax.adam(1e-3), "b": optax.sgd(1e-2)}, {"dense": "a", "head": ["b", "a"]}
        ),
        seed,
    )


@tree
def optax_inject_hyperparams(seed: int) -> Any:
    return stepped(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), seed)


@tree
def optax_apply_if_finite(seed: int) -> Any:
    return stepped(optax.apply_if_finite(optax.adam(1e-3), 3), seed)


@tree
def optax_ema(seed: int) -> Any:
    return stepped(optax.chain(optax.adam(1e-3), optax.ema(0.99)), seed)


@tree
def optax_multi_steps(seed: int) -> Any:
    return stepped(optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), seed)


@tree
def optax_partition(seed: int) -> Any:
    parts = {1: optax.adam(1e-3), 2: optax.set_to_zero()}
    return stepped(optax.partition(parts, {"dense": 1, "head": [2, 1]}), seed)


@tree
def optax_named_chain(seed: int) -> Any:
    return stepped(
        optax.named_chain(
            ("adam", optax.scale_by_adam()), ("rate", optax.scale_by_schedule(lambda step: -step))
        ),
        seed,
    )


@tree
def optax_schedule_free(seed: int) -> Any:
    return stepped(optax.contrib.schedule_free_adamw(1e-2), seed)


@tree
def optax_adafactor(seed: int) -> Any:
    return stepped(optax.adafactor(1e-3), seed)


@tree
def optax_lion(seed: int) -> Any:
    return stepped(optax.lion(1e-4), seed)


@tree
def optax_noise(seed: int) -> Any:
    return stepped(optax.add_noise(0.1, 0.5, seed), seed)


# --- others that register nodes in their own way ----------------------------------------------


@chex.dataclass
class ChexState:
    weights: Any
    step: int


@tree
def chex_dataclass(seed: int) -> Any:
    return ChexState(weights=params(seed), step=seed)


@chex.dataclass(mappable_dataclass=False)
class ChexPlain:
    weights: Any
    scale: float


@tree
def chex_plain_dataclass(seed: int) -> Any:
    return ChexPlain(weights=params(seed), scale=seed / 8)


@tree
def penzai_named_array(seed: int) -> Any:
    return {"w": pz.nx.wrap(jax.random.normal(key(seed), (3, 4)), "rows", "columns")}


@tree
def penzai_mlp(seed: int) -> Any:
    from penzai.models import simple_mlp

    mlp = simple_mlp.MLP.from_config(
        name="mlp", init_base_rng=key(seed), feature_sizes=[2, 4, 1], activation_fn=jax.nn.relu
    )
    return pz.freeze_params(mlp)


# --- JAX itself -------------------------------------------------------------------------------


@tree
def jax_partial(seed: int) -> Any:
    return {"call": jax.tree_util.Partial(jnp.add, params(seed)["dense"]["bias"] + seed)}


@tree
def jax_prng_keys(seed: int) -> Any:
    return (key(seed), jax.random.split(key(seed), 3), jax.random.key(seed, impl="rbg"))


class Loop(NamedTuple):
    params: Any
    opt: Any
    step: int
    rng: jax.Array
    best: float
    run: str


@tree
def train_loop(seed: int) -> Any:
    values = params(seed)
    return Loop(values, optax.adam(1e-3).init(values), seed, key(seed), seed / 4, f"run {seed}")


@tree
def mixed_precision(seed: int) -> Any:
    values = params(seed)
    return {
        dtype: jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), values)
        for dtype in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")
    }


@tree
def numpy_statistics(seed: int) -> Any:
    random = np.random.default_rng(seed)
    return {
        "mean": random.normal(size=4).astype("f4"),
        "seen": (np.arange(7, dtype=np.int32) * seed)[::-1],
    }

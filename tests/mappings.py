"""Small checkpoints with the names and axes of well-known models, and the trees that they make."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

E, H, K, D, F, V, L, X = 8, 4, 2, 3, 10, 11, 2, 3  # width, heads, key heads, their size, ...

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Example(NamedTuple):
    """The tensors of a checkpoint, and the leaves of a tree, by dotted path."""

    tensors: Shapes
    leaves: Shapes
    unused: Shapes = MappingProxyType({})


def _layers(name: str, shapes: Shapes, count: int = L) -> dict[str, Shape]:
    return {f"{name}.{l}.{rest}": shape for l in range(count) for rest, shape in shapes.items()}


def _dense(name: str, out: int, in_: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, in_), f"{name}.bias": (out,)}


def _kernel(path: str, *shape: int, bias: int = 1) -> dict[str, Shape]:
    return {f"{path}.kernel": shape, f"{path}.bias": shape[-bias:]}


def _norm(name: str, weight: str = "weight", bias: str = "bias") -> dict[str, Shape]:
    return {f"{name}.{weight}": (E,), f"{name}.{bias}": (E,)}


def _decoder(norms: tuple[str, ...], mlp: bool, qk_norm: bool, head: bool) -> Example:
    block = {
        "self_attn.q_proj.weight": (H * D, E),
        "self_attn.k_proj.weight": (K * D, E),
        "self_attn.v_proj.weight": (K * D, E),
        "self_attn.o_proj.weight": (E, H * D),
        **{f"{norm}_layernorm.weight": (E,) for norm in norms},
    }
    leaves = {
        "attn.q.kernel": (E, H, D),
        "attn.k.kernel": (E, K, D),
        "attn.v.kernel": (E, K, D),
        "attn.o.kernel": (H, D, E),
        **{f"{norm}_norm.scale": (E,) for norm in norms},
    }
    if qk_norm:
        block |= {f"self_attn.{p}_norm.weight": (D,) for p in "qk"}
        leaves |= {f"attn.{p}_norm.scale": (D,) for p in "qk"}
    if mlp:
        block |= {f"mlp.{m}_proj.weight": (F, E) for m in ("gate", "up")}
        block |= {"mlp.down_proj.weight": (E, F)}
        leaves |= {f"mlp.{m}.kernel": (E, F) for m in ("gate", "up")}
        leaves |= {"mlp.down.kernel": (F, E)}
    tensors = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    tree = {"embed.embedding": (V, E), "norm.scale": (E,)}
    if head:
        tensors["lm_head.weight"] = (V, E)
        tree["lm_head.kernel"] = (E, V)
    return Example(
        {**tensors, **_layers("model.layers", block)}, {**tree, **_layers("layers", leaves)}
    )


def _with_experts(
    example: Example, gate: str, experts: str, names: tuple[str, str, str]
) -> Example:
    up, down = (F, E), (E, F)
    block: dict[str, Shape] = {gate: (X, E)}
    for x in range(X):
        block |= {
            f"{experts}.{x}.{name}.weight": s for name, s in zip(names, (up, up, down), strict=True)
        }
    leaves: dict[str, Shape] = {
        "moe.router.kernel": (E, X),
        "moe.gate": (X, E, F),
        "moe.up": (X, E, F),
        "moe.down": (X, F, E),
    }
    return Example(
        {**example.tensors, **_layers("model.layers", block)},
        {**example.leaves, **_layers("layers", leaves)},
    )


_NORMS = ("input", "post_attention")


def _gpt2() -> Example:
    block = {
        **_norm("ln_1"),
        **_norm("ln_2"),
        "attn.c_attn.weight": (E, 3 * H * D),
        "attn.c_attn.bias": (3 * H * D,),
        "attn.c_proj.weight": (H * D, E),
        "attn.c_proj.bias": (E,),
        "mlp.c_fc.weight": (E, F),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (F, E),
        "mlp.c_proj.bias": (E,),
    }
    leaves = {
        **_norm("ln_1", "scale"),
        **_norm("ln_2", "scale"),
        **{k: s for p in "qkv" for k, s in _kernel(f"attn.{p}", E, H, D, bias=2).items()},
        **_kernel("attn.out", H, D, E),
        **_kernel("mlp.fc", E, F),
        **_kernel("mlp.proj", F, E),
    }
    return Example(
        {"wte.weight": (V, E), "wpe.weight": (7, E), **_norm("ln_f"), **_layers("h", block)},
        {
            "wte.embedding": (V, E),
            "wpe.embedding": (7, E),
            **_norm("ln_f", "scale"),
            **_layers("h", leaves),
        },
        _layers("h", {"attn.bias": (1, 1, 7, 7)}),
    )


def _attention(name: str, parts: tuple[str, ...], biased: tuple[str, ...]) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{name}.{part}.weight": (H * D, E) for part in parts}
    return found | {f"{name}.{part}.bias": (H * D,) for part in biased}


def _attention_leaves(
    path: str, parts: tuple[str, ...], biased: tuple[str, ...]
) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{path}.{part}.kernel": (E, H, D) for part in parts}
    return found | {f"{path}.{part}.bias": (H, D) for part in biased}


_QKV = ("query", "key", "value")


def _bert() -> Example:
    block = {
        **_attention("attention.self", _QKV, _QKV),
        **_dense("attention.output.dense", E, H * D),
        **_norm("attention.output.LayerNorm", "gamma", "beta"),
        **_dense("intermediate.dense", F, E),
        **_dense("output.dense", E, F),
        **_norm("output.LayerNorm", "gamma", "beta"),
    }
    leaves = {
        **_attention_leaves("attn", _QKV, _QKV),
        **_kernel("attn.out", H, D, E),
        **_norm("attn.norm", "scale"),
        **_kernel("mlp.up", E, F),
        **_kernel("mlp.down", F, E),
        **_norm("mlp.norm", "scale"),
    }
    sizes = {"word": V, "position": 7, "token_type": 2}
    return Example(
        {
            **{f"bert.embeddings.{e}_embeddings.weight": (n, E) for e, n in sizes.items()},
            **_norm("bert.embeddings.LayerNorm", "gamma", "beta"),
            **_layers("bert.encoder.layer", block),
            **_dense("bert.pooler.dense", E, E),
        },
        {
            **{f"embeddings.{e}.embedding": (n, E) for e, n in sizes.items()},
            **_norm("embeddings.norm", "scale"),
            **_layers("layers", leaves),
            **_kernel("pooler", E, E),
        },
        {
            "cls.predictions.bias": (V,),
            **_dense("cls.predictions.transform.dense", E, E),
            **_norm("cls.predictions.transform.LayerNorm", "gamma", "beta"),
            **_dense("cls.seq_relationship", 2, E),
        },
    )


def _vit() -> Example:
    block = {
        **_attention("attention.attention", _QKV, _QKV),
        **_dense("attention.output.dense", E, H * D),
        **_dense("intermediate.dense", F, E),
        **_dense("output.dense", E, F),
        **_norm("layernorm_before"),
        **_norm("layernorm_after"),
    }
    leaves = {
        **_attention_leaves("attn", _QKV, _QKV),
        **_kernel("attn.out", H, D, E),
        **_kernel("mlp.up", E, F),
        **_kernel("mlp.down", F, E),
        **_norm("norm_before", "scale"),
        **_norm("norm_after", "scale"),
    }
    patches = "vit.embeddings.patch_embeddings.projection"
    return Example(
        {
            "vit.embeddings.cls_token": (1, 1, E),
            "vit.embeddings.position_embeddings": (1, 5, E),
            f"{patches}.weight": (E, 3, 4, 4),
            f"{patches}.bias": (E,),
            **_layers("vit.encoder.layer", block),
            **_norm("vit.layernorm"),
            **_dense("classifier", V, E),
        },
        {
            "cls": (1, 1, E),
            "position": (1, 5, E),
            **_kernel("patches", 4, 4, 3, E),
            **_layers("layers", leaves),
            **_norm("norm", "scale"),
            **_kernel("head", E, V),
        },
    )


def _whisper() -> Example:
    tensors: dict[str, Shape] = {
        "model.decoder.embed_tokens.weight": (V, E),
        "model.encoder.conv1.weight": (E, 6, 3),
        "model.encoder.conv1.bias": (E,),
        "model.encoder.conv2.weight": (E, E, 3),
        "model.encoder.conv2.bias": (E,),
    }
    leaves: dict[str, Shape] = {
        "decoder.embed.embedding": (V, E),
        **_kernel("encoder.conv1", 3, 6, E),
        **_kernel("encoder.conv2", 3, E, E),
    }
    for stack, attentions in {"encoder": ("self",), "decoder": ("self", "encoder")}.items():
        block, mine = (
            {**_dense("fc1", F, E), **_dense("fc2", E, F)},
            {**_kernel("mlp.fc1", E, F), **_kernel("mlp.fc2", F, E)},
        )
        for a in attentions:
            block |= _attention(f"{a}_attn", ("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"))
            block |= _dense(f"{a}_attn.out_proj", E, H * D)
            mine |= _attention_leaves(f"{a}_attn", ("q", "k", "v"), ("q", "v"))
            mine |= _kernel(f"{a}_attn.out", H, D, E)
        for norm in (*(f"{a}_attn" for a in attentions), "final"):
            block |= _norm(f"{norm}_layer_norm")
            mine |= _norm(f"{norm}_norm", "scale")
        tensors |= {
            f"model.{stack}.embed_positions.weight": (9, E),
            **_norm(f"model.{stack}.layer_norm"),
        }
        leaves |= {f"{stack}.positions": (9, E), **_norm(f"{stack}.norm", "scale")}
        tensors |= _layers(f"model.{stack}.layers", block)
        leaves |= _layers(f"{stack}.layers", mine)
    return Example(tensors, leaves)


def _t5() -> Example:
    tensors: dict[str, Shape] = {"shared.weight": (V, E)}
    leaves: dict[str, Shape] = {"embed.embedding": (V, E)}
    for stack, parts in {
        "encoder": [("self", "SelfAttention")],
        "decoder": [("self", "SelfAttention"), ("cross", "EncDecAttention")],
    }.items():
        block: dict[str, Shape] = {}
        mine: dict[str, Shape] = {}
        for number, (part, name) in enumerate(parts):
            block |= {f"layer.{number}.{name}.{p}.weight": (H * D, E) for p in "qkv"}
            block |= {f"layer.{number}.{name}.o.weight": (E, H * D)}
            mine |= {f"{part}.{p}.kernel": (E, H, D) for p in "qkv"}
            mine |= {f"{part}.o.kernel": (H, D, E)}
        last = f"layer.{len(parts)}.DenseReluDense"
        block |= {f"{last}.wi.weight": (F, E), f"{last}.wo.weight": (E, F)}
        mine |= {"mlp.wi.kernel": (E, F), "mlp.wo.kernel": (F, E)}
        block |= {f"layer.{number}.layer_norm.weight": (E,) for number in range(len(parts) + 1)}
        mine |= {f"{part}.norm.scale": (E,) for part in (*(part for part, _ in parts), "mlp")}
        tensors |= _layers(f"{stack}.block", block)
        leaves |= _layers(f"{stack}.layers", mine)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors |= {bias: (5, H), f"{stack}.final_layer_norm.weight": (E,)}
        leaves |= {f"{stack}.relative_bias": (5, H), f"{stack}.norm.scale": (E,)}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (5, H)}
    return Example(tensors, leaves, unused)


def _resnet() -> Example:
    tensors: dict[str, Shape] = {"fc.weight": (V, 8), "fc.bias": (V,)}
    leaves: dict[str, Shape] = {"params.fc.kernel": (8, V), "params.fc.bias": (V,)}
    unused: dict[str, Shape] = {}

    def add(conv: str, norm: str, out: int, in_: int, size: int) -> None:
        tensors.update({f"{conv}.weight": (out, in_, size, size)})
        leaves.update({f"params.{conv}.kernel": (size, size, in_, out)})
        tensors.update(
            {f"{norm}.{w}": (out,) for w in ("weight", "bias", "running_mean", "running_var")}
        )
        leaves.update({f"params.{norm}.{w}": (out,) for w in ("scale", "bias")})
        leaves.update({f"batch_stats.{norm}.{w}": (out,) for w in ("mean", "var")})
        unused.update({f"{norm}.num_batches_tracked": ()})

    add("conv1", "bn1", 4, 3, 7)
    for layer, (out, in_) in {"layer1": (4, 4), "layer2": (8, 4)}.items():
        for block in range(2):
            add(f"{layer}.{block}.conv1", f"{layer}.{block}.bn1", out, in_ if not block else out, 3)
            add(f"{layer}.{block}.conv2", f"{layer}.{block}.bn2", out, out, 3)
    add("layer2.0.downsample.0", "layer2.0.downsample.1", 8, 4, 1)
    return Example(tensors, leaves, unused)


_llama = _decoder(_NORMS, mlp=True, qk_norm=False, head=True)
_qwen = _decoder(_NORMS, mlp=False, qk_norm=True, head=True)
_mixtral = _decoder(_NORMS, mlp=False, qk_norm=False, head=True)
_gemma_norms = (*_NORMS, "pre_feedforward", "post_feedforward")

# By the name of the list of rules on the page.
EXAMPLES: dict[str, Example] = {
    "LLAMA": _llama,
    "QWEN3": _decoder(_NORMS, mlp=True, qk_norm=True, head=True),
    "QWEN3_MOE": _with_experts(
        _qwen, "mlp.gate.weight", "mlp.experts", ("gate_proj", "up_proj", "down_proj")
    ),
    "MIXTRAL": _with_experts(
        _mixtral, "block_sparse_moe.gate.weight", "block_sparse_moe.experts", ("w1", "w3", "w2")
    ),
    "GEMMA3": _decoder(_gemma_norms, mlp=True, qk_norm=True, head=False),
    "GPT2": _gpt2(),
    "BERT": _bert(),
    "VIT": _vit(),
    "WHISPER": _whisper(),
    "T5": _t5(),
    "RESNET": _resnet(),
}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with the leaves at their dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree

"""Small checkpoints with the names and axes of well-known models, and the leaves of their trees.

A row says, apart from the rules, which values of a tensor a leaf has: the function in it is NumPy, and
follows from what the layer computes in PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

E, H, K, D, F, V, L, X = 8, 4, 2, 3, 10, 11, 2, 3  # width, heads, key heads, their size, ...

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = Any  # of NumPy
View: TypeAlias = Callable[[Array], Array]


def same(w: Array) -> Array:
    return w


def transposed(w: Array) -> Array:
    """For x @ kernel: torch.nn.Linear computes x @ w.T."""
    return w.T


def to_heads(w: Array) -> Array:
    """For einsum("e,ehd->hd", x, kernel): PyTorch computes (x @ w.T).view(heads, D)."""
    return w.reshape(-1, D, w.shape[1]).transpose(2, 0, 1)


def from_heads(w: Array) -> Array:
    """For einsum("hd,hde->e", x, kernel): PyTorch computes x.view(heads * D) @ w.T."""
    return w.T.reshape(-1, D, len(w))


def split_heads(b: Array) -> Array:
    """For the bias of `to_heads`."""
    return b.reshape(-1, D)


def convolution(w: Array) -> Array:
    """In Flax, the input and the output come last; in PyTorch, they come first, the output before."""
    return np.moveaxis(w, (1, 0), (-2, -1))


class Row(NamedTuple):
    """A leaf, and the tensor that has its values. {l} is a layer, and {x} an expert; experts are stacked."""

    path: str
    name: str
    shape: Shape
    view: View = same

    def paths(self) -> list[str]:
        return [*dict.fromkeys(self.path.replace("{l}", str(l)) for l in range(L))]

    def names(self, layer: int) -> list[str]:
        name = self.name.replace("{l}", str(layer))
        return [*dict.fromkeys(name.replace("{x}", str(x)) for x in range(X))]

    def value(self, file: Mapping[str, Array], layer: int) -> Array:
        """Return what the leaf of a layer must be."""
        found = [self.view(file[name]) for name in self.names(layer)]
        return np.stack(found) if "{x}" in self.name else found[0]


class Example(NamedTuple):
    """The leaves of a tree, and the tensors of a checkpoint that no leaf has."""

    rows: Sequence[Row]
    unused: Mapping[str, Shape] = MappingProxyType({})

    def tensors(self) -> dict[str, Shape]:
        """Return the tensors that leaves have."""
        return {name: row.shape for row in self.rows for l in range(L) for name in row.names(l)}

    def leaves(self, file: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the leaves must be, by their dotted paths."""
        return {path: row.value(file, l) for row in self.rows for l, path in enumerate(row.paths())}

    def unchanged(self) -> "Example":
        """Return the same with the axes of the file."""
        return self._replace(rows=[row._replace(view=same) for row in self.rows])

    def stacked(self, file: Mapping[str, Array]) -> dict[str, Array]:
        """Return the same, with all layers in one array."""
        return {
            row.path.replace("{l}.", ""): np.stack([row.value(file, l) for l in range(L)])
            if "{l}" in row.path
            else row.value(file, 0)
            for row in self.rows
        }


def _dense(path: str, name: str, out: int, in_: int) -> list[Row]:
    return [
        Row(f"{path}.kernel", f"{name}.weight", (out, in_), transposed),
        Row(f"{path}.bias", f"{name}.bias", (out,)),
    ]


def _norm(path: str, name: str, weight: str = "weight", bias: str = "bias") -> list[Row]:
    return [
        Row(f"{path}.scale", f"{name}.{weight}", (E,)),
        Row(f"{path}.bias", f"{name}.{bias}", (E,)),
    ]


def _heads(path: str, name: str) -> list[Row]:
    return [
        Row(f"{path}.kernel", f"{name}.weight", (H * D, E), to_heads),
        Row(f"{path}.bias", f"{name}.bias", (H * D,), split_heads),
    ]


def _out(path: str, name: str) -> list[Row]:
    return [
        Row(f"{path}.kernel", f"{name}.weight", (E, H * D), from_heads),
        Row(f"{path}.bias", f"{name}.bias", (E,)),
    ]


_HEAD = [Row("lm_head.kernel", "lm_head.weight", (V, E), transposed)]
_MLP = [
    Row("layers.{l}.mlp.gate.kernel", "model.layers.{l}.mlp.gate_proj.weight", (F, E), transposed),
    Row("layers.{l}.mlp.up.kernel", "model.layers.{l}.mlp.up_proj.weight", (F, E), transposed),
    Row("layers.{l}.mlp.down.kernel", "model.layers.{l}.mlp.down_proj.weight", (E, F), transposed),
]
_QK_NORMS = [
    Row("layers.{l}.attn.q_norm.scale", "model.layers.{l}.self_attn.q_norm.weight", (D,)),
    Row("layers.{l}.attn.k_norm.scale", "model.layers.{l}.self_attn.k_norm.weight", (D,)),
]


def _decoder(norms: Sequence[str] = ("input", "post_attention")) -> list[Row]:
    attn, own = "model.layers.{l}.self_attn", "layers.{l}.attn"
    return [
        Row("embed.embedding", "model.embed_tokens.weight", (V, E)),
        Row(f"{own}.q.kernel", f"{attn}.q_proj.weight", (H * D, E), to_heads),
        Row(f"{own}.k.kernel", f"{attn}.k_proj.weight", (K * D, E), to_heads),
        Row(f"{own}.v.kernel", f"{attn}.v_proj.weight", (K * D, E), to_heads),
        Row(f"{own}.o.kernel", f"{attn}.o_proj.weight", (E, H * D), from_heads),
        Row("norm.scale", "model.norm.weight", (E,)),
        *(
            Row(f"layers.{{l}}.{n}_norm.scale", f"model.layers.{{l}}.{n}_layernorm.weight", (E,))
            for n in norms
        ),
    ]


def _experts(block: str, gate: str, up: str, down: str) -> list[Row]:
    own, experts = "layers.{l}.moe", f"model.layers.{{l}}.{block}.experts.{{x}}"
    return [
        Row(f"{own}.router.kernel", f"model.layers.{{l}}.{block}.gate.weight", (X, E), transposed),
        Row(f"{own}.gate", f"{experts}.{gate}.weight", (F, E), transposed),
        Row(f"{own}.up", f"{experts}.{up}.weight", (F, E), transposed),
        Row(f"{own}.down", f"{experts}.{down}.weight", (E, F), transposed),
    ]


def _gpt2(query: View, query_bias: View, out: View, dense: View) -> Example:
    """GPT-2 computes x @ w, and splits the output, the last axis, into queries, keys and values."""
    attn = "h.{l}.attn"
    rows = [
        Row("wte.embedding", "wte.weight", (V, E)),
        Row("wpe.embedding", "wpe.weight", (7, E)),
        *_norm("h.{l}.ln_1", "h.{l}.ln_1"),
        *_norm("h.{l}.ln_2", "h.{l}.ln_2"),
        *_norm("ln_f", "ln_f"),
        Row(f"{attn}.out.kernel", f"{attn}.c_proj.weight", (H * D, E), out),
        Row(f"{attn}.out.bias", f"{attn}.c_proj.bias", (E,)),
        Row("h.{l}.mlp.fc.kernel", "h.{l}.mlp.c_fc.weight", (E, F), dense),
        Row("h.{l}.mlp.fc.bias", "h.{l}.mlp.c_fc.bias", (F,)),
        Row("h.{l}.mlp.proj.kernel", "h.{l}.mlp.c_proj.weight", (F, E), dense),
        Row("h.{l}.mlp.proj.bias", "h.{l}.mlp.c_proj.bias", (E,)),
    ]
    for number, p in enumerate("qkv"):

        def third(view: View, number: int = number) -> View:
            return lambda w: view(np.split(w, 3, axis=-1)[number])

        rows += [
            Row(f"{attn}.{p}.kernel", f"{attn}.c_attn.weight", (E, 3 * H * D), third(query)),
            Row(f"{attn}.{p}.bias", f"{attn}.c_attn.bias", (3 * H * D,), third(query_bias)),
        ]
    return Example(rows, {f"h.{l}.attn.bias": (1, 1, 7, 7) for l in range(L)})


def _bert() -> Example:
    block, own = "bert.encoder.layer.{l}", "layers.{l}"
    rows = [
        Row("embeddings.word.embedding", "bert.embeddings.word_embeddings.weight", (V, E)),
        Row("embeddings.position.embedding", "bert.embeddings.position_embeddings.weight", (7, E)),
        Row(
            "embeddings.token_type.embedding",
            "bert.embeddings.token_type_embeddings.weight",
            (2, E),
        ),
        *_norm("embeddings.norm", "bert.embeddings.LayerNorm", "gamma", "beta"),
        *_heads(f"{own}.attn.query", f"{block}.attention.self.query"),
        *_heads(f"{own}.attn.key", f"{block}.attention.self.key"),
        *_heads(f"{own}.attn.value", f"{block}.attention.self.value"),
        *_out(f"{own}.attn.out", f"{block}.attention.output.dense"),
        *_norm(f"{own}.attn.norm", f"{block}.attention.output.LayerNorm", "gamma", "beta"),
        *_dense(f"{own}.mlp.up", f"{block}.intermediate.dense", F, E),
        *_dense(f"{own}.mlp.down", f"{block}.output.dense", E, F),
        *_norm(f"{own}.mlp.norm", f"{block}.output.LayerNorm", "gamma", "beta"),
        *_dense("pooler", "bert.pooler.dense", E, E),
    ]
    unused = [
        *_dense("", "cls.predictions.transform.dense", E, E),
        *_norm("", "cls.predictions.transform.LayerNorm", "gamma", "beta"),
        *_dense("", "cls.seq_relationship", 2, E),
    ]
    return Example(rows, {"cls.predictions.bias": (V,), **{row.name: row.shape for row in unused}})


def _vit() -> Example:
    block, own = "vit.encoder.layer.{l}", "layers.{l}"
    patches = "vit.embeddings.patch_embeddings.projection"
    return Example(
        [
            Row("cls", "vit.embeddings.cls_token", (1, 1, E)),
            Row("position", "vit.embeddings.position_embeddings", (1, 5, E)),
            Row("patches.kernel", f"{patches}.weight", (E, 3, 4, 4), convolution),
            Row("patches.bias", f"{patches}.bias", (E,)),
            *_heads(f"{own}.attn.query", f"{block}.attention.attention.query"),
            *_heads(f"{own}.attn.key", f"{block}.attention.attention.key"),
            *_heads(f"{own}.attn.value", f"{block}.attention.attention.value"),
            *_out(f"{own}.attn.out", f"{block}.attention.output.dense"),
            *_dense(f"{own}.mlp.up", f"{block}.intermediate.dense", F, E),
            *_dense(f"{own}.mlp.down", f"{block}.output.dense", E, F),
            *_norm(f"{own}.norm_before", f"{block}.layernorm_before"),
            *_norm(f"{own}.norm_after", f"{block}.layernorm_after"),
            *_norm("norm", "vit.layernorm"),
            *_dense("head", "classifier", V, E),
        ]
    )


def _whisper() -> Example:
    rows = [
        Row("decoder.embed.embedding", "model.decoder.embed_tokens.weight", (V, E)),
        Row("encoder.conv1.kernel", "model.encoder.conv1.weight", (E, 6, 3), convolution),
        Row("encoder.conv1.bias", "model.encoder.conv1.bias", (E,)),
        Row("encoder.conv2.kernel", "model.encoder.conv2.weight", (E, E, 3), convolution),
        Row("encoder.conv2.bias", "model.encoder.conv2.bias", (E,)),
    ]
    for s, attentions in {"encoder": ["self"], "decoder": ["self", "encoder"]}.items():
        block, own = f"model.{s}.layers.{{l}}", f"{s}.layers.{{l}}"
        rows += [
            Row(f"{s}.positions", f"model.{s}.embed_positions.weight", (9, E)),
            *_dense(f"{own}.mlp.fc1", f"{block}.fc1", F, E),
            *_dense(f"{own}.mlp.fc2", f"{block}.fc2", E, F),
            *_norm(f"{own}.final_norm", f"{block}.final_layer_norm"),
            *_norm(f"{s}.norm", f"model.{s}.layer_norm"),
        ]
        for a in attentions:
            rows += [
                *_heads(f"{own}.{a}_attn.q", f"{block}.{a}_attn.q_proj"),
                *_heads(f"{own}.{a}_attn.k", f"{block}.{a}_attn.k_proj")[:1],  # without a bias
                *_heads(f"{own}.{a}_attn.v", f"{block}.{a}_attn.v_proj"),
                *_out(f"{own}.{a}_attn.out", f"{block}.{a}_attn.out_proj"),
                *_norm(f"{own}.{a}_attn_norm", f"{block}.{a}_attn_layer_norm"),
            ]
    return Example(rows)


def _t5() -> Example:
    parts = {"self": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    bias = "relative_attention_bias.weight"
    rows = [Row("embed.embedding", "shared.weight", (V, E))]
    for s, order in {"encoder": ["self", "mlp"], "decoder": ["self", "cross", "mlp"]}.items():
        rows += [
            Row(f"{s}.relative_bias", f"{s}.block.0.layer.0.SelfAttention.{bias}", (5, H)),
            Row(f"{s}.norm.scale", f"{s}.final_layer_norm.weight", (E,)),
        ]
        for number, part in enumerate(order):
            sublayer, own = f"{s}.block.{{l}}.layer.{number}", f"{s}.layers.{{l}}.{part}"
            layer = f"{sublayer}.{parts[part]}"
            rows += [Row(f"{own}.norm.scale", f"{sublayer}.layer_norm.weight", (E,))]
            if part == "mlp":
                rows += [
                    Row(f"{own}.wi.kernel", f"{layer}.wi.weight", (F, E), transposed),
                    Row(f"{own}.wo.kernel", f"{layer}.wo.weight", (E, F), transposed),
                ]
            else:
                rows += [
                    Row(f"{own}.q.kernel", f"{layer}.q.weight", (H * D, E), to_heads),
                    Row(f"{own}.k.kernel", f"{layer}.k.weight", (H * D, E), to_heads),
                    Row(f"{own}.v.kernel", f"{layer}.v.weight", (H * D, E), to_heads),
                    Row(f"{own}.o.kernel", f"{layer}.o.weight", (E, H * D), from_heads),
                ]
    return Example(rows, {f"decoder.block.0.layer.1.EncDecAttention.{bias}": (5, H)})


def _resnet() -> Example:
    rows = [*_dense("params.fc", "fc", V, 8)]
    unused: dict[str, Shape] = {}

    def add(conv: str, norm: str, out: int, in_: int, size: int) -> None:
        rows.extend(
            [
                Row(f"params.{conv}.kernel", f"{conv}.weight", (out, in_, size, size), convolution),
                Row(f"params.{norm}.scale", f"{norm}.weight", (out,)),
                Row(f"params.{norm}.bias", f"{norm}.bias", (out,)),
                Row(f"batch_stats.{norm}.mean", f"{norm}.running_mean", (out,)),
                Row(f"batch_stats.{norm}.var", f"{norm}.running_var", (out,)),
            ]
        )
        unused[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", 4, 3, 7)
    for layer, (out, in_) in {"layer1": (4, 4), "layer2": (8, 4)}.items():
        for block in range(2):
            add(f"{layer}.{block}.conv1", f"{layer}.{block}.bn1", out, in_ if not block else out, 3)
            add(f"{layer}.{block}.conv2", f"{layer}.{block}.bn2", out, out, 3)
    add("layer2.0.downsample.0", "layer2.0.downsample.1", 8, 4, 1)
    return Example(rows, unused)


# By the name of the list of rules on the page.
EXAMPLES: dict[str, Example] = {
    "LLAMA": Example([*_decoder(), *_MLP, *_HEAD]),
    "QWEN3": Example([*_decoder(), *_MLP, *_QK_NORMS, *_HEAD]),
    "QWEN3_MOE": Example(
        [*_decoder(), *_experts("mlp", "gate_proj", "up_proj", "down_proj"), *_QK_NORMS, *_HEAD]
    ),
    "MIXTRAL": Example([*_decoder(), *_experts("block_sparse_moe", "w1", "w3", "w2"), *_HEAD]),
    "GEMMA3": Example(
        [
            *_decoder(("input", "post_attention", "pre_feedforward", "post_feedforward")),
            *_MLP,
            *_QK_NORMS,
        ]
    ),
    "GPT2": _gpt2(
        lambda w: w.reshape(E, H, D), split_heads, lambda w: w.reshape(H, D, E), dense=same
    ),
    "GPT2_OUT_IN": _gpt2(transposed, same, transposed, dense=transposed),
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

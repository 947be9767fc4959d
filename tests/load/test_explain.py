"""Explaining a load: the text, and that only headers and scalars are read."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pytree2safetensors import Rule, WeightsMismatchError, explain, load_into_pytree, save_pytree

STRUCT: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    file = {"h.0.q": zeros(16, 6), "h.1.q": zeros(16, 5), "w.0": zeros(2, 3), "w.1": zeros(2, 3)}
    safetensors.numpy.save_file({**file, "vision.a": zeros(1), "rest": zeros(2)}, path)
    return path


RULES = [
    Rule("h.{l}.q", "layers.{l}.q", "(h d) e -> e h d"),
    Rule("w.{l}", "w", "o i -> l i o"),
    Rule("idle.{p}", "idle.{p}"),
    Rule(None, "f"),
    Rule("vision.{*}", None),
]


def test_every_leaf_has_a_row(path: Path) -> None:
    layers = [{"q": zeros(6, 2, 8)}, {"q": zeros(6, 2, 8)}, {"q": zeros(6, 2, 8), "new": zeros(2)}]
    text = explain({"layers": layers, "w": zeros(2, 3, 2), "f": zeros(1)}, path, rename=RULES)
    assert text.splitlines() == [
        f"{str(path)!r}: 2 of 6 leaves fit",
        "  kept     '@f' = 'f'                        float32[1]      not in the file",
        "  fits     '@layers#0@q' = 'layers.0.q'      float32[6,2,8]  'h.0.q' float32[16,6]               "
        "'(h d) e -> e h d'",
        "  differs  '@layers#1@q' = 'layers.1.q'      float32[6,2,8]  the template has float32[6,2,8]; under "
        f"{RULES[0]!r}, the tensor 'h.1.q' would be [16,6], but it is float32[16,5]",
        "  missing  '@layers#2@new' = 'layers.2.new'  float32[2]      no rule has this path",
        "  missing  '@layers#2@q' = 'layers.2.q'      float32[6,2,8]  there is no 'h.2.q'",
        "  fits     '@w' = 'w'                        float32[2,3,2]  'w.0' ... 'w.1', 2 of float32[2,3]  "
        "'o i -> l i o'",
        "unused tensors:",
        "  'rest'",
        "rules that no leaf of the template uses:",
        "  Rule('idle.{p}', 'idle.{p}')",
    ]


def test_rules_that_earlier_rules_hide_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.numpy.save_file({"fc.weight": zeros(2, 2)}, path)
    wide = Rule("{*}.weight", "{*}.kernel")
    hidden = [Rule("fc.weight", "fc.kernel", "o i -> i o"), Rule("fc.weight", "@fc@kernel")]
    rules = [wide, *hidden, Rule("gone", "gone")]
    assert explain({"fc": {"kernel": zeros(2, 2)}}, path, rename=rules).splitlines()[2:] == [
        "rules that no leaf of the template uses:",
        f"  {hidden[0]!r} (hidden by the earlier {wide!r}; put the more specific rule first)",
        f"  {hidden[1]!r} (hidden by the earlier {wide!r}; put the more specific rule first)",
        "  Rule('gone', 'gone')",
    ]


def test_a_rule_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.numpy.save_file({"a": zeros(1), "b": zeros(1)}, path)
    rules = [Rule("a", "a"), Rule("{*}", "{*}"), Rule("{*}", "{*}"), Rule("a", "a")]
    text = explain({"a": zeros(1), "b": zeros(1)}, path, rename=rules)
    assert text.splitlines()[3:] == [
        "rules that no leaf of the template uses:",
        "  Rule('{*}', '{*}') (the same rule is there earlier; remove one of them)",
        "  Rule('a', 'a') (the same rule is there earlier; remove one of them)",
    ]


def test_a_hidden_rule_may_be_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.numpy.save_file({"a": zeros(1)}, path)
    template = {"a.0": zeros(1), "a": [zeros(1)]}  # which have the dotted path a.0
    rules = [Rule("a", "@a#0"), Rule("{=}", "{=}"), Rule("b", "a.0")]
    text = explain(template, path, rename=rules)
    assert f"  {rules[2]!r} (hidden by the earlier {rules[0]!r};" in text


def test_without_rules_all_paths_are_listed(path: Path) -> None:
    template = {"layers": [zeros(1)] * 30}
    lines = explain(template, path, rename=[]).splitlines()
    assert lines[1] == "  missing  '@layers#0' = 'layers.0'    float32[1]  no rule has this path"
    assert len([line for line in lines if "no rule has this path" in line]) == 30


def test_a_dotted_path_is_shown_only_if_a_rule_can_have_it(path: Path) -> None:
    rule, hint = Rule("w.0", "a@b"), "write it as '@a\\\\@b' is spelled)"
    template = {"a@b": zeros(2, 3)}
    lines = explain(template, path, rename=[rule]).splitlines()
    assert lines[1] == "  missing  '@a\\\\@b'  float32[2,3]  no rule has this path"
    assert lines[-1].startswith(f"  {rule!r} (")
    assert lines[-1].endswith(hint)
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree(template, path, rename=[rule])
    assert "    '@a\\\\@b': no rule has this path" in str(caught.value).splitlines()
    assert hint in str(caught.value)
    load_into_pytree(
        template, path, rename=[Rule("w.0", r"@a\@b"), Rule("{*}", None)], unexpected="skip"
    )


def test_names_may_come_from_elsewhere(path: Path) -> None:
    template = {"w": zeros(2, 3), "act": jax.nn.relu}
    assert explain(template, path, rename={"@w": "w.0"}).splitlines()[:2] == [
        f"{str(path)!r}: 1 of 1 leaves fit",
        "  fits  '@w' = 'w'  float32[2,3]  'w.0' float32[2,3]",
    ]


def test_scalars_are_judged_by_their_values(tmp_path: Path) -> None:
    path = tmp_path / "scalars.safetensors"
    save_pytree({"large": 2**40, "small": 7, "huge": 2**80, "infinite": 1e300}, path)
    wanted = {"large": np.int32(0), "small": np.int32(0), "huge": 0, "infinite": np.float32(0)}
    lines = explain(wanted, path).splitlines()
    assert lines[0] == f"{str(path)!r}: 2 of 4 leaves fit"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["fits", "'@huge'"],
        ["differs", "'@infinite'"],
        ["differs", "'@large'"],
        ["fits", "'@small'"],
    ]
    with pytest.raises(WeightsMismatchError, match="0 missing, 0 unexpected, 2 mismatched") as got:
        load_into_pytree(wanted, path)
    for mismatch in got.value.mismatched:
        assert any(line.endswith(mismatch.partition(": ")[2]) for line in lines)


def test_data_are_not_read(path: Path) -> None:
    template = {"w": STRUCT((2, 3, 2), np.float32)}
    load_into_pytree(template, path, rename=RULES, strict=False)
    size = path.stat().st_size
    raw = path.read_bytes()
    path.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    os.truncate(path, size)  # the data are gone now
    assert "1 of 1 leaves fit" in explain(template, path, rename=RULES)


LLAMA_3_8B = {
    "model.embed_tokens": (128256, 4096),
    "lm_head": (128256, 4096),
    "model.norm": (4096,),
    **{
        f"model.layers.{l}.{name}": shape
        for l in range(32)
        for name, shape in {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
            "input_layernorm": (4096,),
            "post_attention_layernorm": (4096,),
        }.items()
    },
}


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_eight_billion_parameters_are_explained_from_the_header(
    tmp_path: Path, stacked: bool
) -> None:
    header, end = {}, 0
    for name, shape in LLAMA_3_8B.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # 16 GB without contents
    layer = {
        "q": (4096, 32, 128), "k": (4096, 8, 128), "v": (4096, 8, 128), "o": (32, 128, 4096),
        "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
        "input_norm": (4096,), "post_attention_norm": (4096,),
    }  # fmt: skip
    lead = (32,) if stacked else ()
    layers = {name: STRUCT((*lead, *shape), jnp.bfloat16) for name, shape in layer.items()}
    template = {
        "embed": STRUCT((128256, 4096), jnp.bfloat16),
        "head": STRUCT((4096, 128256), jnp.bfloat16),
        "norm": STRUCT((4096,), jnp.bfloat16),
        "layers": layers if stacked else [layers] * 32,
    }
    l, n = ("l ", "") if stacked else ("", ".{l}")
    rules = [
        Rule("model.embed_tokens.weight", "embed"),
        Rule("lm_head.weight", "head", "v e -> e v"),
        Rule("model.norm.weight", "norm"),
        Rule("model.layers.{l}.self_attn.o_proj.weight", f"layers{n}.o", f"e (h d) -> {l}h d e"),
        Rule(
            "model.layers.{l}.self_attn.{p:q,k,v}_proj.weight",
            f"layers{n}.{{p}}",
            f"(h d) e -> {l}e h d",
        ),
        Rule(
            "model.layers.{l}.mlp.{m:gate,up,down}_proj.weight",
            f"layers{n}.{{m}}",
            f"o i -> {l}i o",
        ),
        Rule(
            "model.layers.{l}.{n:input,post_attention}_layernorm.weight",
            f"layers{n}.{{n}}_norm",
            f"e -> {l}e",
        ),
    ]
    lines = explain(template, path, rename=rules).splitlines()
    count = 12 if stacked else 291
    assert lines[0] == f"{str(path)!r}: {count} of {count} leaves fit"
    assert len(lines) == 1 + count

"""The lists of rules in the guide, on small checkpoints with the names and axes of their models."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from mappings import EXAMPLES, Example, nested
from oracle import assert_same_values
from pytree2safetensors import Rule, load_into_pytree, save_pytree

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "mappings.md"
STRUCT: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types


def lists_of_the_page() -> dict[str, list[Rule]]:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec("\n".join(blocks), namespace)
    return {name: found for name, found in namespace.items() if isinstance(found, list)}


LISTS = lists_of_the_page()


def test_every_list_has_a_checkpoint_and_at_most_twenty_rules() -> None:
    assert LISTS.keys() == EXAMPLES.keys()
    assert max(map(len, LISTS.values())) <= 20


def checkpoint(example: Example) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {**example.tensors, **example.unused}
    return {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_list_loads_its_checkpoint_and_saves_it_again(name: str, tmp_path: Path) -> None:
    example, rules = EXAMPLES[name], LISTS[name]
    file = checkpoint(example)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(file, path)
    template = nested({path: STRUCT(shape, np.float32) for path, shape in example.leaves.items()})
    tree = load_into_pytree(template, path, rename=rules)
    save_pytree(tree, path, rename=rules, metadata={"format": "pt"})
    again = safetensors.numpy.load_file(path)
    assert again.keys() == example.tensors.keys()
    for key, values in again.items():
        assert_same_values(values, file[key])


def test_values_are_where_a_model_expects_them(tmp_path: Path) -> None:
    """A few leaves, by hand: a permutation that is its own inverse would survive the way back."""
    found = {}
    for name in ("LLAMA", "MIXTRAL", "GPT2", "RESNET"):
        example = EXAMPLES[name]
        file = checkpoint(example)
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(file, path)
        template = nested({path: STRUCT(s, np.float32) for path, s in example.leaves.items()})
        found[name] = (
            file,
            jax.tree.map(np.asarray, load_into_pytree(template, path, rename=LISTS[name])),
        )
    file, tree = found["LLAMA"]
    layer, prefix = tree["layers"]["1"], "model.layers.1"
    x = np.ones(8, np.float32)
    q = np.einsum("e,ehd->hd", x, layer["attn"]["q"]["kernel"])
    np.testing.assert_allclose(
        q.reshape(-1), file[f"{prefix}.self_attn.q_proj.weight"] @ x, rtol=1e-5
    )
    o = np.einsum("hd,hde->e", q, layer["attn"]["o"]["kernel"])
    np.testing.assert_allclose(
        o, file[f"{prefix}.self_attn.o_proj.weight"] @ q.reshape(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(
        layer["mlp"]["up"]["kernel"], file[f"{prefix}.mlp.up_proj.weight"].T
    )
    file, tree = found["MIXTRAL"]
    moe = tree["layers"]["0"]["moe"]
    for part, name in {"gate": "w1", "down": "w2", "up": "w3"}.items():
        expert = file[f"model.layers.0.block_sparse_moe.experts.2.{name}.weight"]
        np.testing.assert_array_equal(moe[part][2], expert.T)
    file, tree = found["GPT2"]
    kernel, attention = file["h.0.attn.c_attn.weight"], tree["h"]["0"]["attn"]
    for part, values in zip("qkv", np.split(kernel, 3, axis=1), strict=True):
        np.testing.assert_array_equal(attention[part]["kernel"].reshape(8, -1), values)
    file, tree = found["RESNET"]
    np.testing.assert_array_equal(
        tree["params"]["conv1"]["kernel"], file["conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(tree["batch_stats"]["bn1"]["var"], file["bn1.running_var"])

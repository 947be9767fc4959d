"""The lists of rules in the guide, on small checkpoints with the names and axes of their models."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mappings import EXAMPLES, D, E, Example, convolution, from_heads, nested, to_heads, transposed
from oracle import assert_same, assert_same_values
from pytree2safetensors import Rule, load_into_pytree, save_pytree

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def blocks_of(page: str) -> list[str]:
    text = (GUIDES / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lists_of_the_page() -> dict[str, list[Rule]]:
    namespace: dict[str, Any] = {}
    exec("\n".join(blocks_of("mappings.md")), namespace)
    return {name: found for name, found in namespace.items() if isinstance(found, list)}


LISTS = lists_of_the_page()


def test_every_list_has_a_checkpoint_and_at_most_twenty_rules() -> None:
    assert LISTS.keys() == EXAMPLES.keys()
    assert max(map(len, LISTS.values())) <= 20


def checkpoint(example: Example) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {**example.tensors(), **example.unused}
    return {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()
    }


def check(
    file: Mapping[str, Any],
    rules: Sequence[Rule],
    leaves: Mapping[str, Any],
    saved: Mapping[str, Any],
    path: Path,
) -> None:
    """Load the leaves, compare all of them, save them again, and compare all tensors."""
    safetensors.numpy.save_file(dict(file), path)
    template = nested({name: np.zeros_like(leaf) for name, leaf in leaves.items()})
    tree = load_into_pytree(template, path, rename=rules)
    assert_same(tree, nested(leaves))
    save_pytree(tree, path, rename=rules, metadata={"format": "pt"})
    again = safetensors.numpy.load_file(path)
    assert again.keys() == saved.keys()
    for name, values in again.items():
        assert_same_values(values, file[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_list_loads_its_checkpoint_and_saves_it_again(name: str, tmp_path: Path) -> None:
    example, path = EXAMPLES[name], tmp_path / "model.safetensors"
    file = checkpoint(example)
    check(file, LISTS[name], example.leaves(file), example.tensors(), path)


def stacked(rule: Rule) -> Rule:
    """Change a rule as the page says, for a model that stacks its layers."""
    if "{l}" not in (rule.path or ""):
        return rule
    left, right = (rule.pattern or "... -> ...").split("->")
    return Rule(rule.name, (rule.path or "").replace("{l}.", ""), f"{left}-> l{right}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_list_stacks_the_layers(name: str, tmp_path: Path) -> None:
    example, path = EXAMPLES[name], tmp_path / "model.safetensors"
    file = checkpoint(example)
    rules = [*map(stacked, LISTS[name])]
    check(file, rules, example.stacked(file), example.tensors(), path)


def unchanged(rule: Rule) -> Rule:
    """Change a rule as the page says, for a model that has the axes of the file."""
    return Rule(rule.name, rule.path, "o i -> x o i" if rule.pattern == "o i -> x i o" else "")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "GPT2" not in name])
def test_a_list_leaves_the_axes_as_in_the_file(name: str, tmp_path: Path) -> None:
    example, path = EXAMPLES[name].unchanged(), tmp_path / "model.safetensors"
    file = checkpoint(example)
    rules = [*map(unchanged, LISTS[name])]
    check(file, rules, example.leaves(file), example.tensors(), path)


def to_nnx() -> Callable[[Rule], Rule]:
    """Return the function of another page, which changes a rule for a module of NNX."""
    [block] = [block for block in blocks_of("pytorch.md") if "def to_nnx(" in block]
    namespace: dict[str, Any] = {"Rule": Rule}
    exec(block, namespace)
    function: Callable[[Rule], Rule] = namespace["to_nnx"]
    return function


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_list_fits_paths_of_nnx(name: str, tmp_path: Path) -> None:
    example, path = EXAMPLES[name], tmp_path / "model.safetensors"
    file = checkpoint(example)
    leaves = {f"{path}.value": leaf for path, leaf in example.leaves(file).items()}
    check(file, [*map(to_nnx(), LISTS[name])], leaves, example.tensors(), path)


def test_the_function_for_nnx_keeps_the_sizes_of_a_rule() -> None:
    rule = Rule("q", "q", "(h t d) e -> e h (d t)", t=2)
    assert to_nnx()(rule) == Rule("q", "q.value", rule.pattern, t=2)


@pytest.mark.parametrize(
    "rule",
    [Rule("q", None), Rule("{=}", "{=}"), Rule(None, "{*}.rngs.{r:count,key}.value")],
)
def test_the_function_for_nnx_keeps_rules_whose_path_is_complete(rule: Rule) -> None:
    assert to_nnx()(rule) == rule


def test_the_examples_compute_what_pytorch_computes() -> None:
    """The views of the table, apart from any rules; with integers, so the results are exact."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return rng.integers(-99, 99, shape)

    w, x = some(4 * D, E), some(E)
    y = w @ x  # torch.nn.Linear
    np.testing.assert_array_equal(x @ transposed(w), y)
    heads = np.einsum("e,ehd->hd", x, to_heads(w))
    np.testing.assert_array_equal(heads, y.reshape(4, D))
    w = some(E, 4 * D)
    np.testing.assert_array_equal(np.einsum("hd,hde->e", heads, from_heads(w)), w @ y)
    w, patch = some(5, 3, 2, 4), some(3, 2, 4)  # torch.nn.Conv2d, at one place
    np.testing.assert_array_equal(
        np.einsum("iyx,yxio->o", patch, convolution(w)), (w * patch).sum((1, 2, 3))
    )

"""Explaining a load: the text, and that no data are read."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from pytree2safetensors import Rule, explain, load_into_pytree

STRUCT: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped


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
    Rule("idle", "idle"),
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
        "  differs  '@layers#1@q' = 'layers.1.q'      float32[6,2,8]  the template has float32[6,2,8]; by "
        f"{RULES[0]!r} the tensor 'h.1.q' would be [16,6], but it is float32[16,5]",
        "  missing  '@layers#2@new' = 'layers.2.new'  float32[2]      no rule has this path",
        "  missing  '@layers#2@q' = 'layers.2.q'      float32[6,2,8]  there is no 'h.2.q'",
        "  fits     '@w' = 'w'                        float32[2,3,2]  'w.0' ... 'w.1', 2 of float32[2,3]  "
        "'o i -> l i o'",
        "unused tensors:",
        "  'rest'",
        "rules that match no path of the template:",
        "  Rule('idle', 'idle')",
    ]


def test_without_rules_all_paths_are_listed(path: Path) -> None:
    template = {"layers": [zeros(1)] * 30}
    lines = explain(template, path, rename=[]).splitlines()
    assert lines[1] == "  missing  '@layers#0' = 'layers.0'    float32[1]  no rule has this path"
    assert len([line for line in lines if "no rule has this path" in line]) == 30


def test_names_may_come_from_elsewhere(path: Path) -> None:
    template = {"w": zeros(2, 3), "act": jax.nn.relu}
    assert explain(template, path, rename={"@w": "w.0"}).splitlines()[:2] == [
        f"{str(path)!r}: 1 of 1 leaves fit",
        "  fits  '@w' = 'w'  float32[2,3]  'w.0' float32[2,3]",
    ]


def test_data_are_not_read(path: Path) -> None:
    template = {"w": STRUCT((2, 3, 2), np.float32)}
    load_into_pytree(template, path, rename=RULES, strict=False)
    size = path.stat().st_size
    raw = path.read_bytes()
    path.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    os.truncate(path, size)  # the data are a hole now
    assert "1 of 1 leaves fit" in explain(template, path, rename=RULES)

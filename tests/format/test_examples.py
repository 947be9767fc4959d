"""The examples on the format page are what the library writes."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import hostile
from pytree2safetensors import save_pytree

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
HEADER, NOTE, INDEX = re.findall(
    r"^```json\n(.*?)\n```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


def header_of(tree: Any) -> bytes:
    file = io.BytesIO()
    save_pytree(tree, file)
    return hostile.split(file.getvalue())[0]


def test_the_header_is_that_of_an_array() -> None:
    assert header_of({"w": np.zeros((2, 3), np.float32)}).rstrip(b" ").decode() == HEADER


def test_the_note_is_that_of_an_int_and_a_tuple() -> None:
    metadata = json.loads(header_of({"step": 7, "layers": [(np.zeros(2),)]}))["__metadata__"]
    assert metadata["pytree2safetensors"] == NOTE


def test_the_index_is_that_of_two_shards(tmp_path: Path) -> None:
    tree = {"a": np.zeros(40), "b": np.zeros(35), "step": 7}
    save_pytree(tree, tmp_path, max_shard_size=320)
    assert (tmp_path / "model.safetensors.index.json").read_text() == INDEX + "\n"

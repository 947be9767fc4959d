"""The examples on the format page are what the library writes."""

import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hostile
from format.test_digests import VECTORS
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


@pytest.fixture
def anatomy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What draws the page."""
    monkeypatch.syspath_prepend(PAGE.parent / "_ext")
    return importlib.import_module("anatomy")


def test_the_whole_file_is_that_of_the_tree_above_it(anatomy: Any) -> None:
    said = re.search(r"all the bytes of the file for\s`(.*?)`", PAGE.read_text("utf-8"), re.DOTALL)
    assert said is not None
    file = io.BytesIO()
    save_pytree(eval(said[1], {"array": np.array, "float32": np.float32}), file)
    shown = "".join(line[6:53] for line in anatomy.hexdump())
    assert bytes.fromhex(shown) == file.getvalue()


def test_the_vectors_are_those_of_the_tests(anatomy: Any) -> None:
    _, _, *rows = anatomy.vectors()
    shown = [re.findall(r"`(.*?)`", row) for row in rows]
    assert shown == [
        [name, dtype, str(shape).replace(" ", ""), digest] for name, dtype, shape, digest in VECTORS
    ]

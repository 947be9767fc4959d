"""An index is never trusted, whatever it contains."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folders import INDEX, shard_names, tree_of
from pytree2safetensors import (
    FileFormatError,
    Pytree2SafetensorsError,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._load import shard_index

FIRST, SECOND, THIRD = shard_names(3)


def replaced(name: str, shard: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index | {"weight_map": index["weight_map"] | {name: shard}}


def said(**metadata: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index | {"metadata": index["metadata"] | metadata}


NO_MAP = "has no weight_map from names of tensors to names of files"
NOT_PLAIN = "which is not the plain name of a file in its folder"
BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda index: [index], "is not a JSON object"),
    "no map": (lambda index: {"metadata": {}}, NO_MAP),
    "the map a list": (lambda index: index | {"weight_map": [FIRST]}, NO_MAP),
    "a number": (replaced("@a", 1), NO_MAP),
    "null": (replaced("@a", None), NO_MAP),
    "nothing": (replaced("@a", ""), f"places '@a' in '', {NOT_PLAIN}"),
    "this folder": (replaced("@a", "."), NOT_PLAIN),
    "above": (replaced("@a", ".."), NOT_PLAIN),
    "up and down": (replaced("@a", f"../m/{FIRST}"), NOT_PLAIN),
    "a detour": (replaced("@a", f"./{FIRST}"), NOT_PLAIN),
    "a folder": (replaced("@a", f"sub/{FIRST}"), NOT_PLAIN),
    "absolute": (replaced("@a", "/etc/passwd"), f"places '@a' in '/etc/passwd', {NOT_PLAIN}"),
    "Windows": (replaced("@a", f"..\\m\\{FIRST}"), NOT_PLAIN),
    "NUL": (replaced("@a", f"{FIRST}\0"), NOT_PLAIN),
    "a surrogate": (replaced("@a", "\ud800"), NOT_PLAIN),
    "no such shard": (
        replaced("@a", "model-00004-of-00003.safetensors"),
        "names the shard 'model-00004-of-00003.safetensors', which is missing; copy the complete folder",
    ),
    "a shard of another name": (replaced("@a", "x" * 10_000), "(10,000 characters), which is miss"),
    "a pipe": (replaced("@a", "pipe"), "/m/pipe' is a pipe or a device, not a regular file"),
    "the index": (replaced("@a", INDEX), "is not a safetensors file"),
    "no safetensors file": (replaced("@a", "junk"), "is not a safetensors file"),
    "another shard": (replaced("@a", SECOND), f"the shard '{SECOND}' lacks '@a', which "),
    "a name that the shard lacks": (
        replaced("@x", FIRST),
        f"the shard '{FIRST}' lacks '@x', which",
    ),
    "metadata a list": (lambda index: index | {"metadata": []}, "is not a JSON object"),
    "a note that is not a string": (
        said(pytree2safetensors=1),
        "has 'pytree2safetensors', which is no",
    ),
    "digests that are none": (
        said(**{"pytree2safetensors.sha256": {}}),
        "has 'pytree2safetensors.sha256', which is not a string",
    ),
    "a note of nothing": (said(pytree2safetensors="{}"), "has no version"),
    "surrogates": (said(run="\udc00"), "holds a lone surrogate"),
    "surrogates in a key": (said(**{"\udc00": "1"}), "holds a lone surrogate"),
    "a surrogate that stands for a byte": (replaced("@a", "\udcff"), NOT_PLAIN),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_is_not_trusted(tmp_path: Path, case: str) -> None:
    change, message = BAD_INDEXES[case]
    folder = tmp_path / "m"
    save_pytree(tree_of(1), folder, max_shard_size=100)
    (folder / "sub").mkdir()
    shutil.copy(folder / FIRST, folder / "sub" / FIRST)
    (folder / "junk").write_bytes(b"\xff" * 100)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    elif case == "a pipe":
        pytest.skip("a system without pipes that have names")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index)))
    with pytest.raises(FileFormatError) as caught:
        load_pytree(folder)
    assert message in str(caught.value)
    assert repr(str(folder))[1:-1] in str(caught.value)


def test_an_index_with_other_members_has_metadata(tmp_path: Path) -> None:
    save_pytree(tree_of(1), tmp_path, max_shard_size=100)
    index = json.loads((tmp_path / INDEX).read_text())
    index["Metadata"] = index.pop("metadata")
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = 'has other entries but no metadata: copy it again, or add "metadata": null to it'
    with pytest.raises(FileFormatError, match=message):
        load_pytree(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index | {"metadata": None}))
    assert load_metadata(tmp_path) == {}


BAD_TEXTS = {
    b"": "is not valid JSON",
    b"{": "is not valid JSON",
    b"\xff{}": "is not valid UTF-8",
    b"\xef\xbb\xbf{}": "has no weight_map",
    b'{"weight_map": {"@a": "x", "@a": "y"}}': "has '@a' twice",
    b'{"weight_map": {}, "metadata": {}, "more": [{"b": 1, "b": 1}]}': "has 'b' twice",
    b'{"weight_map": {}, "metadata": {"total_size": NaN}}': "is not valid JSON",
    b"[" * 100_000: "is nested too deeply",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: repr(text[:20]))
def test_an_index_is_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(FileFormatError) as caught:
        load_pytree(tmp_path)
    assert f"the index {str(tmp_path / INDEX)!r} {BAD_TEXTS[text]}" in str(caught.value)


def test_an_index_has_a_size(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(FileFormatError, match="has 100,000,001 bytes, and an index has at most"):
        load_pytree(tmp_path)


def test_an_index_may_have_as_many_bytes_as_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "MAX_HEADER", 100)
    for size, is_read in ((100, True), (101, False)):
        (tmp_path / INDEX).write_text('{"weight_map": {}}'.ljust(size))
        if is_read:
            assert load_pytree(tmp_path) == {}
        else:
            with pytest.raises(
                FileFormatError, match="has 101 bytes, and an index has at most 100"
            ):
                load_pytree(tmp_path)


def test_an_index_of_nothing_is_an_empty_tree(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert load_pytree(tmp_path) == {}


def test_a_folder_named_as_an_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(IsADirectoryError):
        load_pytree(tmp_path)


def flips(raw: bytes) -> Iterator[bytes]:
    for position in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


def test_every_flipped_bit_of_an_index_is_found_or_changes_nothing(tmp_path: Path) -> None:
    tree = {"a": np.arange(3, dtype=np.int8), "b": ("x",), "c": np.int8(1)}
    save_pytree(tree, tmp_path, max_shard_size=3, metadata={"k": "v"}, checksum=True)
    found = 0
    for changed in flips((tmp_path / INDEX).read_bytes()):
        (tmp_path / INDEX).write_bytes(changed)
        try:
            loaded, metadata = load_pytree(tmp_path), load_metadata(tmp_path)
        except Pytree2SafetensorsError:
            found += 1
        else:
            # The one name that nothing protects is that of the digests themselves.
            assert metadata["k"] == "v"
            assert loaded["b"] == ("x",)
            assert loaded["a"].tobytes() == b"\0\1\2"
    assert found > 1000


@given(st.randoms(use_true_random=False))
def test_a_mutated_index_is_a_tree_or_an_error(one_folder: Path, source: random.Random) -> None:
    text = bytearray((one_folder / "whole").read_bytes())
    tokens = [
        b"..",
        b"/",
        b"{",
        b"}",
        b'"',
        b"\\u0000",
        b"@a",
        FIRST.encode(),
        b"[",
        b",",
        b"1e999",
    ]
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(text))
        stop = start + source.choice([0, 1, 1, source.randrange(40)])
        text[start:stop] = source.choice([bytes([source.randrange(256)]), *tokens])
    (one_folder / INDEX).write_bytes(text)
    try:
        load_pytree(one_folder)
    except (Pytree2SafetensorsError, OSError) as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    save_pytree(tree_of(1), folder, max_shard_size=100)
    (folder / INDEX).rename(folder / "whole")
    return folder

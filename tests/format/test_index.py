"""Shards and their index: the division of tensors, and sizes in bytes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folders import tree_of
from pytree2safetensors import FileFormatError, save_pytree, save_pytree_async
from pytree2safetensors._format import index as index_format
from pytree2safetensors._format.layout import in_order
from pytree2safetensors._format.tensor import TensorInfo


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    theirs = pytest.importorskip("huggingface_hub")
    infos = {f"{i:03}": TensorInfo("U8", (size,), size) for i, size in enumerate(sizes)}
    ordered = {name: infos[name].nbytes for name in in_order(infos)}
    expected = theirs.split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert index_format.into_shards(infos, limit, {}) == list(expected.filename_to_tensors.values())


@pytest.mark.parametrize("size", ["5GB", "1.5MB", "2 TB", "0.5KB"])
def test_sizes_are_those_of_huggingface_hub(size: str) -> None:
    theirs = pytest.importorskip("huggingface_hub.serialization._base")
    assert index_format.parse_size(size) == theirs.parse_size_to_int(size)


SIZES: dict[str | int, int] = {
    1: 1,
    5_000_000_000: 5 * 10**9,
    "5GB": 5 * 10**9,
    "5gb": 5 * 10**9,
    " 1.5 MB ": 1_500_000,
    "0.29KB": 290,  # with floats, it would be 289 or 290
    "2TB": 2 * 10**12,
    "100B": 100,
    "1.9B": 1,
}


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_sizes_are_decimal(size: int | str) -> None:
    assert index_format.parse_size(size) == SIZES[size]


@pytest.mark.parametrize("size", ["", "5", "GB", "5GiB", "-5GB", "5e3KB", "1_0KB", "٥GB", "inf GB"])
def test_other_sizes_are_refused(tmp_path: Path, size: str) -> None:
    message = (
        f"max_shard_size={size!r} is not a size; write a number of bytes, or a decimal number and "
        "one of the units B, KB, MB, GB, TB, as in '5GB'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("size", [0, -1, "0GB", "0.9B"])
def test_a_shard_takes_a_byte(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size is .*; a shard holds at least one"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=size)


def test_an_index_beyond_what_readers_allow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_format, "MAX_HEADER", 400)
    with pytest.raises(FileFormatError, match=r"the index would take 4.. bytes, and readers allow"):
        save_pytree(tree_of(1), tmp_path / "m", max_shard_size=100)
    assert not (tmp_path / "m").exists()


def test_a_size_may_be_an_integer_of_numpy_and_no_bool(tmp_path: Path) -> None:
    tree = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    save_pytree(tree, tmp_path, max_shard_size=np.int64(12))
    assert len([*tmp_path.glob("model-*")]) == 2
    flags: list[Any] = [True, np.True_]
    for flag in flags:
        for save in (save_pytree, save_pytree_async):
            with pytest.raises(TypeError, match=r"not (numpy\.)?bool"):
                save(tree, tmp_path, max_shard_size=flag)
    with pytest.raises(ValueError, match="max_shard_size is 0; a shard holds at least one byte"):
        save_pytree(tree, tmp_path, max_shard_size=np.int64(0))

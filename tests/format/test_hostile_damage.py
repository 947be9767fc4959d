"""Damage that digests detect, and cases from the tests of another reader."""

import io
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from hostile import attempt, bounded_memory, byte, file, no_hang, refused, split, tensor
from oracle import assert_loaded
from pytree2safetensors import (
    FileFormatError,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
    save_pytree,
)

SMALL = {"test": tensor("I32", [2, 2], 0, 16)}


def peer(header: str, data: bytes, length: int | None = None) -> bytes:
    return file(header.encode(), data, length)


PEER_SOUND: list[tuple[bytes, dict[str, tuple[int, ...]]]] = [
    (peer("{}      ", b""), {}),
    (peer('{"__metadata__":{"framework":"pt"}}     ', b""), {}),
    (peer("{}\r \t\n", b""), {}),
    (file({"attn.0": tensor("F32", [1, 2, 3], 0, 24)}, bytes(24)), {"attn.0": (1, 2, 3)}),
    (file({"attn0": tensor("F32", [1, 1, 2, 3], 0, 24)}, bytes(24)), {"attn0": (1, 1, 2, 3)}),
    (file({"test": tensor("I32", [], 0, 4)}, bytes(4)), {"test": ()}),
    (file(SMALL, bytes(16)), {"test": (2, 2)}),
    (file({"test": tensor("I32", [2, 0], 0, 0)}), {"test": (2, 0)}),
    # Tensors may be in any order, and empty tensors anywhere.
    (
        file({"b": byte(1), "z": tensor("F32", [0], 1, 1), "a": byte(0)}, bytes(2)),
        {"a": (1,), "b": (1,), "z": (0,)},
    ),
]

OVERLAPPING = {f"weight_{i}": tensor("F32", [2, 2], 0, 16) for i in range(10)}

PEER_BROKEN: list[tuple[bytes, str]] = [
    (file(SMALL, bytes(16), 1000), "is truncated: its header should take 1,000 bytes"),
    (b"", "has 0 bytes and is not a safetensors file"),
    (b"<\0\0\0\0\0\0\0", "is truncated: its header should take 60 bytes, and the file has 8"),
    (b"<\0\0\0\0\xff\xff\xff" + file(SMALL, bytes(16))[8:], "and the format allows 100,000,000"),
    (b"\1\0\0\0\0\0\0\0\xff", "its header does not begin with {"),
    (peer("{", b""), "is not valid JSON"),
    (peer("\t\n{}\r ", b""), "its header does not begin with {"),
    (file(SMALL, bytes(16)) + b"bytes of another file", "has bytes after its data"),
    (file(SMALL, bytes(14)), "is truncated: its header describes 16 bytes of data, and 14 follow"),
    (
        file({"test": tensor("I32", [2, 2], 0, 4)}),
        "4 bytes, but its dtype I32 and shape [2, 2]",
    ),
    (file({"test": tensor("I32", [2, 2**64 - 2], 0, 16)}, bytes(16)), "take another size"),
    (file({"test": tensor("I32", [2, 2**63 - 1], 0, 16)}, bytes(16)), "take another size"),
    (file(OVERLAPPING, bytes(16)), "has an overlap at the data of 'weight_"),
    (file({"test": tensor("F4", [1, 3], 0, 2)}, bytes(2)), "its dtype F4 and shape [1, 3]"),
]


@pytest.mark.parametrize(("content", "shapes"), PEER_SOUND, ids=range(len(PEER_SOUND)))
def test_what_the_peer_takes_is_taken(content: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    found = load_pytree(io.BytesIO(content))
    assert {name: leaf.shape for name, leaf in pytree2dict(found).items()} == shapes


@pytest.mark.parametrize(("content", "text"), PEER_BROKEN, ids=range(len(PEER_BROKEN)))
def test_what_the_peer_refuses_is_refused(content: bytes, text: str) -> None:
    refused(content, FileFormatError, text)


@pytest.mark.parametrize("side", [2, 200])
def test_many_tensors_on_the_same_bytes_are_refused_at_once(side: int) -> None:
    size = side * side * 4
    header = {f"weight_{i}": tensor("F32", [side, side], 0, size) for i in range(10_000)}
    content = file(header, bytes(size))
    with no_hang(), bounded_memory(len(content)):
        found = attempt(load_pytree, content)
    assert "has an overlap at the data of 'weight_" in str(found)


def test_with_checksums_every_flipped_bit_is_reported_or_changes_nothing() -> None:
    tree = {
        "w": jnp.arange(3, dtype=jnp.float32),
        "t": (1, "é", None),
    }
    metadata = {"run": "1"}
    saved = io.BytesIO()
    save_pytree(tree, saved, checksum=True, metadata=metadata)
    content = saved.getvalue()
    data = len(content) - len(split(content)[1])
    assert_loaded(load_pytree(io.BytesIO(content)), tree)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        found = attempt(load_pytree, bytes(flipped))
        if not isinstance(found, FileFormatError):
            assert_loaded(found, tree)
        told = attempt(load_metadata, bytes(flipped))
        if bit // 8 < data:
            assert isinstance(told, FileFormatError) or told == metadata
        else:
            assert isinstance(found, FileFormatError)
            assert "in the BytesIO does not match its digest: its data is damaged" in str(found)
            assert told == metadata


def test_with_checksums_a_file_that_is_put_together_from_two_is_reported() -> None:
    contents = []
    for value in (1.0, 2.0):
        saved = io.BytesIO()
        save_pytree({"a": jnp.full(8, value), "b": jnp.full(8, value)}, saved, checksum=True)
        contents.append(saved.getvalue())
    assert len(contents[0]) == len(contents[1])
    spliced = contents[0][:-32] + contents[1][-32:]
    found = attempt(load_pytree, spliced)
    assert "'@b' in the BytesIO does not match its digest" in str(found)


def test_with_checksums_tensors_cannot_change_places() -> None:
    saved = io.BytesIO()
    save_pytree({"a": jnp.ones(8), "b": jnp.zeros(8)}, saved, checksum=True)
    header, data = split(saved.getvalue())
    entries = json.loads(header)
    entries["@a"], entries["@b"] = entries["@b"], entries["@a"]
    found = attempt(load_pytree, file(entries, data))
    assert "does not match its digest" in str(found)


def test_with_checksums_a_subtree_and_a_template_are_checked() -> None:
    saved = io.BytesIO()
    save_pytree({"a": jnp.ones(8), "b": jnp.zeros(8)}, saved, checksum=True)
    flipped = bytearray(saved.getvalue())
    flipped[-1] ^= 1
    source = bytes(flipped)
    assert load_pytree(io.BytesIO(source), prefix="@a").tolist() == [1.0] * 8
    template = {"a": jnp.ones(8), "b": jnp.ones(8)}
    loads: list[Callable[[], Any]] = [
        lambda: load_pytree(io.BytesIO(source), prefix="@b"),
        lambda: load_into_pytree(template, io.BytesIO(source)),
    ]
    for load in loads:
        with pytest.raises(FileFormatError, match="'@b' in the BytesIO does not match its digest"):
            load()

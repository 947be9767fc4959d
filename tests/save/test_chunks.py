"""The chunks of a file: together they are its data, in order."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load

from pytree2safetensors import Rule, save_pytree
from pytree2safetensors._leaves import encode
from pytree2safetensors._save import chunks
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.plan import plan_file

SMALL, JOINED, PIECE = 64, 200, 50


@example([(31, "jax"), (30, "<u2"), (31, ">u2"), (20, "jax"), (40, "<u2")])
@example([(31, "jax")] * 9)
@given(
    st.lists(st.tuples(st.integers(0, 120), st.sampled_from(["<u2", ">u2", "jax"])), max_size=12)
)
def test_chunks_follow_each_other(sizes: list[tuple[int, str]]) -> None:
    def leaf(number: int, size: int, kind: str) -> Any:
        values = np.arange(number, number + size, dtype=np.uint16)
        return jnp.asarray(values) if kind == "jax" else values.astype(kind)

    tree = [leaf(number, *case) for number, case in enumerate(sizes)]
    expected = io.BytesIO()
    save_pytree(tree, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_SMALL", SMALL)
        patch.setattr(chunks, "_JOINED", JOINED)
        patch.setattr(encode, "_PIECE", PIECE)
        contents = collect(tree, {}, "raise", None)
        plan = plan_file(contents, checksum=False)
        [file] = plan.files
        found = list(chunks.data_chunks(file, plan.infos, contents.leaves))
    position = len(file.head)
    for offset, piece in found:
        assert offset == position
        position += len(piece)
    assert position == file.size
    assert file.head + b"".join(piece for _, piece in found) == expected.getvalue()
    # Small tensors are joined until they have as many bytes as are written together.
    small = [2 * size for size, _ in sizes if 2 * size < SMALL]
    joined = [len(piece) for _, piece in found if len(piece) >= SMALL]
    if sum(small) == sum(2 * size for size, _ in sizes) >= JOINED:
        assert len(found) <= sum(small) // JOINED + 1
        assert all(JOINED <= length < JOINED + SMALL for length in joined[:-1])
        assert all(length < JOINED + SMALL for length in joined)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pmap is on its way out
@pytest.mark.parametrize("axis", [0, 1])
def test_large_arrays_that_pmap_returns(axis: int) -> None:
    values = np.arange(1 << 16, dtype=np.float32).reshape(8, 8, 1024)
    array = jax.pmap(lambda part: part, in_axes=axis, out_axes=axis)(values)
    for rename, expected in (
        (None, values),
        ([Rule("#0", "#0", "a b c -> b a c")], values.swapaxes(0, 1)),
    ):
        file = io.BytesIO()
        save_pytree([array], file, rename=rename)
        assert load(file.getvalue())["#0"].tobytes() == expected.tobytes()

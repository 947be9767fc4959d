"""Values as bytes: tensors that are converted piece by piece."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves import encode


@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.integers(2, 40), st.data())
def test_pieces_are_the_bytes_in_order(
    shape: tuple[int, ...], limit: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    values = np.arange(np.prod(shape, dtype=int), dtype=">u2").reshape(shape).transpose(order)
    info = TensorInfo("U16", values.shape, values.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_PIECE", limit)
        pieces = list(encode.pieces(values, info))
    assert b"".join(piece.tobytes() for piece in pieces) == values.astype("<u2").tobytes()
    assert all(len(piece) <= limit for piece in pieces)


def test_a_contiguous_tensor_is_one_piece_without_a_copy() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    [piece] = encode.pieces(values, TensorInfo("F32", (2, 3), 24))
    assert np.shares_memory(piece, values)


def test_pieces_are_as_large_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_PIECE", 100)
    values = np.zeros((1000, 2), ">u2")
    pieces = list(encode.pieces(values, TensorInfo("U16", (1000, 2), 4000)))
    assert [len(piece) for piece in pieces] == [100] * 40

"""Tensors assembled from leaves: which of them a process writes."""

import numpy as np

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.assembled import Assembled, Member, with_leaves
from pytree2safetensors._leaves.views import plain_view


def test_a_tensor_without_any_leaf_here_is_left_out() -> None:
    first, second = np.zeros(3, np.float32), np.ones(3, np.float32)
    info = TensorInfo("F32", (3,), 12)
    tensors = {
        name: Assembled(name, info, [Member(plain_view(name, (3,)), 0, leaf)])
        for name, leaf in (("a", first), ("b", second))
    }
    copy = first.copy()
    [(name, found)] = with_leaves(tensors, {id(first): copy}).items()
    assert name == "a"
    assert found.members[0].leaf is copy

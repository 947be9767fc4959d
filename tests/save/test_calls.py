"""Finding the arrays of trees that JAX cannot flatten."""

from typing import Any

import jax
import jax.numpy as jnp

from pytree2safetensors._save.calls import _arrays_in


class Wrapped:
    """A node that makes a list for its children whenever it is opened."""

    def __init__(self, array: Any) -> None:
        self.array = array


jax.tree_util.register_pytree_node(
    Wrapped, lambda node: (([node.array],), None), lambda _, children: Wrapped(children[0][0])
)


def test_every_array_is_found_although_nodes_come_and_go() -> None:
    arrays = [jnp.full((), i) for i in range(200)]
    found = list(_arrays_in([Wrapped(array) for array in arrays]))
    assert {id(array) for array in found} == {id(array) for array in arrays}


def test_cycles_end() -> None:
    cyclic: list[Any] = [jnp.ones(2)]
    cyclic.append(cyclic)
    assert len(list(_arrays_in(cyclic))) == 1

"""Hypothesis strategies for keys, leaves and trees, and a check that a tree can be saved and loaded."""

try:
    import hypothesis  # noqa: F401 - the message below is better than that of a strategy's module
except ModuleNotFoundError:
    raise ModuleNotFoundError(  # so that pytest.importorskip skips
        "pytree2safetensors.testing needs Hypothesis; install hypothesis", name="hypothesis"
    ) from None

from pytree2safetensors.testing._arrays import arrays
from pytree2safetensors.testing._keys import keypaths, keys
from pytree2safetensors.testing._leaves import leaves
from pytree2safetensors.testing._nodes import NODES, SELF_DESCRIBING
from pytree2safetensors.testing._round_trips import assert_round_trips
from pytree2safetensors.testing._trees import pytrees

__all__ = [
    "NODES",
    "SELF_DESCRIBING",
    "arrays",
    "assert_round_trips",
    "keypaths",
    "keys",
    "leaves",
    "pytrees",
]

for _public in (arrays, assert_round_trips, keypaths, keys, leaves, pytrees):
    _public.__module__ = __name__

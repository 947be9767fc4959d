"""The kit's key paths, and the values of its small dtypes."""

from typing import Any

import ml_dtypes
import numpy as np

import golden_trees
from conformance.describe import describe_path
from conformance.writing import Seen, draw
from pytree2safetensors import KeyPath, keypath2string, string2keypath
from pytree2safetensors._tree.keys import item_key
from pytree2safetensors.testing import keypaths
from tree import test_keypath

PATHS = 120  # how many are drawn


def key_paths() -> dict[str, Any]:
    seen = Seen()
    paths = [string2keypath(case["string"]) for case in test_keypath.CASES["accepted"]]

    def is_short(path: KeyPath) -> bool:
        return len(keypath2string(path)) < 300 and seen.is_new(describe_path(path))

    paths = [path for path in paths if seen.is_new(describe_path(path))]
    paths += draw(keypaths(), PATHS, 3, is_short)
    paths.append((item_key(test_keypath.nested(64)),))
    strings = dict.fromkeys(
        [*(row[0] for row in test_keypath.REJECTED), *test_keypath.CASES["rejected"]]
    )
    return {
        "accepted": [
            {"string": keypath2string(path), "path": describe_path(path)} for path in paths
        ],
        "refused": [string for string in strings if len(string) < 300],
    }


def small_values() -> dict[str, list[float | str]]:
    """List the value of each byte, for each dtype of at most a byte."""
    found: dict[str, list[float | str]] = {}
    for name in (*golden_trees.NATIVE, *golden_trees.NOTED, *golden_trees.NEWER):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        if dtype.itemsize == 1 and name.startswith("float"):
            width = next(
                (w for part, w in (("float4", 4), ("float6", 6)) if name.startswith(part)), 8
            )
            values = np.arange(1 << width, dtype=np.uint8).view(dtype).astype(np.float64)
            found[name] = [value.hex() for value in values.tolist()]
    codes = np.arange(0, 65536, 257, dtype=np.uint16)
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        found[dtype.name] = [value.hex() for value in codes.view(dtype).astype(np.float64).tolist()]
    return found

"""Trees with a number, saved one after the other to one path."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle import assert_loaded
from pytree2safetensors import load_pytree

TEMPORARY = ".pytree2safetensors-*"

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
replaces_open_files = pytest.mark.skipif(
    os.name == "nt", reason="Windows neither replaces nor removes a file that is open or mapped"
)


def unmapped(path: Path) -> Path:
    """The path, but on Windows one in a new folder: the file may still be mapped, and not be replaced."""
    return Path(tempfile.mkdtemp(dir=path.parents[1]), path.name) if os.name == "nt" else path


def version(number: int, size: int = 300) -> Any:
    """A tree of its own, with arrays, scalars, and nodes that need a note."""
    return {
        "data": np.full(size, number, np.int32),
        "pair": (np.arange(number % 7, dtype=np.float32), None),
        "step": number,
    }


def assert_holds(path: Path, *numbers: int) -> int:
    """Assert that a file holds one of these versions, whole."""
    found = load_pytree(path)
    assert found["step"] in numbers
    assert_loaded(found, version(found["step"], len(found["data"])))
    return int(found["step"])


def litter(folder: Path) -> list[Path]:
    return list(folder.glob(TEMPORARY))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0

"""Files of the current format always load, and saving writes the same bytes."""

import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden_trees import FOLDER, GOLDEN, HEADS, can_make, save
from oracle import assert_loaded
from pytree2safetensors import (
    FileFormatError,
    PyTreeContainer,
    load_abstract,
    load_file,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
)

pytestmark = pytest.mark.filterwarnings("ignore:JAX does not support the dtypes")  # of 64 bits

NAMES = list(GOLDEN)
WRITTEN_BY_OTHERS = {
    "original-0.1.4-dict", "original-0.1.4-train-state", "original-0.1.4-equinox-mlp",
    "safetensors-0.8.0-foreign",
}  # fmt: skip


def golden(name: str) -> Any:
    """The path of a golden file, or a file object if only its head is kept."""
    path = FOLDER / name if (FOLDER / name).is_dir() else FOLDER / f"{name}.safetensors"
    if name not in HEADS:
        return path
    data = b"".join(
        leaf.tobytes()
        for _, leaf in sorted(pytree2dict(GOLDEN[name].tree()).items(), key=lambda e: -e[1].nbytes)
    )
    return io.BytesIO(path.read_bytes() + data)


def needed(name: str) -> Any:
    if not can_make(GOLDEN[name]):
        pytest.skip(f"this version of ml_dtypes has no {GOLDEN[name].needs}")
    return GOLDEN[name].tree()


def test_every_golden_file_has_its_test() -> None:
    found = {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file()}
    roots = {path.parts[0].removesuffix(".safetensors") for path in found}
    assert roots == {"README.md", *GOLDEN, *WRITTEN_BY_OTHERS}


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_saved_byte_for_byte_as_it_was(name: str, tmp_path: Path) -> None:
    needed(name)
    written = save(name, tmp_path)
    assert written == {file: (FOLDER / file).read_bytes() for file in written}
    if (FOLDER / name).is_dir():
        assert {file.name for file in (FOLDER / name).iterdir()} == {Path(f).name for f in written}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_today_loads(name: str) -> None:
    tree = needed(name)
    assert_loaded(load_pytree(golden(name)), tree)
    structures: list[Any] = [
        jax.tree_util.tree_structure(found) for found in (tree, load_abstract(golden(name)))
    ]
    assert structures[0] == structures[1]
    own = dict(GOLDEN[name].options.get("metadata", {}))
    assert load_metadata(golden(name)) == {k: v for k, v in own.items() if v != "flax"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_today_loads_into_its_template(name: str) -> None:
    tree = needed(name)
    found = load_into_pytree(tree, golden(name))
    assert_loaded(found, tree)
    kinds = [[type(leaf) for leaf in jax.tree_util.tree_leaves(t)] for t in (found, tree)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", [name for name in NAMES if GOLDEN[name].needs])
def test_a_dtype_that_is_not_known_here_is_refused_by_name(name: str) -> None:
    if can_make(GOLDEN[name]):
        pytest.skip("it is known here")
    text = f"of the dtype {name[6:]}, which this ml_dtypes lacks; install a newer one"
    with pytest.raises(FileFormatError, match=text):
        load_pytree(golden(name))


def eighths(*shape: int, dtype: Any = np.float32) -> Any:
    return (np.arange(int(np.prod(shape))).reshape(shape) / 8).astype(dtype)


def model() -> dict[str, Any]:
    return {
        "encoder": [
            {"kernel": eighths(3, 4), "bias": eighths(4)},
            {"kernel": eighths(4, 2), "bias": eighths(2)},
        ],
        "scale": np.float32(0.5),
        "ids": np.arange(5, dtype=np.int32),
    }


def zeros() -> dict[str, Any]:
    return {
        "encoder": [
            {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)},
            {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)},
        ],
        "scale": np.float32(0),
        "ids": np.zeros(5, np.int32),
    }


def test_a_dict_of_the_original_loads() -> None:
    assert_loaded(load_pytree(golden("original-0.1.4-dict")), model())


def test_a_train_state_of_the_original_loads() -> None:
    adam = PyTreeContainer({"count": np.int32(0), "mu": zeros(), "nu": zeros()})
    found = load_pytree(golden("original-0.1.4-train-state"))
    assert_loaded(found, {"params": model(), "opt": [adam]})


def test_a_module_of_the_original_loads() -> None:
    found = load_pytree(golden("original-0.1.4-equinox-mlp"))
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in pytree2dict(found).items()}
    assert shapes == {
        "layers#0.bias": ((4,), np.float32),
        "layers#0.weight": ((4, 2), np.float32),
        "layers#1.bias": ((3,), np.float32),
        "layers#1.weight": ((3, 4), np.float32),
    }
    stored = load_file(golden("original-0.1.4-equinox-mlp"))
    assert_loaded(pytree2dict(found), stored)


def test_a_file_that_safetensors_wrote_loads() -> None:
    path = golden("safetensors-0.8.0-foreign")
    expected = {
        "model.layers.0.weight": jnp.asarray(eighths(2, 3), jnp.bfloat16),
        "model.layers.1.weight": eighths(2, 3),
        "lm_head.weight": eighths(3, 2, dtype=np.float16),
    }
    assert_loaded(pytree2dict(load_pytree(path)), expected)
    assert load_metadata(path) == {"format": "pt"}
    template = {name.removesuffix(".weight"): leaf for name, leaf in expected.items()}
    found = load_into_pytree(
        template, path, rename=lambda name: re.sub(r"@|\\", "", name) + ".weight"
    )
    assert_loaded(found, template)


def test_a_note_of_a_later_version_is_refused_clearly() -> None:
    raw = golden("nodes").read_bytes()
    later = raw.replace(rb"\"version\":1", rb"\"version\":2")
    assert later != raw
    with pytest.raises(FileFormatError, match="install a newer pytree2safetensors"):
        load_pytree(io.BytesIO(later))


def test_json_of_golden_headers_is_the_json_of_the_specification() -> None:
    for path in sorted(FOLDER.glob("*.safetensors")):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        if path.stem in WRITTEN_BY_OTHERS:
            continue
        compact = json.dumps(header, separators=(",", ":"))
        assert raw[8 : 8 + size].decode("ascii") == compact.ljust(size)
        assert (8 + size) % (4096 if path.stem == "large" else 256) == 0

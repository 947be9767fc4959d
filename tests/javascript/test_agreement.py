"""The library and the reader in JavaScript accept and refuse the same mutated files, and read the same trees."""

import json
import random
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from conformance.describe import describe_tree
from hostile import DOCUMENTED, MUTATORS, Mutation, file, nodes, tensor
from javascript.run import find_node
from pytree2safetensors import KeyPathError, load_metadata, load_pytree, save_pytree, string2keypath
from pytree2safetensors._leaves.jax_versions import enable_x64
from robustness.test_fuzz import MUTATIONS, SEED, mutated_folder_file

pytestmark = pytest.mark.fuzz

NODE, REASON = find_node()
needs_node = pytest.mark.skipif(NODE is None, reason=REASON)
# Older ones refuse dtypes and numbers of axes that the reader in JavaScript takes.
needs_new = pytest.mark.skipif(
    not hasattr(ml_dtypes, "float8_e8m0fnu") or int(np.__version__.split(".")[0]) < 2,
    reason="this ml_dtypes lacks dtypes, or this NumPy takes 32 axes",
)


def accepted(load: Callable[[Path], Any], path: Path) -> Any:
    """Return what a file loads as, or None if it is refused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAX does not support the dtypes")
        try:
            return load(path)
        except DOCUMENTED:
            return None


def disagreements(folder: Path) -> str:
    """Read all files and folders in a folder in both languages."""
    with enable_x64(True):  # without it, JAX has no weak types of 64 bits
        cases = {
            path.name: {
                "metadata": accepted(load_metadata, path),
                "tree": accepted(lambda path: describe_tree(load_pytree(path)), path),
            }
            for path in folder.iterdir()
        }
    loaded = sum(case["tree"] is not None for case in cases.values())
    assert 0 < loaded < len(cases)  # it tests little otherwise
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [str(NODE), str(Path(__file__).parent / "agree.js"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@needs_node
@needs_new
@pytest.mark.parametrize("kind", MUTATORS)
def test_both_agree_on_mutated_files(kind: str, tmp_path: Path) -> None:
    for number in range(MUTATIONS // len(MUTATORS) // 4):
        content = Mutation(kind, SEED, number).make()
        (tmp_path / f"{number}").write_bytes(content)
    assert disagreements(tmp_path) == ""


# Segments, and texts that make a name invalid as a key path.
PIECES = [
    "@a", "@b", ".a", "a", "#0", "#1", "#01", "\\", "\\.", "@\\(1)", "@\\(x)", "#\\(0)", "#\\(00)", ".", "@",
    "__metadata__", "\\x", "@a\\",
]  # fmt: skip
KINDS = ["tuple", "list", "None", "dict", *(["OrderedDict", k] for k in ([], ["@a"], ["@a", "@b"]))]


def beside_odd_names(chance: random.Random) -> bytes:
    """A file whose note has one or two nodes. Many of its names are not key paths."""
    kinds: dict[str, Any] = {}
    while not kinds:
        for path in chance.choices(["", "@a", "a", "@a\\.b", *PIECES], k=2):
            try:
                string2keypath(path)
            except KeyPathError:
                continue
            kinds[path] = chance.choice(KINDS)
    found = {"".join(chance.choices(PIECES, k=chance.randrange(1, 4))) for _ in range(2)}
    found |= {path + chance.choice(PIECES) for path in kinds if chance.random() < 0.7}
    return nodes(kinds, *sorted(found - {"__metadata__"}))


@needs_node
@needs_new
def test_both_agree_on_notes_beside_names_that_are_not_key_paths(tmp_path: Path) -> None:
    for number in range(MUTATIONS // 4):
        content = beside_odd_names(random.Random(f"beside {SEED} {number}"))
        (tmp_path / f"{number}").write_bytes(content)
    assert disagreements(tmp_path) == ""


@needs_node
@needs_new
def test_both_agree_on_what_mutations_found(tmp_path: Path) -> None:
    weak = {"__metadata__": {"pytree2safetensors": '{"leaves":{"@a":"weak"},"version":1}'}}
    files = {
        "too deep for a tree, not for metadata": nodes({"@a" * 3000: "tuple"}),
        "weak, and of 64 bits": file({**weak, "@a": tensor("F64", [], 0, 8)}, bytes(8)),
        "empty, with a size beyond the exact doubles": file(
            {"@a": tensor("U8", [0, 2**53 + 1], 0, 0)}
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert disagreements(tmp_path) == ""


@needs_node
@needs_new
@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "digests"])
def test_both_agree_on_mutated_folders(checksum: bool, tmp_path: Path) -> None:
    tree = {"a": [jnp.ones((4, 4)), 1, (2.5, None)], "b": {"x": jnp.zeros(7), "y": "text"}}
    save_pytree(tree, tmp_path / "0", max_shard_size=40, metadata={"run": "1"}, checksum=checksum)
    sound = {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()}
    index = "model.safetensors.index.json"
    for number in range(1, MUTATIONS // 20):
        chance = random.Random(f"agreement {SEED} {number}")
        mutated = chance.choice([index, index, *sorted(sound)])
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for name, content in sound.items():
            (folder / name).write_bytes(content)
        changed = mutated_folder_file(chance, folder / mutated, sound[mutated])
        (folder / mutated).write_bytes(changed)
    assert disagreements(tmp_path) == ""

"""The library and the reader in JavaScript accept and refuse the same mutated files, and read the same trees."""

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from pytree2safetensors._tree.depth import TOO_DEEP
from robustness.test_fuzz import MUTATIONS, SEED, mutated_folder_file

pytestmark = pytest.mark.fuzz

# Levels of a tree that the reader in JavaScript takes. Since Python 3.12, JAX takes more.
DEEPEST = 1001
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


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Let the descriptions of trees be as deep as what the library loads."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def described(path: Path) -> Any:
    tree = load_pytree(path)
    with deep_recursion():
        found = describe_tree(tree)
    return found if levels(found) <= DEEPEST else None


def levels(tree: dict[str, Any]) -> int:
    """Count the levels of a tree that is described."""
    count, level = 0, [tree]
    while level:
        items = [item for node in level for item in node.get("items", ())]
        level = [item[-1] if isinstance(item, list) else item for item in items]
        count += 1
    return count


def disagreements(folder: Path) -> str:
    """Read all files and folders in a folder in both languages."""
    with enable_x64(True):  # without it, JAX has no weak types of 64 bits
        cases = {
            path.name: {
                "metadata": accepted(load_metadata, path),
                "tree": accepted(described, path),
            }
            for path in folder.iterdir()
        }
    loaded = sum(case["tree"] is not None for case in cases.values())
    assert 0 < loaded < len(cases)  # it tests little otherwise
    with deep_recursion():
        # With an indent, Python encodes. Its encoder in C has another limit.
        (folder / "cases.json").write_text(json.dumps(cases, indent=0))
    command = [str(NODE), "--stack-size=3900", str(Path(__file__).parent / "agree.js"), str(folder)]
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
    """A file whose note has one or two nodes. Many of its names are not key paths, or too deep for a tree."""
    top = "@a" * chance.choice([0, 0, 0, 0, 0, TOO_DEEP])
    kinds: dict[str, Any] = {}
    while not kinds:
        for path in chance.choices(["", "@a", "a", "@a\\.b", *PIECES], k=2):
            try:
                string2keypath(top + path)
            except KeyPathError:
                continue
            kinds[top + path] = chance.choice(KINDS)
    found = {
        top + "".join(chance.choices(PIECES, k=chance.randrange(1, 4)))
        for _ in range(chance.randrange(3))
    }
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
    deep = "@a" * TOO_DEEP
    weak = {"__metadata__": {"pytree2safetensors": '{"leaves":{"@a":"weak"},"version":1}'}}
    files = {
        "deep": nodes({}, "@a" * 900),
        "too deep for a tree, not for metadata": nodes({deep: "tuple"}),
        "too deep, below a leaf": nodes({deep: "tuple"}, "@a"),
        "too deep, below a leaf that is too deep": nodes({deep: "tuple"}, "@a" * (TOO_DEEP - 1)),
        "too deep, beside a leaf that is too deep": nodes({deep: "tuple"}, f"{deep}b"),
        "too deep, with an element": nodes({deep: "tuple"}, f"{deep}#0"),
        "too deep, with an item": nodes({deep: "tuple"}, f"{deep}@a"),
        "too deep, with its key": nodes({deep: ["OrderedDict", ["@a"]]}, f"{deep}@a#0"),
        "too deep, with another key": nodes({deep: ["OrderedDict", ["@a"]]}, f"{deep}@b"),
        "too deep, with a key and no leaf": nodes({deep: ["OrderedDict", ["@a"]]}),
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

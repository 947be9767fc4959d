"""Write the conformance kit, from fixed trees, strategies with a fixed seed, and tables of what is refused.

    python tests/conformance/generate.py

What it writes is committed. Another version of Hypothesis draws other trees.
"""

import io
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import folders
import golden_trees
import hostile
from conformance.describe import describe_path, describe_tree
from format import test_hostile_damage, test_hostile_header, test_hostile_names, test_hostile_note
from load import test_hostile_index
from pytree2safetensors import (
    FileFormatError,
    KeyPath,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    keypath2string,
    load_metadata,
    load_pytree,
    save_pytree,
    string2keypath,
)
from pytree2safetensors.testing import SELF_DESCRIBING, keypaths, pytrees
from tree import test_keypath

KIT = Path(__file__).parent / "kit"
TREES, FOLDERS, PATHS = 90, 16, 120  # how many of each are drawn
LARGEST = 12_000  # bytes of one case


def draw(strategy: Any, count: int, number: int, fits: Callable[[Any], bool]) -> list[Any]:
    """Draw different examples that fit, always the same ones."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=40 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        if len(found) < count and fits(example):
            found.append(example)

    # Otherwise it also draws constants that stand in the source code of today.
    with patch("hypothesis.internal.conjecture.providers.is_local_module_file", return_value=False):
        collect()
    assert len(found) == count, f"only {len(found)} of {count} fit"
    return found


class Seen:
    """Tells whether something is new."""

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def is_new(self, thing: Any) -> bool:
        text = json.dumps(thing, sort_keys=True)
        new = text not in self.texts
        self.texts.add(text)
        return new


problems: list[str] = []  # where the package and a case disagree


# --- what loads -------------------------------------------------------------------------------

accepted: list[dict[str, Any]] = []


def accept(name: str, tree: Any, metadata: dict[str, str], origin: str) -> None:
    """Add a case, after a check that the package agrees."""
    path = KIT / "accepted" / name
    expected = describe_tree(tree)
    try:
        found = describe_tree(load_pytree(path)), load_metadata(path)
    except Pytree2SafetensorsError as error:
        problems.append(f"{name} is refused: {error}")
    else:
        if found != (expected, metadata):
            problems.append(f"{name}: {found} is not {expected}")
    accepted.append(
        {"file": f"accepted/{name}", "from": origin, "metadata": metadata, "tree": expected}
    )


def add_saved(name: str, tree: Any, origin: str, **options: Any) -> None:
    path = KIT / "accepted" / name
    save_pytree(tree, path, **options)
    metadata = {
        k: v for k, v in options.get("metadata", {}).items() if (k, v) != ("format", "flax")
    }
    accept(name, tree, metadata, origin)


def add_golden() -> None:
    for name, golden in golden_trees.GOLDEN.items():
        if name not in golden_trees.HEADS:
            ending = "" if "max_shard_size" in golden.options else ".safetensors"
            add_saved(f"golden-{name}{ending}", golden.tree(), "golden", **golden.options)


def add_drawn() -> None:
    seen = Seen()

    def fits(tree: Any) -> bool:
        file = io.BytesIO()
        save_pytree(tree, file)
        return len(file.getvalue()) <= LARGEST and seen.is_new(describe_tree(tree))

    trees = draw(pytrees(nodes=SELF_DESCRIBING), TREES, 1, fits)
    for number, tree in enumerate(trees, 1):
        options: dict[str, Any] = {"checksum": number % 3 == 0}
        if number % 5 == 0:
            options["metadata"] = {"number": str(number), "é\0": "\U0001f600", "format": "pt"}
        add_saved(f"tree-{number:03}.safetensors", tree, "strategy", **options)

    def is_large(tree: Any) -> bool:
        return fits(tree) and sum(array.nbytes > 8 for array in arrays_of(tree)) >= 3

    drawn = draw(
        st.lists(pytrees(nodes=SELF_DESCRIBING, min_size=1), min_size=3, max_size=3),
        FOLDERS,
        2,
        is_large,
    )
    for number, tree in enumerate(drawn, 1):
        file = io.BytesIO()
        save_pytree(tree, file)
        third = len(hostile.split(file.getvalue())[1]) // 3
        add_saved(
            f"folder-{number:02}",
            tree,
            "strategy",
            max_shard_size=third,
            checksum=number % 2 == 0,
        )


def arrays_of(tree: Any) -> Iterator[Any]:
    return (
        leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, np.ndarray | jax.Array)
    )


def add_by_others() -> None:
    """Add what other programs write, each with the tree that its bytes hold."""
    names = (
        "original-0.1.4-dict",
        "original-0.1.4-train-state",
        "original-0.1.4-equinox-mlp",
        "safetensors-0.8.0-foreign",
    )
    for name in names:
        content = (golden_trees.FOLDER / f"{name}.safetensors").read_bytes()
        add_bytes(f"{name}.safetensors", content, load_pytree(io.BytesIO(content)), "others")
    for number, (content, _) in enumerate(test_hostile_damage.PEER_SOUND, 1):
        add_bytes(
            f"header-{number:02}.safetensors", content, load_pytree(io.BytesIO(content)), "others"
        )
    one = np.uint8(7)
    headers: list[tuple[bytes, Any]] = [
        (
            hostile.file({"@a": {**hostile.byte(), "comment": extra}}, b"\7"),
            {"a": np.array([7], np.uint8)},
        )
        for extra in (None, 1.5, -0.0, 1e300, [1, {"deep": [2.5]}], {"dtype": 0.5}, "", True)
    ]
    headers += [
        (
            hostile.file(
                b'{"__metadata__":null,"@a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"\7"
            ),
            {"a": one},
        ),
        (
            hostile.file(
                b'{"__metadata__":{},"@a":{"data_offsets":[0,1],"shape":[],"dtype":"U8"}}', b"\7"
            ),
            {"a": one},
        ),
        (
            hostile.file(
                b'{ "\\u0040a" : {"dtype":"U8", "shape":[ ],\n"data_offsets":[0 , 1]}\t}\r ', b"\7"
            ),
            {"a": one},
        ),
        (
            hostile.file({"@a": hostile.tensor("BOOL", [3], 0, 3)}, b"\0\2\xff"),
            {"a": np.array([False, True, True])},
        ),
        (hostile.names("#1"), [None, np.zeros(1, np.uint8)]),
        (hostile.names("#0", "#3"), [np.zeros(1, np.uint8), None, None, np.zeros(1, np.uint8)]),
        (hostile.names("@b", "@a"), {"b": np.zeros(1, np.uint8), "a": np.zeros(1, np.uint8)}),
        (
            hostile.names(*(f"@{i}" for i in range(12))),
            {f"{i}": np.zeros(1, np.uint8) for i in range(12)},
        ),
        (
            hostile.names(r"@\(2)", r"@\(10)", r"@\(1\.5)"),
            {k: np.zeros(1, np.uint8) for k in (2, 10, 1.5)},
        ),
        (hostile.noted({"version": 1}), {}),
        (hostile.noted({"version": 1, "nodes": {"": "dict"}}), {}),
        (
            hostile.noted(' { "version" : 1 , "leaves" : { "" : [ "str" , "\\ud800" ] } } '),
            "\ud800",
        ),
        (hostile.nodes({"": "tuple", "#1": "None"}, "#0"), (np.zeros(1, np.uint8), None)),
    ]
    deep: Any = np.zeros(1, np.uint8)
    for _ in range(200):  # as deep as any reader must read
        deep = {"a": deep}
    headers.append((hostile.names("@a" * 200), deep))
    for number, (content, tree) in enumerate(headers, 50):
        add_bytes(f"header-{number}.safetensors", content, tree, "others")


def add_bytes(name: str, content: bytes, tree: Any, origin: str) -> None:
    path = KIT / "accepted" / name
    path.write_bytes(content)
    metadata = json.loads(hostile.split(content)[0]).get("__metadata__") or {}
    own = {key: value for key, value in metadata.items() if key != hostile.NOTE}
    accept(name, tree, own, origin)


INDEX = "model.safetensors.index.json"


def add_folders_by_others() -> None:
    tree = {
        "a": np.arange(40, dtype=np.uint8),
        "b": (np.array([1, 2], np.int16), 3),
        "c": np.float32(1),
    }

    def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            index = json.loads((folder / INDEX).read_text())
            (folder / INDEX).write_text(json.dumps(change(index)))

        return apply

    def add_bom(folder: Path) -> None:
        (folder / INDEX).write_bytes(b"\xef\xbb\xbf" + (folder / INDEX).read_bytes())

    def rename(folder: Path) -> None:
        (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")

    def add_files(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
        (folder / "other.safetensors").write_bytes(b"")

    def drop(index: dict[str, Any]) -> dict[str, Any]:
        return {**index, "weight_map": {k: v for k, v in index["weight_map"].items() if k != "@c"}}

    plain = {"a": tree["a"], "b": [*tree["b"][:1], np.int64(3)], "c": tree["c"]}
    changes: list[tuple[str, Callable[[Path], None], Any, dict[str, str]]] = [
        ("bom", add_bom, tree, {"run": "1"}),
        ("variant", rename, tree, {"run": "1"}),
        ("beside", add_files, tree, {"run": "1"}),
        ("metadata-null", rewrite(lambda index: {**index, "metadata": None}), plain, {}),
        ("metadata-none", rewrite(lambda index: {"weight_map": index["weight_map"]}), plain, {}),
        (
            "numbers",
            rewrite(
                lambda i: {
                    **i,
                    "more": 1.5,
                    "metadata": {**i["metadata"], "total_size": 1e3, "n": [0.5]},
                }
            ),
            tree,
            {"run": "1"},
        ),
        ("more-tensors", rewrite(drop), {k: tree[k] for k in "ab"}, {"run": "1"}),
    ]
    for name, change, expected, metadata in changes:
        folder = KIT / "accepted" / f"index-{name}"
        save_pytree(tree, folder, max_shard_size=30, metadata={"run": "1"})
        change(folder)
        accept(f"index-{name}", expected, metadata, "others")
    folder = KIT / "accepted" / "index-empty"
    folder.mkdir()
    (folder / INDEX).write_text('{"weight_map": {}}')
    accept("index-empty", {}, {}, "others")


# --- what is refused --------------------------------------------------------------------------

refused: list[dict[str, Any]] = []
seen_content: set[bytes] = set()
CLASSES = {"name": KeyPathError, "tree": TreeStructureError}  # of reasons; the others are of format


def error_of(load: Callable[[Path], Any], path: Path) -> type[Pytree2SafetensorsError] | None:
    try:
        load(path)
    except Pytree2SafetensorsError as error:
        return type(error)
    return None


def refuse(name: str, reason: str, why: str) -> None:
    """Add a case, after a check that the package agrees; it tells when the fault shows."""
    path = KIT / "refused" / name
    stage, found = "open", error_of(load_metadata, path)
    if found is None:
        stage, found = "load", error_of(load_pytree, path)
    if found is not CLASSES.get(reason, FileFormatError):
        problems.append(f"{name} is refused with {found}; expected: {reason}, {why}")
    refused.append({"file": f"refused/{name}", "stage": stage, "reason": reason, "why": why})


def refuse_bytes(group: str, reason: str, content: bytes, why: str) -> None:
    if len(content) > LARGEST or content in seen_content:
        return
    seen_content.add(content)
    number = sum(case["file"].startswith(f"refused/{group}-") for case in refused) + 1
    name = f"{group}-{number:03}.safetensors"
    (KIT / "refused" / name).write_bytes(content)
    refuse(name, reason, why.replace("the BytesIO", "the file"))


REASONS = (  # what a message of a header says, and the word for it
    ("metadata|lone surrogate|'a' tw|'__metadata__' tw", "metadata"),
    ("digest", "digest"),
    ("note", "note"),
    ("overlap|hole|bytes after|describes [0-9]+ bytes", "layout"),
    ("without a proper|dtype|shape|offsets|dimensions|another|size|'dtype' tw|memory", "tensor"),
    ("", "header"),
)


def reason_of(text: str) -> str:
    return next(reason for pattern, reason in REASONS if re.search(pattern, text))


def add_refused() -> None:
    for content, text in [*test_hostile_header.HEADERS, *test_hostile_damage.PEER_BROKEN]:
        refuse_bytes("header", reason_of(text), content, text)
    whole = test_hostile_header.WHOLE
    for size in (0, 1, 7, 8, 9, 40, len(whole) - 9, len(whole) - 1):
        refuse_bytes(
            "cut", "header" if size < len(whole) - 8 else "layout", whole[:size], "cut short"
        )
    for length in (1, 10, len(whole) - 20, 100_000_001, 2**63 - 1, 2**64 - 1):
        refuse_bytes("length", "header", length.to_bytes(8, "little") + whole[8:], "a wrong length")
    for content, text in [*test_hostile_note.NOTES, *test_hostile_note.CLAIMS]:
        refuse_bytes("note", "note", content, text)
    for path in (".a", "#01", "@b\\q", "@\ud800"):
        refuse_bytes("note", "note", hostile.leaves({path: ["str", "x"]}), "no key path")
    entry = {"#01": hostile.tensor("I64", [], 0, 8)}
    refuse_bytes("note", "name", hostile.leaves({"#01": "int"}, **entry), "a tensor of no key path")
    content = hostile.nodes({"#01": "list"}, "#01")
    refuse_bytes("note", "note", content, "a node of no key path, and a tensor")
    # Nodes that only a registered type has: such a file loads into a template.
    two: dict[str, Any] = {"@a": "list", "b": "list"}
    refuse_bytes("note", "tree", hostile.nodes(two), "two kinds of node at once")
    for kind, name in (("tuple", r"@\(1)#0"), ("None", r"@\(1)")):
        content = hostile.nodes({r"@\(True)": kind}, name)
        refuse_bytes("note", "tree", content, "dict keys that are equal in Python")
    for content, text in test_hostile_note.TREE_NOTES:
        refuse_bytes("value", "value", content, text)
    for found, error, text in test_hostile_names.NAMES:
        refuse_bytes(
            "name", "name" if error is KeyPathError else "tree", hostile.names(*found), text
        )
    packed = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    for dtype, bits in packed.items():
        content = hostile.file({"@a": hostile.tensor(dtype, [4], 0, bits // 2)}, bytes(bits // 2))
        refuse_bytes("value", "value", content, "a packed dtype")
    for word, (dtype, width) in {
        "int2": ("I8", 2),
        "uint4": ("U8", 4),
        "float6_e2m3fn": ("U8", 6),
    }.items():
        entry = {"@a": hostile.tensor(dtype, [2], 0, 2)}
        content = hostile.leaves({"@a": word}, **entry)[:-1] + bytes([1 << width])
        refuse_bytes("value", "value", content, f"a byte that is no {word}")


def add_damaged() -> None:
    """Add files with digests, of which a part was changed."""
    file = io.BytesIO()
    tree = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "t": ("é", None, 1),
        "z": np.zeros((0, 2)),
    }
    save_pytree(tree, file, checksum=True, metadata={"run": "1"})
    content = file.getvalue()
    (KIT / "accepted" / "digests.safetensors").write_bytes(content)
    accept("digests.safetensors", tree, {"run": "1"}, "digests")
    header, data = hostile.split(content)
    for old, new in (
        (b'"run":"1"', b'"run":"2"'),
        (b'"@w":{"dtype":"F32"', b'"@w":{"dtype":"I32"'),
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b"\\u00e9", b"\\u00e8"),
        (b'"@w"', b'"@v"'),
    ):
        assert old in header
        refuse_bytes(
            "digest",
            "digest",
            hostile.file(header.replace(old, new), data),
            f"{old.decode()} was changed",
        )
    for position in (0, 23, 24, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        refuse_bytes(
            "digest", "digest", hostile.file(header, bytes(changed)), f"byte {position} was changed"
        )
    for entry in (hostile.DIGESTS, hostile.DIGESTS + ".metadata"):
        parsed = json.loads(header)
        del parsed["__metadata__"][entry]
        refuse_bytes("digest", "digest", hostile.file(parsed, data), f"{entry} was removed")


def add_refused_folders() -> None:
    first, second, third = folders.shard_names(3)
    for number, (change, why) in enumerate(test_hostile_index.BAD_INDEXES.values(), 1):
        if "pipe" in why:
            continue
        folder = KIT / "refused" / f"index-{number:02}"
        save_pytree(folders.tree_of(1), folder, max_shard_size=100)
        (folder / "junk").write_bytes(b"\xff" * 100)
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(index)))
        refuse(f"index-{number:02}", "index", why)
    for number, (text, why) in enumerate(test_hostile_index.BAD_TEXTS.items(), 50):
        if len(text) < LARGEST:
            folder = KIT / "refused" / f"index-{number:02}"
            folder.mkdir()
            (folder / INDEX).write_bytes(text)
            refuse(f"index-{number:02}", "index", why)
    broken = {
        "shards-without-an-index": [first, second],
        "two-files": ["a.safetensors", "b.safetensors"],
        "index-and-file": [INDEX, "model.safetensors"],
        "other-index-and-file": ["a.safetensors.index.json", "model.safetensors"],
        "index-and-its-file": ["a.safetensors.index.json", "a.safetensors"],
        "two-indexes": ["a.safetensors.index.json", "b.safetensors.index.json"],
        "nothing": ["config.json"],
    }
    for name, files in broken.items():
        folder = KIT / "refused" / f"folder-{name}"
        folder.mkdir()
        for file in files:
            text = b'{"weight_map": {}}' if file.endswith("index.json") else hostile.file({})
            (folder / file).write_bytes(text)
        refuse(f"folder-{name}", "folder", name.replace("-", " "))
    for name, change in {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "missing": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "of-another-save": lambda path: path.write_bytes(hostile.names("@x")),
    }.items():
        folder = KIT / "refused" / f"shard-{name}"
        save_pytree(folders.tree_of(1), folder, max_shard_size=100)
        change(folder / second)
        refuse(f"shard-{name}", "shard", f"a shard is {name.replace('-', ' ')}")
    folder = KIT / "refused" / "shard-damaged"
    save_pytree(folders.tree_of(1), folder, max_shard_size=100, checksum=True)
    path = folder / third
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    refuse("shard-damaged", "digest", "the last byte of a shard was changed")


# --- key paths and values ---------------------------------------------------------------------


def key_paths() -> dict[str, Any]:
    seen = Seen()
    paths = [string2keypath(case["string"]) for case in test_keypath.CASES["accepted"]]

    def is_short(path: KeyPath) -> bool:
        return len(keypath2string(path)) < 300 and seen.is_new(describe_path(path))

    paths = [path for path in paths if seen.is_new(describe_path(path))]
    paths += draw(keypaths(), PATHS, 3, is_short)
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
    """Tell the value of every byte of the dtypes of at most a byte."""
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


def write(name: str, cases: Any) -> None:
    """Write JSON, one case a line."""
    if isinstance(cases, list):
        text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    else:
        members = (
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
            for name, rows in cases.items()
        )
        text = "{\n" + ",\n".join(members) + "\n}\n"
    (KIT / name).write_text(text, "ascii")


def main() -> None:
    warnings.filterwarnings("ignore", "JAX does not support the dtypes")
    shutil.rmtree(KIT, ignore_errors=True)
    for name in ("accepted", "refused"):
        (KIT / name).mkdir(parents=True)
    add_golden()
    add_drawn()
    add_by_others()
    add_folders_by_others()
    add_refused()
    add_damaged()
    add_refused_folders()
    write("accepted.json", accepted)
    write("refused.json", refused)
    write("keypaths.json", key_paths())
    write("values.json", small_values())
    size = sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file())
    print("\n".join(problems))
    print(f"{len(accepted)} accepted, {len(refused)} refused, {size:,} bytes")


if __name__ == "__main__":
    main()

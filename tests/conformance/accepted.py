"""The files and folders of the kit that load."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

import golden_trees
import hostile
from conformance.describe import describe_tree
from conformance.writing import INDEX, LARGEST, Kit, Seen, draw
from format import test_hostile_damage
from pytree2safetensors import load_pytree, save_pytree
from pytree2safetensors.testing import SELF_DESCRIBING, pytrees

TREES, FOLDERS = 90, 16  # how many of each are drawn


def add_golden(kit: Kit) -> None:
    for name, golden in golden_trees.GOLDEN.items():
        if name not in golden_trees.HEADS:
            ending = "" if "max_shard_size" in golden.options else ".safetensors"
            kit.accept_saved(f"golden-{name}{ending}", golden.tree(), "golden", **golden.options)


def add_drawn(kit: Kit) -> None:
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
        kit.accept_saved(f"tree-{number:03}.safetensors", tree, "strategy", **options)

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
        kit.accept_saved(
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


def add_by_others(kit: Kit) -> None:
    """Add what other programs write, each with the tree that its bytes hold."""
    names = (
        "original-0.1.4-dict",
        "original-0.1.4-train-state",
        "original-0.1.4-equinox-mlp",
        "safetensors-0.8.0-foreign",
    )
    for name in names:
        content = (golden_trees.FOLDER / f"{name}.safetensors").read_bytes()
        add_bytes(kit, f"{name}.safetensors", content, load_pytree(io.BytesIO(content)), "others")
    for number, (content, _) in enumerate(test_hostile_damage.PEER_SOUND, 1):
        add_bytes(
            kit,
            f"header-{number:02}.safetensors",
            content,
            load_pytree(io.BytesIO(content)),
            "others",
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
    array = np.zeros(1, np.uint8)
    headers += [
        # Members that a reader ignores: a long integer, and lists down to level 100.
        (with_member(b"9" * 5000), {"a": array}),
        (with_member(b"[" * 98 + b"]" * 98), {"a": array}),
        # As doubles, these keys would be equal.
        (
            hostile.names(r"@\(9007199254740993)", r"@\(9007199254740992\.0)"),
            {2.0**53: array, 2**53 + 1: array},
        ),
        (
            hostile.file(
                {"__metadata__": {f"{hostile.NOTE}.future": "[]"}, "@a": hostile.byte()}, b"\0"
            ),
            {"a": array},
        ),
        (hostile.nodes({"": "tuple"}, "#2"), (None, None, array)),
        (
            hostile.file(
                {
                    "@c": hostile.tensor("F32", [0], 4, 4),
                    "@b": hostile.tensor("U8", [4], 0, 4),
                    "@a": hostile.tensor("F32", [0], 0, 0),
                },
                bytes(4),
            ),
            {
                "a": np.zeros(0, np.float32),
                "b": np.zeros(4, np.uint8),
                "c": np.zeros(0, np.float32),
            },
        ),
        # Written without an end to the bytes, these keys would be equal.
        (
            hostile.names(r"@\((b'\\x01', 2))", r"@\((b'\\x01\\x02',))"),
            {(b"\x01", 2): array, (b"\x01\x02",): array},
        ),
    ]
    for number, (content, tree) in enumerate(headers, 50):
        add_bytes(kit, f"header-{number}.safetensors", content, tree, "others")


def with_member(text: bytes) -> bytes:
    """Make a file whose only tensor has one more member."""
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1],"comment":' + text + b"}"
    return hostile.file(b'{"@a":' + entry + b"}", b"\0")


def add_bytes(kit: Kit, name: str, content: bytes, tree: Any, origin: str) -> None:
    path = kit.folder / "accepted" / name
    path.write_bytes(content)
    header = json.loads(hostile.split(content)[0], parse_int=float)  # `int` has a limit
    metadata = header.get("__metadata__") or {}
    own = {key: value for key, value in metadata.items() if not key.startswith(hostile.NOTE)}
    kit.accept(name, tree, own, origin)


def add_folders_by_others(kit: Kit) -> None:
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

    def describe_shards(folder: Path) -> None:
        """Give shards a note and digests that mean nothing: those of the index count."""
        for path in folder.glob("*.safetensors"):
            header, data = hostile.split(path.read_bytes())
            metadata = {hostile.NOTE: "{", hostile.DIGESTS: "", f"{hostile.DIGESTS}.metadata": ""}
            path.write_bytes(hostile.file({**json.loads(header), "__metadata__": metadata}, data))

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
        (
            "surrogates-in-what-is-ignored",
            rewrite(
                lambda i: {**i, "metadata": {**i["metadata"], "total_size": "\ud800", "\ud800": 1}}
            ),
            tree,
            {"run": "1"},
        ),
        ("shard-metadata", describe_shards, tree, {"run": "1"}),
        ("more-tensors", rewrite(drop), {k: tree[k] for k in "ab"}, {"run": "1"}),
    ]
    for name, change, expected, metadata in changes:
        folder = kit.folder / "accepted" / f"index-{name}"
        save_pytree(tree, folder, max_shard_size=30, metadata={"run": "1"})
        change(folder)
        kit.accept(f"index-{name}", expected, metadata, "others")
    folder = kit.folder / "accepted" / "index-total-size"
    save_pytree(tree, folder, max_shard_size=30, checksum=True)
    rewrite(lambda i: {**i, "metadata": {**i["metadata"], "total_size": "608"}})(folder)
    kit.accept("index-total-size", tree, {}, "others")
    folder = kit.folder / "accepted" / "index-digests-and-numbers"
    save_pytree(tree, folder, max_shard_size=30, checksum=True)
    rewrite(lambda i: {**i, "metadata": {**i["metadata"], "n": [0.5]}})(folder)
    kit.accept("index-digests-and-numbers", tree, {}, "others")
    folder = kit.folder / "accepted" / "index-beside-another-and-its-file"
    save_pytree(tree, folder, max_shard_size=30)
    (folder / "a.safetensors.index.json").write_text('{"weight_map": {}}')
    (folder / "a.safetensors").write_bytes(hostile.file({}))
    kit.accept("index-beside-another-and-its-file", tree, {}, "others")
    folder = kit.folder / "accepted" / "index-empty"
    folder.mkdir()
    (folder / INDEX).write_text('{"weight_map": {}}')
    kit.accept("index-empty", {}, {}, "others")
    folder = kit.folder / "accepted" / "file-beside-older-shards"
    save_pytree(tree, folder / "a.safetensors", max_shard_size="1MB")
    (folder / "a-00001-of-00002.safetensors").write_bytes(b"")
    kit.accept("file-beside-older-shards", tree, {}, "others")


PARTS = (add_golden, add_drawn, add_by_others, add_folders_by_others)

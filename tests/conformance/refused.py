"""The files and folders of the kit that must be refused."""

import io
import json
from typing import Any

import numpy as np

import folders
import hostile
from conformance.writing import INDEX, LARGEST, Kit
from format import test_hostile_damage, test_hostile_header, test_hostile_names, test_hostile_note
from load import test_hostile_index
from pytree2safetensors import KeyPathError, save_pytree


def add_refused(kit: Kit) -> None:
    for content, _ in [*test_hostile_header.HEADERS, *test_hostile_damage.PEER_BROKEN]:
        kit.refuse_bytes("header", "", content)
    whole = test_hostile_header.WHOLE
    for size in (0, 1, 7, 8, 9, 40, len(whole) - 9, len(whole) - 1):
        kit.refuse_bytes(
            "cut", "header" if size < len(whole) - 8 else "layout", whole[:size], "cut short"
        )
    for length in (1, 10, len(whole) - 20, 100_000_001, 2**63 - 1, 2**64 - 1):
        kit.refuse_bytes(
            "length", "header", length.to_bytes(8, "little") + whole[8:], "a wrong length"
        )
    for content, _ in [*test_hostile_note.NOTES, *test_hostile_note.CLAIMS]:
        kit.refuse_bytes("note", "note", content)
    for path in (".a", "#01", "@b\\q", "@\ud800"):
        kit.refuse_bytes("note", "note", hostile.leaves({path: ["str", "x"]}), "no key path")
    entry = {"#01": hostile.tensor("I64", [], 0, 8)}
    kit.refuse_bytes(
        "note", "name", hostile.leaves({"#01": "int"}, **entry), "a tensor of no key path"
    )
    content = hostile.nodes({"#01": "list"}, "#01")
    kit.refuse_bytes("note", "note", content, "a node of no key path, and a tensor")
    # Nodes that only a registered type has: such a file loads into a template.
    two: dict[str, Any] = {"@a": "list", "b": "list"}
    kit.refuse_bytes("note", "tree", hostile.nodes(two), "two kinds of node at once")
    for kind, name in (("tuple", r"@\(1)#0"), ("None", r"@\(1)")):
        content = hostile.nodes({r"@\(True)": kind}, name)
        kit.refuse_bytes("note", "tree", content, "dict keys that are equal in Python")
    for content, _ in test_hostile_note.TREE_NOTES:
        kit.refuse_bytes("value", "value", content)
    for found, error, _ in test_hostile_names.NAMES:
        reason = "name" if error is KeyPathError else "tree"
        kit.refuse_bytes("name", reason, hostile.names(*found))
    packed = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    for dtype, bits in packed.items():
        content = hostile.file({"@a": hostile.tensor(dtype, [4], 0, bits // 2)}, bytes(bits // 2))
        kit.refuse_bytes("value", "value", content, "a packed dtype")
    for word, (dtype, width) in {
        "int2": ("I8", 2),
        "uint4": ("U8", 4),
        "float6_e2m3fn": ("U8", 6),
    }.items():
        entry = {"@a": hostile.tensor(dtype, [2], 0, 2)}
        content = hostile.leaves({"@a": word}, **entry)[:-1] + bytes([1 << width])
        kit.refuse_bytes("value", "value", content, f"a byte that is no {word}")
    for content, reason in test_hostile_note.BESIDE:
        kit.refuse_bytes("beside", reason, content)
    for content in test_hostile_note.DEEP:
        kit.refuse_bytes("deep", "note", content)


def add_damaged(kit: Kit) -> None:
    """Add files with digests in which one part was changed."""
    file = io.BytesIO()
    tree = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "t": ("é", None, 1),
        "z": np.zeros((0, 2)),
    }
    save_pytree(tree, file, checksum=True, metadata={"run": "1"})
    content = file.getvalue()
    (kit.folder / "accepted" / "digests.safetensors").write_bytes(content)
    kit.accept("digests.safetensors", tree, {"run": "1"}, "digests")
    last = ["\uffff", "\U00010000"]  # UTF-16 sorts them the other way round
    kit.accept_saved(
        "digests-sorted.safetensors",
        {name: np.uint8(1) for name in last},
        "digests",
        checksum=True,
        metadata=dict.fromkeys(last, "1"),
    )
    header, data = hostile.split(content)
    for old, new in (
        (b'"run":"1"', b'"run":"2"'),
        (b'"@w":{"dtype":"F32"', b'"@w":{"dtype":"I32"'),
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b"\\u00e9", b"\\u00e8"),
        (b'"@w"', b'"@v"'),
    ):
        assert old in header
        kit.refuse_bytes(
            "digest",
            "digest",
            hostile.file(header.replace(old, new), data),
            f"{old.decode()} was changed",
        )
    for position in (0, 23, 24, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        kit.refuse_bytes(
            "digest", "digest", hostile.file(header, bytes(changed)), f"byte {position} was changed"
        )
    for entry in (hostile.DIGESTS, hostile.DIGESTS + ".metadata"):
        parsed = json.loads(header)
        del parsed["__metadata__"][entry]
        kit.refuse_bytes("digest", "digest", hostile.file(parsed, data), f"{entry} was removed")


def add_refused_folders(kit: Kit) -> None:
    first, second, third = folders.shard_names(3)
    for number, (change, why) in enumerate(test_hostile_index.BAD_INDEXES.values(), 1):
        if "pipe" in why:
            continue
        folder = kit.folder / "refused" / f"index-{number:02}"
        save_pytree(folders.tree_of(1), folder, max_shard_size=100)
        (folder / "junk").write_bytes(b"\xff" * 100)
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(index)))
        kit.refuse(f"index-{number:02}", "index")
    for number, text in enumerate(test_hostile_index.BAD_TEXTS, 50):
        if len(text) < LARGEST:
            folder = kit.folder / "refused" / f"index-{number:02}"
            folder.mkdir()
            (folder / INDEX).write_bytes(text)
            kit.refuse(f"index-{number:02}", "index")
    broken = {
        "shards-without-an-index": [first, second],
        "shards-and-another-file": [first, second, "a.safetensors"],
        "two-files": ["a.safetensors", "b.safetensors"],
        "index-and-file": [INDEX, "model.safetensors"],
        "other-index-and-file": ["a.safetensors.index.json", "model.safetensors"],
        "index-and-its-file": ["a.safetensors.index.json", "a.safetensors"],
        "two-indexes": ["a.safetensors.index.json", "b.safetensors.index.json"],
        "nothing": ["config.json"],
    }
    for name, files in broken.items():
        folder = kit.folder / "refused" / f"folder-{name}"
        folder.mkdir()
        for file in files:
            text = b'{"weight_map": {}}' if file.endswith("index.json") else hostile.file({})
            (folder / file).write_bytes(text)
        kit.refuse(f"folder-{name}", "folder", name.replace("-", " "))
    for name, change in {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "missing": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "of-another-save": lambda path: path.write_bytes(hostile.names("@x")),
        "with-metadata-that-are-not-strings": lambda path: path.write_bytes(
            path.read_bytes().replace(b'"format":"flax"', b'"format":1     ')
        ),
    }.items():
        folder = kit.folder / "refused" / f"shard-{name}"
        save_pytree(folders.tree_of(1), folder, max_shard_size=100)
        change(folder / second)
        kit.refuse(f"shard-{name}", "shard", f"a shard is {name.replace('-', ' ')}")
    folder = kit.folder / "refused" / "shard-damaged"
    save_pytree(folders.tree_of(1), folder, max_shard_size=100, checksum=True)
    path = folder / third
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    kit.refuse("shard-damaged", "digest", "the last byte of a shard was changed")


PARTS = (add_refused, add_damaged, add_refused_folders)

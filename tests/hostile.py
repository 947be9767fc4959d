"""Files that no save would write: built by hand or mutated, and what loading may do with them."""

import copy
import io
import json
import random
import re
import signal
import tracemalloc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from pytree2safetensors import (
    FileFormatError,
    Pytree2SafetensorsError,
    PyTreeContainer,
    UnkeyedContainer,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._load.opening import read_header
from pytree2safetensors._storage.stream import open_stream

NOTE = "pytree2safetensors"
DIGESTS = "pytree2safetensors.sha256"
DOCUMENTED = (Pytree2SafetensorsError, OSError)

# --- building ---------------------------------------------------------------------------------


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, and possibly a wrong header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def tensor(dtype: Any, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def byte(position: int = 0) -> dict[str, Any]:
    return tensor("U8", [1], position, position + 1)


def names(*found: str) -> bytes:
    """A file with a tensor of one byte under each name."""
    return file({name: byte(i) for i, name in enumerate(found)}, bytes(len(found)))


def noted(note: Any, data: bytes = b"", **tensors: Any) -> bytes:
    """A file with a note, given as text or as an object for JSON."""
    text = note if isinstance(note, str) else json.dumps(note)
    return file({"__metadata__": {NOTE: text}, **tensors}, data)


def nodes(kinds: Any, *found: str) -> bytes:
    """A file with a note of nodes, and with a tensor of one byte under each name."""
    tensors = {name: byte(i) for i, name in enumerate(found)}
    return noted({"version": 1, "nodes": kinds}, bytes(len(found)), **tensors)


def leaves(kinds: Any, **tensors: Any) -> bytes:
    """A file with a note of leaves, and with tensors full of zeros."""
    stops = [entry["data_offsets"][1] for entry in tensors.values()]
    return noted({"version": 1, "leaves": kinds}, bytes(max(stops, default=0)), **tensors)


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a file."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return content[8:stop], content[stop:]


# --- loading ----------------------------------------------------------------------------------


class Hang(BaseException):
    """Loading took longer than anything reasonable."""


@contextmanager
def no_hang(seconds: int = 120) -> Iterator[None]:
    """Raise `Hang` if something takes too long."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The bytes that a load may always take: for caches, compiled functions, and gaps in lists.
_SLACK = 32 << 20


@contextmanager
def bounded_memory(size: int, factor: int = 64) -> Iterator[None]:
    """Assert that the memory in use stays in proportion to the size of a file."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if started:
            tracemalloc.stop()
    assert peak - before < factor * size + _SLACK


def refused(
    content: bytes, error: type[Pytree2SafetensorsError], text: str, *, by_all: bool = True
) -> None:
    """Assert that loading a file raises this error: by each function, or only by those that build trees."""
    loaders: list[Callable[[Any], Any]] = [load_pytree, load_abstract]
    if by_all:
        loaders += [load_metadata, lambda source: load_into_pytree({"a": 0}, source)]
    for load in loaders:
        with no_hang(), pytest.raises(error) as caught:
            load(io.BytesIO(content))
        assert text in str(caught.value)
        check_message(caught.value)
        assert type(caught.value) is error


def attempt(load: Callable[[Any], Any], content: bytes | Path) -> Any:
    """Load, and return the result or the documented exception. Let other exceptions pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAX does not support the dtypes")
        try:
            return load(io.BytesIO(content) if isinstance(content, bytes) else content)
        except DOCUMENTED as error:
            check_message(error)
            return error


def check_message(error: BaseException) -> None:
    """Check that a message is short and printable, whatever the file contains."""
    text = str(error)
    assert 10 < len(text) < 2000
    assert text.isprintable()


def check_file(content: bytes) -> Any:
    """Load a file in every way, and check the results; return the tree or the documented exception."""
    found = attempt(load_pytree, content)
    outline = attempt(load_abstract, content)
    metadata = attempt(load_metadata, content)
    if isinstance(found, BaseException):
        return found
    assert not isinstance(outline, BaseException)
    assert structure_of(outline) == structure_of(found)
    assert isinstance(metadata, dict)
    check_tree(content, found)
    return found


def structure_of(tree: Any) -> Any:
    return jax.tree_util.tree_structure(tree)


def check_tree(content: bytes, tree: Any) -> None:
    """Assert that a tree, saved again, gives the tensors of the file."""
    again = io.BytesIO()
    save_pytree(tree, again)
    assert tensors_of(again.getvalue()) == tensors_of(content)


def tensors_of(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a file that is known to be one."""
    header, data = split(content)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        raw = data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BOOL":  # any byte but 0 is true
            raw = bytes(map(bool, raw))
        found[name] = entry["dtype"], entry["shape"], raw
    return found


# What this library refuses in a header and safetensors does not: a name twice, more dimensions than
# arrays have, a size that is no size but for a 0, white space first, and lists in place of objects.
_STRICTER = re.compile(r"twice|dimensions|beyond what|does not begin with|without a proper")


def check_against_peer(content: bytes) -> None:
    """The headers that safetensors takes are taken, but for known reasons, and no others."""
    source = open_stream(io.BytesIO(content))
    try:
        safetensors.deserialize(content)
    except Exception as error:  # noqa: BLE001 - it has one class for everything
        if "unknown variant" not in str(error):  # an older one knows fewer dtypes
            with pytest.raises(FileFormatError):
                read_header(source)
        return
    try:
        read_header(source)
    except FileFormatError as error:
        assert _STRICTER.search(str(error)), error


# --- mutating ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def seeds() -> list[bytes]:
    """Sound files with every kind of node and leaf, to begin with."""
    trees: list[tuple[Any, dict[str, Any]]] = [
        ({"layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}] * 2, "step": 3}, {}),
        (
            {
                "od": OrderedDict(z=1, a=OrderedDict()),
                "t": ((), (1.5, None), [None, []]),
                "c": PyTreeContainer({"x": True, "__class__": "s", "": 2j}),
                "u": UnkeyedContainer([UnkeyedContainer(), 2**70]),
            },
            {"metadata": {"a": "b", "é": "\0"}},
        ),
        (
            {
                "key": jax.random.key(0),
                "keys": jax.random.split(jax.random.key(0, impl="rbg"), 3),
                "weak": jnp.asarray(1.0),
                "c128": np.ones((2, 1), np.complex128),
                "i4": np.array([1, -2], ml_dtypes.int4),
                "f8": np.array([1], ml_dtypes.float8_e4m3b11fnuz),
                "f64": np.ones(2),
                "zero": np.ones((0, 3), np.float16),
                "bool": np.array([True, False]),
            },
            {"checksum": True},
        ),
        ({(1, "x"): np.uint8(3), (2, "."): "text"}, {"checksum": True}),
        (np.arange(3, dtype=np.int16), {}),
        ({}, {}),
    ]
    found = []
    for tree, options in trees:
        saved = io.BytesIO()
        save_pytree(tree, saved, **options)
        found.append(saved.getvalue())
    return found


VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 8, 64, -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400,
    0.0, 1.0, -0.0, 1.5, 1e300, "", "a", "F32", "F64", "BOOL", "U8", "I8", "U32", "F4", "F8_E8M0",
    "F128", "tuple", "None", "dict", "list", "OrderedDict", "PyTreeContainer", "UnkeyedContainer",
    "int", "float", "weak", "key", "str", "complex", "complex128", "int4", "uint2", "__class__",
    ["key", "rbg"], ["key", "threefry2x32"], ["key", "os.system"], ["str", "x"], ["str", "\ud800"],
    ["int", "0x10000000000000000"], ["int", "0x1"], ["int", "1" * 5000], ["OrderedDict", []],
    ["OrderedDict", ["@a"]], ["OrderedDict", ["@step", "@layers"]], [], [0], [2, 3], [0, 0], [0, 2**62],
    [2**63, 2], [1] * 33, [1] * 65, [[]], {}, {"a": 1}, "\0", "\u202e", "\ud800", "é", "x" * 5000,
]  # fmt: skip

_NAMES: list[str] = [
    "", ".", "@", "#", "\\", "#0", "#1", "#01", "#-1", "#2000000000", "#99999999999", "@a", "@a.b",
    "@a@b", "@a#0", r"@a\.b", r"@\(1)", r"@\(True)", r"@\(1\.0)", r"@\((1, 'x'))", r"@\(", r"@\()",
    r"#\(0)", r"#\(1)", r"#\(2000000000)", "a", ".a", "__metadata__", ".__metadata__", "__class__",
    "__reduce_ex__", "tree_flatten", "\0", "\u202e", "\ud800", "é", "@layers", "@layers#0",
    "@layers#0@w", "@layers#5@w", "@step", "@step@x", "@od", "@od@a", "@t#1", "@key", "@" * 3000,
    "#0" * 400, "a" + ".a" * 1100, "x" * 5000, NOTE, DIGESTS, DIGESTS + ".metadata",
]  # fmt: skip

_TEXT: list[str] = [
    *".@#\\()'\"0123456789,-+ abxuN\n\0\u202e\ud800é",
    r"\(",
    r"\)",
    r"\x00",
    "None",
    "True",
]


def mutated_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, replace, insert, remove, repeat or swap bytes anywhere, or cut the end off."""
    found = bytearray(content)
    first = len(content) - len(split(content)[1]) if chance.random() < 0.3 else 0
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = min(chance.randint(first, len(content)), len(found))
        to = min(len(found), at + chance.choice([1, 1, 2, 8, 50]))
        what = chance.randrange(7)
        if what == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            found[at:to] = chance.randbytes(to - at)
        elif what == 2:
            found[at:at] = chance.choice(
                [b'"', b"{", b"}", b",", b"\\", b"0", b"-", b"\0", b"\xff"]
            )
        elif what == 3:
            del found[at:to]
        elif what == 4:
            found[at:at] = found[at:to]
        elif what == 5:
            del found[at:]
        else:
            found[:8] = chance.randrange(1 << chance.choice([4, 8, 10, 20, 64])).to_bytes(
                8, "little"
            )
    return bytes(found)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            found.extend((item, key) for key in keys)
            pending.extend(item[key] for key in keys)
    return found


def mutated_json(chance: random.Random, content: Any, values: list[Any] = VALUES) -> Any:
    """Change values, keys and their order anywhere in a JSON value."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        places = _places(content)
        if not places:
            return chance.choice(values)
        item, key = chance.choice(places)
        what = chance.randrange(5)
        if what == 0:
            del item[key]
        elif what == 1 and isinstance(item, dict):
            new = mutated_name(chance, key)
            item[new] = item.pop(key)
        elif what == 2:
            other, other_key = chance.choice(places)
            item[key] = copy.deepcopy(other[other_key])
        elif what == 3 and isinstance(item[key], int):
            item[key] += chance.choice([-8, -4, -1, 1, 4, 8, 64])
        else:
            item[key] = copy.deepcopy(chance.choice(values))
    return content


def mutated_name(chance: random.Random, name: str) -> str:
    what = chance.randrange(4)
    if what == 0:
        return chance.choice(_NAMES)
    if what == 1:
        return name + chance.choice(_NAMES)
    if what == 2:
        return "".join(chance.choices(_TEXT, k=chance.randrange(12)))
    at = chance.randrange(len(name) + 1)
    return name[:at] + chance.choice(_TEXT) + name[at + chance.randrange(2) :]


def _fitted(chance: random.Random, header: Any, data: bytes) -> bytes:
    """A file with this header, often with as much data as it describes."""
    text = json.dumps(header)
    if chance.random() < 0.1:  # an entry twice
        text = text[:-1] + "," + text[1:] if len(text) > 2 else text
    stops = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            stops += [n for n in entry["data_offsets"] if type(n) is int and 0 <= n < 1 << 16]
    size = max(stops) if chance.random() < 0.8 else len(data)
    return file(text.encode("utf-8", "surrogatepass"), data[:size].ljust(size, b"\0"))


def mutated_header(chance: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    return _fitted(chance, mutated_json(chance, json.loads(header)), data)


def mutated_names(chance: random.Random, content: bytes) -> bytes:
    """Rename tensors, and lay the others out again so that nothing else is wrong."""
    header, data = split(content)
    entries = json.loads(header)
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        renamed = name != "__metadata__" and chance.random() < 0.5
        found[mutated_name(chance, name) if renamed else name] = entry
    metadata = found.pop("__metadata__", None)
    position, pieces = 0, []
    for name, entry in found.items():
        start, stop = entry["data_offsets"]
        found[name] = {**entry, "data_offsets": [position, position + stop - start]}
        pieces.append(data[start:stop])
        position += stop - start
    if metadata is not None and chance.random() < 0.7:
        metadata.pop(DIGESTS, None)
        metadata.pop(DIGESTS + ".metadata", None)
        found["__metadata__"] = metadata
    text = json.dumps(found, ensure_ascii=chance.random() < 0.5)
    return file(text.encode("utf-8", "surrogatepass"), b"".join(pieces))


def mutated_note(chance: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    entries = json.loads(header)
    metadata = entries.setdefault("__metadata__", {})
    note = json.loads(metadata.get(NOTE, '{"version":1,"nodes":{},"leaves":{}}'))
    for kinds in (note["nodes"], note["leaves"]):
        if chance.random() < 0.3:
            tensors = [name for name in entries if name != "__metadata__"]
            name = chance.choice([*tensors, *_NAMES])
            kinds[name] = copy.deepcopy(chance.choice(VALUES))
    if chance.random() < 0.7:
        note = mutated_json(chance, note)
    text = json.dumps(note)
    if chance.random() < 0.1:
        text = mutated_bytes(chance, text.encode()).decode("utf-8", "replace")
    metadata[NOTE] = text
    metadata.pop(DIGESTS, None)
    metadata.pop(DIGESTS + ".metadata", None)
    return file(entries, data)


def mutated_digests(chance: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    entries = json.loads(header)
    metadata = entries.setdefault("__metadata__", {})
    digests = json.loads(metadata.get(DIGESTS, "{}"))
    metadata[DIGESTS] = json.dumps(mutated_json(chance, digests))
    return file(mutated_json(chance, entries) if chance.random() < 0.3 else entries, data)


class Mutation(NamedTuple):
    """One file of the fuzz test, which its own name makes again."""

    kind: str
    seed: str
    number: int

    def make(self) -> bytes:
        chance = random.Random(f"{self.kind} {self.seed} {self.number}")
        return MUTATORS[self.kind](chance, chance.choice(seeds()))


MUTATORS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes": mutated_bytes,
    "header": mutated_header,
    "names": mutated_names,
    "note": mutated_note,
    "digests": mutated_digests,
}

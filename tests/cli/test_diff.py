"""`diff`: which leaves differ, and how."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from command import Run, small, strictly
from pytree2safetensors import UnkeyedContainer, save_pytree
from pytree2safetensors._cli.comparison import compare_files
from pytree2safetensors._storage.file_source import FileSource

pytestmark = pytest.mark.usefixtures("own_folder")

DIFFERENT = """\
~ @big          int 0x8000000000000000000000000 -> 0x4000000000000000000000000
~ @dtype        float32[3] -> bfloat16[3]
~ @key          key<threefry2x32>[] another key
~ @kind         int -> int32[]
~ @name         str 'adam' -> 'sgd'
+ @new          float32[4]  16 B
- @old          float32[2]   8 B
~ @scalar       float 1.0 -> 1.5
~ @shape        float32[3] -> float32[1,3]
~ @values       float32[2,2] 2 of 4 differ, by at most 2.5, 1 not finite
~ @weak         float32[] weak -> float32[]
~ @zero         float32[3] 1 of 3 differ, by at most 0
~ node @opt     tuple -> list
~ metadata run  '42' -> '43'
~ metadata tag  'x' -> absent

leaves    of the 11 in both files, 10 differ, 1 only in the first, 1 only in the
          second
nodes     1 differ
metadata  2 differ
"""


def first_tree() -> dict[str, Any]:
    return {
        "big": 2**99,
        "dtype": np.zeros(3, np.float32),
        "key": jax.random.key(0),
        "kind": 7,
        "name": "adam",
        "old": np.zeros(2, np.float32),
        "opt": (np.ones(1, np.int8),),
        "scalar": 1.0,
        "shape": np.zeros(3, np.float32),
        "values": np.array([[0, 1], [2, 3]], np.float32),
        "weak": jnp.asarray(1.0),
        "zero": np.zeros(3, np.float32),
    }


def second_tree() -> dict[str, Any]:
    tree = first_tree()
    del tree["old"]
    return tree | {
        "big": 2**98,
        "dtype": np.zeros(3, ml_dtypes.bfloat16),
        "key": jax.random.key(1),
        "kind": np.int32(7),
        "name": "sgd",
        "new": np.zeros(4, np.float32),
        "opt": [np.ones(1, np.int8)],
        "scalar": 1.5,
        "shape": np.zeros((1, 3), np.float32),
        "values": np.array([[math.nan, 1], [2, 5.5]], np.float32),
        "weak": np.float32(1),
        "zero": np.array([0, -0.0, 0], np.float32),
    }


def test_diff_says_which_leaves_differ_and_how(run: Run) -> None:
    save_pytree(first_tree(), "a.safetensors", metadata={"run": "42", "tag": "x"})
    save_pytree(second_tree(), "b.safetensors", metadata={"run": "43"})
    code, out, err = run("diff", "a.safetensors", "b.safetensors")
    assert (code, err) == (1, "pytree2safetensors: a.safetensors and b.safetensors differ\n")
    assert out == DIFFERENT


class Point(NamedTuple):
    x: Any


ONE = np.ones(1, np.int8)
# Trees that differ, and the names and kinds of the nodes that differ.
NODES: list[tuple[Any, Any, list[tuple[str, str | None, str | None]]]] = [
    ((ONE,), [ONE], [("", "tuple", "list")]),
    ((), {}, [("", "tuple", "dict")]),
    ((), ONE, [("", "tuple", None)]),
    ({"a": (ONE,)}, {"a": {"b": [ONE]}}, [("@a", "tuple", "dict")]),
    ({"a": (ONE,)}, {"a": {"b": (ONE,)}}, [("@a", "tuple", "dict"), ("@a@b", None, "tuple")]),
    ({"a": [()]}, {"a": Point(ONE)}, [("@a#0", "tuple", None)]),
    ({"a": ()}, {"a": Point(ONE)}, [("@a", "tuple", "PyTreeContainer")]),
    ({"a": ()}, {"a": UnkeyedContainer([ONE])}, [("@a", "tuple", "UnkeyedContainer")]),
    ({"a": ()}, {"a": ONE, "b": ()}, [("@a", "tuple", None), ("@b", None, "tuple")]),
    ({"a": {}}, {"a": {"b": ONE}}, []),
    ([[]], [[ONE]], []),
    ({"a": (), "b": None}, {"a": [], "b": [None]}, [
        ("@a", "tuple", "list"), ("@b", "None", "list"), ("@b#0", None, "None"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "expected"), NODES, ids=range(len(NODES)))
def test_diff_names_the_kinds_of_nodes(
    first: Any, second: Any, expected: list[tuple[str, str | None, str | None]]
) -> None:
    save_pytree(first, "a.safetensors")
    save_pytree(second, "b.safetensors")
    assert compare_files("a.safetensors", "b.safetensors").nodes == expected
    backwards = [(name, after, before) for name, before, after in expected]
    assert compare_files("b.safetensors", "a.safetensors").nodes == backwards


def test_diff_of_nodes_of_foreign_names(run: Run) -> None:
    save_pytree({"a": ()}, "a.safetensors")
    save_file({"@a@\\q": ONE, "b.c": ONE}, "b.safetensors")
    _, out, _ = run("diff", "a.safetensors", "b.safetensors")
    assert re.search(r"~ node @a +tuple -> absent\n", out)


def test_diff_of_the_same_says_so(run: Run) -> None:
    save_pytree(small(), "a.safetensors")
    save_pytree(small(), "b.safetensors", checksum=True)
    assert run("diff", "a.safetensors", "b.safetensors") == (
        0,
        "The same: 16 leaves, bit for bit.\n",
        "",
    )


def test_diff_lists_a_hundred_lines_unless_asked(run: Run) -> None:
    save_pytree([np.zeros(1)] * 150, "a.safetensors")
    save_pytree([np.ones(1)] * 150, "b.safetensors")
    _, out, _ = run("diff", "a.safetensors", "b.safetensors")
    assert len(out.splitlines()) == 103
    assert "... and 50 more; --all lists them" in out
    _, out, _ = run("diff", "--all", "a.safetensors", "b.safetensors")
    assert len(out.splitlines()) == 152


DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int8",
    "uint64",
    "int64",
    "bool",
    "complex64",
]


@st.composite
def two_arrays(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two arrays of one dtype and shape, from raw bytes, alike in places."""
    name = draw(st.sampled_from(DTYPES))
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    count = draw(st.integers(0, 5))
    byte = st.just(b"\0") | st.just(b"\1") if name == "bool" else st.binary(min_size=1, max_size=1)
    nbytes = count * dtype.itemsize
    raw = b"".join(draw(st.lists(byte, min_size=nbytes, max_size=nbytes)))
    keep = draw(st.lists(st.booleans(), min_size=nbytes, max_size=nbytes))
    other = bytes(old if kept else draw(byte)[0] for old, kept in zip(raw, keep, strict=True))
    return np.frombuffer(raw, dtype), np.frombuffer(other, dtype)


@given(two_arrays())
@example((np.array([1.154632e-13 + 1.1642243e-10j], np.complex64), np.zeros(1, np.complex64)))
@example((np.array([6.345697e35j], np.complex64), np.array([3.082218e33 + 0j], np.complex64)))
@example((np.array([-(2**63)]), np.array([2**63 - 1])))
@example((np.array([0], np.uint64), np.array([2**64 - 1], np.uint64)))
def test_diff_counts_the_elements_whose_bits_differ(
    arrays: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> None:
    a, b = arrays
    save_pytree({"x": a}, "a.safetensors", durable=False)
    save_pytree({"x": b}, "b.safetensors", durable=False)
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.tobytes() != y.tobytes()]
    found = compare_files("a.safetensors", "b.safetensors")
    assert found.same == (not pairs)
    if found.same:
        return
    ((_, aspects, _, _, values),) = found.leaves
    assert aspects == ["values"]
    assert values is not None
    assert (values.elements, values.differing) == (len(a), len(pairs))
    if a.dtype.kind in "iu":
        assert values.largest == max(abs(int(x) - int(y)) for x, y in pairs)
    elif a.dtype.kind != "b":
        with np.errstate(all="ignore"):
            gaps = [abs(complex(x) - complex(y)) for x, y in pairs if np.isfinite([x, y]).all()]
        assert values.not_finite == len(pairs) - len(gaps)
        assert values.largest == (max(gaps) if gaps else None)


def test_diff_compares_in_pieces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytree2safetensors._cli.contents.PIECE", 64)
    before = np.arange(1000, dtype=np.complex128)
    after = before.copy()
    after[[3, 500, 999]] += [1, 2j, 3]
    save_pytree({"x": before}, "a.safetensors", checksum=True)
    save_pytree({"x": after}, "b.safetensors", checksum=True)
    ((*_, values),) = compare_files("a.safetensors", "b.safetensors").leaves
    assert values == (1000, 3, 3.0, 0)
    assert run("verify", "a.safetensors")[0] == 0


def test_diff_reads_each_value_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("ab"):
        tree = {f"{i}": np.float32(i) for i in range(9)} | {"1": np.float32(number), name: 5}
        save_pytree(tree, f"{name}.safetensors")
    sizes: list[int] = []
    read_into = FileSource.read_into

    def recorded(self: FileSource, buffers: list[memoryview], offset: int) -> int:
        if offset:
            sizes.append(sum(map(len, buffers)))
        return read_into(self, buffers, offset)

    monkeypatch.setattr(FileSource, "read_into", recorded)
    _, out, _ = run("diff", "a.safetensors", "b.safetensors")
    assert out.startswith("~ @1  float32[] 0.0 -> 1.0\n- @a  int = 5  8 B\n+ @b  int = 5  8 B\n\n")
    assert sum(sizes) == 2 * (9 * 4 + 8)


@pytest.mark.parametrize("order", [1, -1])
def test_diff_compares_tensors_in_another_order(order: int, run: Run) -> None:
    names = [f"t{i}" for i in range(20)]
    for file, backwards, changed in (("a", 1, -1), ("b", order, 7)):
        content, header = b"", {}
        for number, name in list(enumerate(names))[::backwards]:
            values = np.full((number % 4) * 30, number + (number == changed), np.uint8).tobytes()
            offsets = [len(content), len(content) + len(values)]
            header[name] = {"dtype": "U8", "shape": [len(values)], "data_offsets": offsets}
            content += values
        text = json.dumps(header).encode()
        Path(f"{file}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    for first, second in ("ab", "ba"):
        code, out, _ = run("diff", f"{first}.safetensors", f"{second}.safetensors")
        assert code == 1
        assert out == (
            "~ t7  uint8[90] 90 of 90 differ, by at most 1\n\n"
            "leaves    of the 20 in both files, 1 differ\n"
        )


def test_diff_of_nan_payloads_sees_them(run: Run) -> None:
    payloads = [
        np.frombuffer(bits, np.float64)[0] for bits in (b"\1" + b"\xff" * 7, b"\2" + b"\xff" * 7)
    ]
    for name, payload in zip("ab", payloads, strict=True):
        save_pytree({"array": payload, "float": float(payload)}, f"{name}.safetensors")
    code, out, _ = run("diff", "a.safetensors", "b.safetensors")
    assert code == 1
    assert "float64[] nan (bits ffffffffffffff01) -> nan (bits ffffffffffffff02)" in out
    assert "float nan (bits ffffffffffffff01) -> nan (bits ffffffffffffff02)" in out


@pytest.mark.parametrize("kind", ["bool", None])
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 3), (3, 2)])
def test_diff_of_bools_sees_the_bytes_that_say_true(
    kind: str | None, first: int, second: int, run: Run
) -> None:
    note = {"version": 1, "nodes": {}, "leaves": {"@a": kind} if kind else {}}
    for name, byte in (("one", first), ("two", second)):
        value = np.array(byte, np.uint8).view(np.bool_)
        save_file({"@a": value}, name, {"pytree2safetensors": json.dumps(note)} if kind else None)
    before, after = (f"True (bits 0{byte})" if byte > 1 else "True" for byte in (first, second))
    code, out, err = run("diff", "one", "two")
    assert (code, err) == (1, "pytree2safetensors: one and two differ\n")
    assert out == (
        f"~ @a  {kind or 'bool[]'} {before} -> {after}\n\nleaves    of the 1 in both files, 1 differ\n"
    )
    _, out, _ = run("diff", "--json", "one", "two")
    (leaf,) = strictly(out)["leaves"]
    assert leaf["differs"] == ["values"]
    assert [leaf[side].get("bits", "01") for side in ("before", "after")] == [
        f"0{first}",
        f"0{second}",
    ]


@pytest.mark.parametrize("damaged", ["one", "two"])
def test_diff_names_the_file_with_impossible_values(damaged: str, run: Run) -> None:
    for name in ("one", "two"):
        save_pytree({"a": jnp.zeros(3, jnp.int4)}, name)
    content = Path(damaged).read_bytes()
    Path(damaged).write_bytes(content[:-1] + b"\x77")
    said = f"in '{damaged}', '@a' has values that are not int4"
    assert run("diff", "one", "two") == (1, "", f"pytree2safetensors: {said}\n")


def test_diff_tells_keys_of_unknown_implementations_apart(run: Run) -> None:
    for name in ("one", "two"):
        note = {"version": 1, "nodes": {}, "leaves": {"@k": ["key", name]}}
        save_file({"@k": np.zeros(2, np.uint32)}, name, {"pytree2safetensors": json.dumps(note)})
    code, out, _ = run("diff", "one", "two")
    assert code == 1
    assert "key one" in out
    assert "key two" in out


def test_diff_json(run: Run) -> None:
    nan = np.array([1, math.nan], np.float32)
    save_pytree({"w": nan, "s": math.inf, "n": ()}, "a.safetensors")
    save_pytree({"w": nan + 1, "t": 1, "n": []}, "b.safetensors", metadata={"run": "42"})
    code, out, _ = run("diff", "--json", "a.safetensors", "b.safetensors")
    assert code == 1
    array = {
        "name": "@w",
        "kind": "array",
        "dtype": "float32",
        "shape": [2],
        "weak": False,
        "bytes": 8,
    }
    assert strictly(out) == {
        "files": ["a.safetensors", "b.safetensors"],
        "same": False,
        "leaves": [
            {
                "name": "@s",
                "differs": ["missing"],
                "before": {"name": "@s", "kind": "float", "bytes": 8, "value": "inf"},
                "after": None,
                "values": None,
            },
            {
                "name": "@t",
                "differs": ["added"],
                "before": None,
                "after": {"name": "@t", "kind": "int", "bytes": 8, "value": "1"},
                "values": None,
            },
            {
                "name": "@w",
                "differs": ["values"],
                "before": array,
                "after": array,
                "values": {"elements": 2, "differing": 1, "largest": 1.0, "not_finite": 0},
            },
        ],
        "nodes": [{"name": "@n", "before": "tuple", "after": "list"}],
        "metadata": [{"name": "run", "before": None, "after": "42"}],
    }
    code, out, _ = run("diff", "--json", "a.safetensors", "a.safetensors")
    assert code == 0
    assert strictly(out)["same"] is True

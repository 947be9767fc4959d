"""The command: what its screens say, what its JSON holds, and how it ends."""

import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pytree2safetensors import PyTreeContainer, load_into_pytree, load_pytree, save_pytree
from pytree2safetensors._cli.diff import compare_files
from pytree2safetensors._cli.main import main
from pytree2safetensors._cli.outline import outline
from pytree2safetensors._cli.summary import Leaf, summarise_file
from pytree2safetensors._cli.terminal import plain, size
from pytree2safetensors._cli.verify import verify_file
from pytree2safetensors._storage.byte_source import _Descriptor
from pytree2safetensors.testing import Keyed

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on a screen of some columns."""

    def run(*arguments: str, columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main(arguments)
        except SystemExit as ended:  # how argparse refuses
            assert isinstance(ended.code, int)
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "pytree2safetensors", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def layer() -> dict[str, Any]:
    return {"w": jnp.zeros((16, 16)), "b": jnp.zeros(16, jnp.bfloat16)}


def small() -> dict[str, Any]:
    return {
        "params": PyTreeContainer({"layers": [layer() for _ in range(4)], "scale": np.float16(1)}),
        "opt": ((), None, (jnp.ones(3),), OrderedDict(mu=1.0, nu=2.0)),
        "name": "a name that is too long to stand on one line of a narrow screen, and so cut",
        "a.b": 2**99,
        "key": jax.random.key(0),
        "step": 7,
    }


# --- show -------------------------------------------------------------------------------------

NARROW = r"""small.safetensors
leaves    16, 4.3 kB; 5.8 kB on disk
types     5 float32, 4 bfloat16, 2 int, 2 float, 1 key<threefry2x32>, 1 str,
          1 float16
metadata  format: 'flax'
          run: '42'

@a\.b                      int = 0x8000000000000000000000000
@key                       key<threefry2x32>[]                               8 B
@name
      str = 'a name that is t'...'reen, and so cut' (75 characters)
@opt                       tuple, 3 leaves                                  28 B
  @opt#0                   empty tuple
  @opt#1                   None
  @opt#2                   tuple, 1 leaf                                    12 B
    @opt#2#0               float32[3]                                       12 B
  @opt#3                   OrderedDict, 2 leaves                            16 B
    @opt#3@mu              float                                             8 B
    @opt#3@nu              float                                             8 B
@params                    9 leaves                                       4.2 kB
  @params.layers#0..3      4 x 2 leaves                                   4.2 kB
    @params.layers#0..3@b  4 x bfloat16[16]                                128 B
    @params.layers#0..3@w  4 x float32[16,16]                             4.1 kB
  @params.scale            float16[]                                         2 B
@step                      int                                               8 B
"""

WIDE = r"""small.safetensors
leaves    16, 4.3 kB; 5.8 kB on disk
types     5 float32, 4 bfloat16, 2 int, 2 float, 1 key<threefry2x32>, 1 str, 1 float16
metadata  format: 'flax'
          run: '42'

@a\.b                      int = 0x8000000000000000000000000
@key                       key<threefry2x32>[]                                               8 B
@name                      str = 'a name that is t'...'reen, and so cut' (75 characters)
@opt                       tuple, 3 leaves                                                  28 B
  @opt#0                   empty tuple
  @opt#1                   None
  @opt#2                   tuple, 1 leaf                                                    12 B
    @opt#2#0               float32[3]                                                       12 B
  @opt#3                   OrderedDict, 2 leaves                                            16 B
    @opt#3@mu              float                                                             8 B
    @opt#3@nu              float                                                             8 B
@params                    9 leaves                                                       4.2 kB
  @params.layers#0..3      4 x 2 leaves                                                   4.2 kB
    @params.layers#0..3@b  4 x bfloat16[16]                                                128 B
    @params.layers#0..3@w  4 x float32[16,16]                                             4.1 kB
  @params.scale            float16[]                                                         2 B
@step                      int                                                               8 B
"""


@pytest.mark.parametrize(("columns", "screen"), [(80, NARROW), (200, WIDE)])
def test_show_prints_a_small_tree(run: Run, columns: int, screen: str) -> None:
    save_pytree(small(), "small.safetensors", metadata={"run": "42"})
    assert run("show", "small.safetensors", columns=columns) == (0, screen, "")


def test_a_file_alone_is_shown(run: Run) -> None:
    save_pytree(small(), "small.safetensors")
    assert run("small.safetensors") == run("show", "small.safetensors")


def foreign() -> dict[str, np.ndarray[Any, Any]]:
    """What PyTorch's users save, and a name that is no key path."""
    shapes = {"mlp.up.weight": (4, 11), "mlp.down.weight": (11, 4), "norm.weight": (4,)}
    layers: dict[str, np.ndarray[Any, Any]] = {
        f"model.layers.{number}.{name}": np.zeros(shape, np.float16)
        for number in range(32)
        for name, shape in shapes.items()
    }
    other: dict[str, np.ndarray[Any, Any]] = {
        "model.embed.weight": np.zeros((100, 4), np.float16),
        "a\\b": np.zeros(1, np.float32),
    }
    return {**layers, **other}


FOREIGN = r"""
model                                     97 leaves           6.7 kB
  model.embed.weight                      float16[100,4]       800 B
  model.layers.0..31                      32 x 3 leaves       5.9 kB
    model.layers.0..31.mlp                32 x 2 leaves       5.6 kB
      model.layers.0..31.mlp.down.weight  32 x float16[11,4]  2.8 kB
      model.layers.0..31.mlp.up.weight    32 x float16[4,11]  2.8 kB
    model.layers.0..31.norm.weight        32 x float16[4]      256 B
a\b                                       float32[1]             4 B
"""


def test_show_folds_the_layers_of_a_foreign_file(run: Run) -> None:
    save_file(foreign(), "torch.safetensors")
    code, out, err = run("show", "torch.safetensors")
    assert (code, err) == (0, "")
    assert out[out.index("\n\n") + 1 :] == FOREIGN


def mixed(number: int) -> int:
    """Another order of the 32-bit numbers."""
    return number * 2654435761 % 2**32


LARGE: dict[str, tuple[Callable[[int], str], range]] = {
    "alike": (lambda number: f"layers#{number // 10}@w{number % 10}x", range(1, 20)),
    "flat": (lambda number: f"@{mixed(number):08x}x", range(40, 70)),
    "deep": (
        lambda number: "@" + "@".join(f"{mixed(number):08o}"[:5]) + f"@{number}x",
        range(100, 220),
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_show_of_100_000_leaves_is_readable(kind: str) -> None:
    name_of, bounds = LARGE[kind]
    tensors = {name_of(number): np.zeros(number * 7 % 10, np.int8) for number in range(100_000)}
    assert len(tensors) == 100_000
    save_file(tensors, "large.safetensors")
    for columns in (80, 200):
        # A process of its own has no runtime type checks, which cost minutes here.
        with start("show", "large.safetensors", COLUMNS=str(columns)) as process:
            out, err = process.communicate()
        lines = out.decode().splitlines()
        assert (process.returncode, err) == (0, b"")
        assert "100,000" in lines[1]
        assert len(lines) in bounds
        assert max(map(len, lines)) <= columns
        is_whole = not any("..." in line for line in lines)
        assert is_whole == (kind == "alike")
        assert is_whole != lines[-1].startswith("Where it says ..., there is more")


def test_show_all_shows_every_leaf(run: Run) -> None:
    save_pytree([{"w": np.zeros(1, np.int8)}] * 300, "many.safetensors")
    _, folded, _ = run("show", "many.safetensors")
    assert "#0..299@w  300 x int8[1]  300 B" in folded
    _, out, _ = run("show", "--all", "many.safetensors")
    rows = out.splitlines()[5:]
    assert [row.split()[0] for row in rows] == [f"#{number}@w" for number in range(300)]


def test_show_of_a_prefix_shows_what_is_below_it(run: Run) -> None:
    save_pytree(small(), "small.safetensors")
    code, out, _ = run("show", "small.safetensors", "--prefix", "@opt")
    assert code == 0
    assert "@opt#3@mu" in out
    assert "@params" not in out
    code, out, err = run("show", "small.safetensors", "--prefix", "@nothing")
    assert (code, out) == (1, "")
    assert "has nothing at the prefix '@nothing'" in err


def test_names_that_are_shown_are_prefixes_to_load() -> None:
    file = io.BytesIO()
    save_pytree(small(), file)
    Path("small.safetensors").write_bytes(file.getvalue())
    summary = summarise_file("small.safetensors")
    rows = outline(summary.leaves, summary.nodes, everything=True)
    assert len(rows) == 27
    for row in rows:
        tree = load_pytree("small.safetensors", prefix=plain(row.name))
        assert len(jax.tree_util.tree_leaves(tree)) == row.leaves, row.name


def test_show_reads_the_header_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pytree({"w": np.ones(1_000_000), "step": 3}, "large.safetensors")
    ends: list[int] = []
    read_into = _Descriptor.read_into

    def recorded(self: _Descriptor, buffers: list[memoryview], offset: int) -> int:
        ends.append(offset + sum(map(len, buffers)))
        return read_into(self, buffers, offset)

    monkeypatch.setattr(_Descriptor, "read_into", recorded)
    assert run("show", "large.safetensors")[0] == 0
    assert ends
    assert max(ends) <= 1 << 16


def test_show_of_shards(run: Run) -> None:
    save_pytree([np.zeros(1000), np.ones(1000), np.ones(9)], "folder", max_shard_size=9000)
    _, out, _ = run("show", "folder")
    assert "on disk in 2 shards" in out
    assert "#1" in out
    assert run("diff", "folder", "folder/model.safetensors.index.json")[0] == 0
    assert run("verify", "folder")[0] == 0


def test_hostile_names_are_escaped(run: Run) -> None:
    names = ["\x1b[31m", "\u202eabc", "a\nb", " ", "", "'", "\u200b", "\x7f", "\x9b", "x" * 100_000]
    metadata = {"\x1b]0;": "\x1b[2J\u2066", "\n": "\r"}
    save_file({name: np.zeros(1) for name in names}, "hostile.safetensors", metadata)
    for command in ("show", "verify"):
        code, out, err = run(command, "hostile.safetensors")
        assert (code, err) == (0, "")
        assert all(character.isprintable() or character == "\n" for character in out)
        assert len(out) < 5000
    save_file({name: np.ones(1) for name in names}, "other.safetensors", {"\x1b": "\x07"})
    code, out, err = run("diff", "hostile.safetensors", "other.safetensors")
    assert code == 1
    assert all(character.isprintable() or character == "\n" for character in out + err)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("@a.b", "@a.b"),
        ("@a\\.b", "@a\\.b"),
        ("h\u00e9 \u05d0", "h\u00e9 \u05d0"),
        ("", "''"),
        (" a", "' a'"),
        ("'a'", "\"'a'\""),
        ("a\x1b", r"'a\x1b'"),
        ("\u202e", r"'\u202e'"),
    ],
)
def test_names_are_plain_or_literals(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
        (10**12, "1.0 TB"), (10**19, "10000.0 PB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


segments = st.builds(
    "{}{}{}".format,
    st.sampled_from([".", "@", "#", ".a", "@layer_", "@\\(", "x", ""]),
    st.integers(0, 30) | st.sampled_from(["", "07", "08", "09", "10"]),
    st.sampled_from(["", ")", "w", "\\"]),
)
names_of_leaves = st.lists(st.lists(segments, max_size=4).map("".join), unique=True, max_size=40)


@given(names_of_leaves)
@example(["", "a", "a.b", ".a", "x\\y", "x\\y.z", "a#1", "a#01"])
def test_an_outline_of_everything_has_each_leaf_once(names: list[str]) -> None:
    leaves = [Leaf(name, "array", "int8", (), 1) for name in names]
    rows = outline(leaves, {}, everything=True)
    assert sorted(row.name for row in rows if row.leaf is not None) == sorted(names)
    assert all(row.times == 1 and not row.left_out and not row.closed for row in rows)


@given(names_of_leaves, st.lists(st.integers(0, 1), min_size=40, max_size=40))
def test_an_outline_loses_no_leaf_and_no_byte(names: list[str], sizes: list[int]) -> None:
    leaves = [
        Leaf(n, "array", "int8", (size,), size) for n, size in zip(names, sizes, strict=False)
    ]
    rows = outline(leaves, {})
    assert sum(row.times for row in rows if row.leaf is not None) == len(leaves)
    own = [(row.times, row.leaf) for row in rows if row.leaf is not None]
    assert sum(times * leaf.nbytes for times, leaf in own) == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["#0", "#1", "#2"], ["#0..2"]),
        (["#0", "#1"], ["#0", "#1"]),
        (["#9", "#10", "#11"], ["#9..11"]),
        (["@w08", "@w09", "@w10"], ["@w08..10"]),
        (["@w8", "@w9", "@w010"], ["@w8", "@w9", "@w010"]),
        (["#0", "#1", "#2", "#4", "#6", "#7"], ["#0..2,4,6..7"]),
        ([f"#{number}" for number in range(0, 20, 2)], ["#0,2,4,..,18"]),
        (["@\\(1)", "@\\(2)", "@\\(3)"], ["@\\(1..3)"]),
        (["block_1_conv", "block_2_conv", "block_3_conv"], ["block_1..3_conv"]),
        (["l#0@a1", "l#1@a1", "l#2@a1"], ["l#0..2@a1"]),
    ],
)
def test_names_that_differ_in_a_number_are_folded(names: list[str], rows: list[str]) -> None:
    leaves = [Leaf(name, "array", "int8", (), 1) for name in names]
    assert [row.name for row in outline(leaves, {})] == rows


def test_what_differs_is_not_folded() -> None:
    leaves = [Leaf(f"#{number}", "array", "int8", (number % 2,), 1) for number in range(8)]
    assert [row.name for row in outline(leaves, {})] == ["#0,2,4,6", "#1,3,5,7"]
    strs = [Leaf(f"#{number}", "str", "", (), 0, value=str(number)) for number in range(3)]
    assert len(outline(strs, {})) == 3


def test_a_path_of_many_keys_has_one_row() -> None:
    name = "@a" * 20_000
    assert [row.name for row in outline([Leaf(name, "array", "int8", (), 1)], {})] == [name]


# --- diff -------------------------------------------------------------------------------------

DIFFERENT = """\
~ @big
      int 0x8000000000000000000000000 -> 0x4000000000000000000000000
~ @dtype        float32[3] -> bfloat16[3]
~ @key          key<threefry2x32>[] another key
~ @kind         int -> int32[]
~ @name         str 'adam' -> 'sgd'
+ @new          float32[4]                                                  16 B
- @old          float32[2]                                                   8 B
~ @scalar       float 1.0 -> 1.5
~ @shape        float32[3] -> float32[1,3]
~ @values       float32[2,2] 2 of 4 differ, by at most 2.5, 1 not finite
~ @weak         float32[] weak -> float32[]
~ @zero         float32[3] 1 of 3 differ, by at most 0
~ node @opt     tuple -> not noted
~ metadata run  '42' -> '43'
~ metadata tag  'x' -> absent

10 of 11 leaves in both differ; 1 only in the first, 1 only in the second; nodes 1, metadata 2.
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
    assert "... and 50 more, which --all lists" in out
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
    monkeypatch.setattr("pytree2safetensors._load.checkpoint._PIECE", 64)
    before = np.arange(1000, dtype=np.complex128)
    after = before.copy()
    after[[3, 500, 999]] += [1, 2j, 3]
    save_pytree({"x": before}, "a.safetensors", checksum=True)
    save_pytree({"x": after}, "b.safetensors", checksum=True)
    ((*_, values),) = compare_files("a.safetensors", "b.safetensors").leaves
    assert values == (1000, 3, 3.0, 0)
    assert run("verify", "a.safetensors")[0] == 0


def test_diff_of_nan_payloads_sees_them(run: Run) -> None:
    payloads = [
        np.frombuffer(bits, np.float64)[0] for bits in (b"\1" + b"\xff" * 7, b"\2" + b"\xff" * 7)
    ]
    for name, payload in zip("ab", payloads, strict=True):
        save_pytree({"array": payload, "float": float(payload)}, f"{name}.safetensors")
    code, out, _ = run("diff", "a.safetensors", "b.safetensors")
    assert code == 1
    assert "float64[] 1 of 1 differ, 1 not finite" in out
    assert "float nan (bits ffffffffffffff01) -> nan (bits ffffffffffffff02)" in out


# --- verify -----------------------------------------------------------------------------------


def test_verify_says_when_all_is_well(run: Run) -> None:
    save_pytree(small(), "small.safetensors", checksum=True)
    code, out, err = run("verify", "small.safetensors")
    assert (code, err) == (0, "")
    assert out == (
        "small.safetensors: sound\nread      14 tensors, 4.3 kB\n"
        "digests   one for each tensor, and all match\n"
    )


def test_verify_says_when_there_are_no_digests(run: Run) -> None:
    save_pytree({"w": 1}, "w.safetensors")
    _, out, _ = run("verify", "w.safetensors")
    assert out == (
        "w.safetensors: sound\nread      1 tensor, 8 B\n"
        "digests   none, so changed values cannot be told; checksum=True saves them\n"
    )


def test_verify_finds_every_flipped_bit_of_the_data() -> None:
    file = io.BytesIO()
    save_pytree(
        {"w": np.arange(3, dtype=np.int16), "v": 1.5, "i": jnp.int4(3)}, file, checksum=True
    )
    content = file.getvalue()
    start = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - start == 15
    for bit in range(8 * start, 8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        Path("flipped.safetensors").write_bytes(damaged)
        verdict = verify_file("flipped.safetensors")
        assert len(verdict.problems) == 1, bit
        assert "'@" in verdict.problems[0]


def test_verify_names_what_is_broken(run: Run) -> None:
    save_pytree({"w": np.zeros(3), "v": np.zeros(2)}, "w.safetensors", checksum=True)
    path = Path("w.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x07")
    code, out, err = run("verify", "w.safetensors")
    assert code == 1
    assert out.startswith("w.safetensors: broken\nread ")
    assert err == (
        "pytree2safetensors: w.safetensors is broken: "
        "'@w' does not match its digest: its data are damaged\n"
    )
    path.write_bytes(content[:-40] + b"\x07" * 40)
    assert run("verify", "w.safetensors")[2] == (
        "pytree2safetensors: w.safetensors is broken: 2 problems\n"
    )


def test_verify_of_names_that_make_no_tree_is_no_error(run: Run) -> None:
    save_file({"a": np.zeros(1), "a.b": np.zeros(1)}, "foreign.safetensors")
    code, out, err = run("verify", "foreign.safetensors", columns=200)
    assert (code, err) == (0, "")
    assert "remark    it loads only into a template: 'a' and 'a.b' name a leaf and a node" in out


def test_verify_finds_no_damage_in_what_needs_a_template(run: Run) -> None:
    array = np.ones(3, np.float32)
    for tree in (
        Keyed({"b": None, "@c": {}, "#0": array}),
        Keyed({"b": None, "@c": None, "#0": None}),
        Keyed({r"#\(1)": None}),
        Keyed({r"@\(1)": None, "@a": None}),
        Keyed({r"@\(1)": None, r"@\(True)": ()}),
        Keyed({"#2000000000": None}),
    ):
        save_pytree(tree, "own.safetensors")
        load_into_pytree(tree, "own.safetensors")
        code, out, err = run("verify", "own.safetensors", columns=200)
        assert (code, err) == (0, "")
        assert "remark    it loads only into a template: " in out


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_verify_finds_a_key_whose_data_are_none(shape: tuple[int, ...], run: Run) -> None:
    note = {"version": 1, "leaves": {"@a": ["key", "threefry2x32"]}}
    save_file(
        {"@a": np.zeros(shape, np.uint32)},
        "w.safetensors",
        {"pytree2safetensors": json.dumps(note)},
    )
    code, _, err = run("verify", "w.safetensors")
    assert code == 1
    assert "'@a' is noted as a key of threefry2x32, whose data end in the shape [2]" in err


def test_verify_finds_a_note_that_contradicts_the_names(run: Run) -> None:
    note = json.dumps({"version": 1, "nodes": {"@a": "tuple"}})
    save_file({"@a@b": np.zeros(1)}, "w.safetensors", {"pytree2safetensors": note})
    code, _, err = run("verify", "w.safetensors")
    assert code == 1
    assert "the note of 'w.safetensors' contradicts its tensors" in err


def test_packed_dtypes_are_shown_and_compared_as_they_are_stored(run: Run) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    for name, data in (("a", b"\1\2"), ("b", b"\1\3")):
        Path(f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "F4[4]" in run("show", "a.safetensors")[1]
    assert "F4[4] 1 of 2 differ" in run("diff", "a.safetensors", "b.safetensors")[1]
    code, out, _ = run("verify", "a.safetensors", columns=200)
    assert code == 0
    assert "remark    'x' is of the packed dtype F4" in out


# --- JSON -------------------------------------------------------------------------------------


def strictly(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_options_may_stand_before_a_file_alone(run: Run) -> None:
    save_pytree(small(), "tree")
    assert run("--json", "tree") == run("show", "tree", "--json")
    assert run("--all", "--prefix", "", "tree") == run("show", "tree", "--all")


def test_show_json(run: Run) -> None:
    save_pytree(
        {"w": jnp.zeros((2, 3), jnp.bfloat16), "k": jax.random.key(0), "s": "\x1b", "n": (1,)},
        "w.safetensors",
        metadata={"run": "42"},
    )
    code, out, err = run("show", "--json", "w.safetensors")
    assert (code, err) == (0, "")
    assert out.isascii()
    assert strictly(out) == {
        "file": "w.safetensors",
        "files": 1,
        "file_bytes": Path("w.safetensors").stat().st_size,
        "tensor_bytes": 28,
        "digests": False,
        "metadata": {"format": "flax", "run": "42"},
        "nodes": {"@n": "tuple"},
        "leaves": [
            {
                "name": "@k",
                "kind": "key",
                "dtype": "threefry2x32",
                "shape": [],
                "weak": False,
                "bytes": 8,
            },
            {"name": "@n#0", "kind": "int", "bytes": 8},
            {"name": "@s", "kind": "str", "bytes": 0, "value": "\x1b"},
            {
                "name": "@w",
                "kind": "array",
                "dtype": "bfloat16",
                "shape": [2, 3],
                "weak": False,
                "bytes": 12,
            },
        ],
    }


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
                "before": {"name": "@s", "kind": "float", "bytes": 8},
                "after": None,
                "values": None,
            },
            {
                "name": "@t",
                "differs": ["added"],
                "before": None,
                "after": {"name": "@t", "kind": "int", "bytes": 8},
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


def test_verify_json(run: Run) -> None:
    save_pytree({"w": np.zeros(3)}, "w.safetensors", checksum=True)
    code, out, _ = run("verify", "--json", "w.safetensors")
    assert code == 0
    assert strictly(out) == {
        "file": "w.safetensors",
        "sound": True,
        "opened": True,
        "tensors": 1,
        "nbytes": 24,
        "digests": True,
        "problems": [],
        "remarks": [],
    }
    Path("w.safetensors").write_bytes(b"\0" * 9)
    code, out, err = run("verify", "--json", "w.safetensors")
    assert code == 1
    assert (strictly(out)["sound"], strictly(out)["opened"]) == (False, False)
    assert err == f"pytree2safetensors: w.safetensors is broken: {strictly(out)['problems'][0]}\n"


# --- how it ends ------------------------------------------------------------------------------


def pickled() -> bytes:
    return pickle.dumps(list(range(1000)))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


@pytest.mark.parametrize("command", ["show", "diff", "verify"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "file: No such file or directory"),
        (b"", "'file' has 0 bytes and is no safetensors file"),
        (pickled(), "(it looks like a pickle)"),
        (zipped(), "(it looks like a zip archive)"),
        (b"\x10" + b"\0" * 7 + b"{}", "'file' is cut short"),
        (b"\2" + b"\0" * 7 + b"[]", "'file' is no safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_gets_one_line(
    run: Run, command: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        Path("file").write_bytes(content)
    code, _, err = run(command, "file", *(["file"] if command == "diff" else []))
    assert code == 1
    assert said in err
    assert err.startswith("pytree2safetensors: ")
    assert err.count("\n") == 1
    assert len(err) < 300


def test_a_folder_without_files_gets_one_line(run: Run) -> None:
    Path("folder").mkdir()
    code, out, err = run("show", "folder")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'folder'" in err


def test_a_file_name_of_control_characters_is_escaped(run: Run) -> None:
    code, _, err = run("show", "a\x1b\nb")
    assert (code, err) == (1, "pytree2safetensors: 'a\\x1b\\nb': No such file or directory\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["show"], ["diff", "a"], ["verify"], ["show", "a", "b"], ["a", "b"], ["--json"],
        ["diff", "a", "b", "--prefix", "c"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(run: Run, arguments: Sequence[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pytree2safetensors ")


def test_an_interrupt_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pytree2safetensors._cli.main.verify_file", interrupt)
    assert run("verify", "file") == (130, "", "")


def test_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_pytree({f"{number}x": np.zeros(1, np.int8) for number in range(20_000)}, path)
    with start("show", "--all", str(path)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_screen_without_unicode_shows_escapes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_pytree({"h\u00e9": np.zeros(1, np.int8)}, path)
    with start("show", str(path), PYTHONIOENCODING="ascii", NO_COLOR="", TERM="xterm") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"@h\\xe9" in out
    assert b"\x1b" not in out


def test_a_damaged_header_gets_one_line_whatever_the_damage(run: Run) -> None:
    save_pytree(small(), "whole.safetensors")
    content = Path("whole.safetensors").read_bytes()
    length = len(content[: 8 + int.from_bytes(content[:8], "little")].rstrip())
    codes = set()
    for place in range(0, length, 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        Path("damaged.safetensors").write_bytes(damaged)
        for arguments in (
            ["show"],
            ["show", "--all", "--json"],
            ["verify"],
            ["diff", "whole.safetensors"],
        ):
            code, _, err = run(*arguments, "damaged.safetensors")
            assert code in {0, 1}
            assert err.count("\n") == code
            codes.add((arguments[0], code))
    assert codes >= {("show", 0), ("show", 1), ("verify", 0), ("verify", 1), ("diff", 1)}


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)])
def test_closed_streams_are_no_error(closed: str, code: int) -> None:
    save_pytree({"a": 1}, "tree")
    for file, expected in (("tree", code), ("missing", 1)):
        command = f"{sys.executable} -m pytree2safetensors show {file} {closed}"
        run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert run.returncode == expected
        assert "Traceback" not in run.stderr


def test_a_leaf_that_is_a_node_too_has_its_own_size(run: Run) -> None:
    save_file({"w": np.zeros(2, np.float32), "w.scale": np.zeros(4, np.float32)}, "both")
    _, out, _ = run("show", "both")
    assert re.search(r"^w +float32\[2\] +8 B$", out, re.MULTILINE)


def test_diff_tells_keys_of_unknown_implementations_apart(run: Run) -> None:
    for name in ("one", "two"):
        note = {"version": 1, "nodes": {}, "leaves": {"@k": ["key", name]}}
        save_file({"@k": np.zeros(2, np.uint32)}, name, {"pytree2safetensors": json.dumps(note)})
    code, out, _ = run("diff", "one", "two")
    assert code == 1
    assert "key one" in out
    assert "key two" in out

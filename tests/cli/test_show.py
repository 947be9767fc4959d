"""`show`: its screens, its JSON, and what it reads."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from command import Run, small, start, strictly
from pytree2safetensors import save_pytree
from pytree2safetensors._storage.file_source import FileSource

pytestmark = pytest.mark.usefixtures("own_folder")

HEAD = """\
small.safetensors
contents  16 leaves with 1,092 parameters
size      4.3 kB of tensors, in a file of 5.8 kB
types     5 float32, 4 bfloat16, 2 int, 2 float, 1 key<threefry2x32>, 1 str,
          1 float16
metadata  format: 'flax'
          run: '42'

"""

ROWS = r"""
name            type                   params    size
@a\.b           int = 0x8000000000000000000000000
@key            key<threefry2x32>[]               8 B
@name           str = 'a name that is too long to stand'... (75 characters)
@opt            tuple, 3 leaves             3    28 B
  #0            empty tuple
  #1            None
  #2            tuple, 1 leaf               3    12 B
    #0          float32[3]                  3    12 B
  #3            OrderedDict, 2 leaves            16 B
    @mu         float = 1.0                       8 B
    @nu         float = 2.0                       8 B
@params         9 leaves                 1.1k  4.2 kB
  .layers#0..3  4 x 2 leaves             1.1k  4.2 kB
    @b          4 x bfloat16[16]           64   128 B
    @w          4 x float32[16,16]       1.0k  4.1 kB
  .scale        float16[] = 1.0             1     2 B
@step           int = 7                           8 B
"""

PATHS = r"""
name                       type                   params    size
@a\.b                      int = 0x8000000000000000000000000
@key                       key<threefry2x32>[]               8 B
@name
      str = 'a name that is too long to stand'... (75 characters)
@opt                       tuple, 3 leaves             3    28 B
  @opt#0                   empty tuple
  @opt#1                   None
  @opt#2                   tuple, 1 leaf               3    12 B
    @opt#2#0               float32[3]                  3    12 B
  @opt#3                   OrderedDict, 2 leaves            16 B
    @opt#3@mu              float = 1.0                       8 B
    @opt#3@nu              float = 2.0                       8 B
@params                    9 leaves                 1.1k  4.2 kB
  @params.layers#0..3      4 x 2 leaves             1.1k  4.2 kB
    @params.layers#0..3@b  4 x bfloat16[16]           64   128 B
    @params.layers#0..3@w  4 x float32[16,16]       1.0k  4.1 kB
  @params.scale            float16[] = 1.0             1     2 B
@step                      int = 7                           8 B
"""

NARROW = r"""
name         type         params    size
@a\.b
      int = 0x8000000000000000000000000
@key
      key<threefry2x32>[]             8 B
@name
      str = 'a name that is too long to stand'... (75 characters)
@opt
      tuple, 3 leaves          3    28 B
  #0         empty tuple
  #1         None
  #2
      tuple, 1 leaf            3    12 B
    #0       float32[3]        3    12 B
"""


def table_of(screen: str) -> str:
    """The rows of a screen, after the empty line below its head."""
    return screen[screen.index("\n\n") + 1 :]


def test_values_of_wide_characters_fit_the_screen(run: Run) -> None:
    wide = "\u6f22"  # takes two columns
    save_pytree([wide * 40, "ab" + wide * 40], "wide.safetensors")
    _, out, _ = run("show", "wide.safetensors", "--all")
    assert table_of(out).splitlines()[2:] == [
        f"#0    str = '{wide * 16}'... (40 characters)",
        f"#1    str = 'ab{wide * 15}'... (42 characters)",
    ]


@pytest.mark.parametrize("character", ["\u200b", "\n", "\U000e0001"])
def test_values_of_escaped_characters_fit_the_screen(run: Run, character: str) -> None:
    escaped = repr(character)[1:-1]
    save_pytree([character * 100], "escaped.safetensors")
    _, out, _ = run("show", "escaped.safetensors", "--all")
    text = escaped * (32 // len(escaped))
    assert table_of(out).splitlines()[2:] == [f"#0    str = '{text}'... (100 characters)"]


def test_show_prints_a_small_tree(run: Run) -> None:
    save_pytree(small(), "small.safetensors", metadata={"run": "42"})
    assert run("show", "small.safetensors") == (0, HEAD + ROWS[1:], "")


def test_show_fits_any_screen(run: Run) -> None:
    save_pytree(small(), "small.safetensors", metadata={"run": "42"})
    _, out, _ = run("show", "small.safetensors", columns=200)
    assert table_of(out) == ROWS
    _, out, _ = run("show", "small.safetensors", columns=40)
    assert table_of(out).startswith(NARROW)


def test_show_paths_prints_whole_key_paths(run: Run) -> None:
    save_pytree(small(), "small.safetensors")
    _, out, _ = run("show", "--paths", "small.safetensors")
    assert table_of(out) == PATHS


def test_show_of_several_files_goes_on_after_one_that_is_missing(run: Run) -> None:
    save_pytree({"a": 1}, "a.safetensors")
    save_pytree({"b": 2}, "b.safetensors")
    first, second = run("a.safetensors")[1], run("b.safetensors")[1]
    code, out, err = run("show", "a.safetensors", "missing", "b.safetensors")
    assert (code, out) == (1, f"{first}\n{second}")
    assert err == "pytree2safetensors: missing: No such file or directory\n"
    code, out, _ = run("--json", "a.safetensors", "b.safetensors")
    assert code == 0
    assert [strictly(line)["file"] for line in out.splitlines()] == [
        "a.safetensors",
        "b.safetensors",
    ]


VALUES: list[tuple[Any, str]] = [
    (7, "int = 7"),
    (-1.5e-7, "float = -1.5e-07"),
    (True, "bool = True"),
    (1 - 2j, "complex = (1-2j)"),
    ("adam", "str = 'adam'"),
    ("\x1b", "str = '\\x1b'"),
    (jnp.asarray(3), "int32[] weak = 3"),
    (np.float64(0.1), "float64[] = 0.1"),
    (jnp.bfloat16(2), "bfloat16[] = 2"),
    (jnp.int4(-3), "int4[] = -3"),
    (np.bool_(False), "bool[] = False"),
    (10**40, "int = 0x1d6329f1c35ca4bfabb9f561000000... (36 characters)"),
]


@pytest.mark.parametrize(("leaf", "text"), VALUES, ids=[text for _, text in VALUES])
def test_show_prints_the_value_of_a_leaf_that_has_one(leaf: Any, text: str, run: Run) -> None:
    save_pytree({"x": leaf}, "x.safetensors")
    row = run("x.safetensors")[1].splitlines()[-1]
    assert " ".join(row.split()).startswith(f"@x {text}")


def test_show_leaves_out_a_value_that_it_cannot_read(run: Run) -> None:
    save_pytree({"x": jnp.int4(-3)}, "x.safetensors")
    content = Path("x.safetensors").read_bytes()
    Path("x.safetensors").write_bytes(content[:-1] + b"\x7f")
    code, out, _ = run("x.safetensors")
    assert code == 0
    assert out.splitlines()[-1].split() == ["@x", "int4[]", "1", "1", "B"]


def test_a_file_without_a_command_is_shown(run: Run) -> None:
    save_pytree(small(), "small.safetensors")
    assert run("small.safetensors") == run("show", "small.safetensors")


def foreign() -> dict[str, np.ndarray[Any, Any]]:
    """What PyTorch's users save, and a name that is not a key path."""
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
name                type                params    size
model               97 leaves             3.3k  6.7 kB
  .embed.weight     float16[100,4]         400   800 B
  .layers.0..31     32 x 3 leaves         2.9k  5.9 kB
    .mlp            32 x 2 leaves         2.8k  5.6 kB
      .down.weight  32 x float16[11,4]    1.4k  2.8 kB
      .up.weight    32 x float16[4,11]    1.4k  2.8 kB
    .norm.weight    32 x float16[4]        128   256 B
a\b                 float32[1]               1     4 B
"""


def test_show_folds_the_layers_of_a_foreign_file(run: Run) -> None:
    save_file(foreign(), "torch.safetensors")
    code, out, err = run("show", "torch.safetensors")
    assert (code, err) == (0, "")
    assert table_of(out) == FOREIGN


def test_show_orders_foreign_names_by_their_numbers(run: Run) -> None:
    names = [f"blocks.{number}.{kind}" for number in (0, 1, 2, 10) for kind in "ab"]
    tensors = {name: np.zeros(len(name) * 7 + place) for place, name in enumerate(names)}
    save_file(tensors, "torch.safetensors")
    _, out, _ = run("show", "torch.safetensors")
    rows = [row.split()[0] for row in table_of(out).splitlines()[2:]]
    assert rows == [
        "blocks",
        ".0",
        ".a",
        ".b",
        ".1",
        ".a",
        ".b",
        ".2",
        ".a",
        ".b",
        ".10",
        ".a",
        ".b",
    ]


def mixed(number: int) -> int:
    """Another order of the 32-bit numbers."""
    return number * 2654435761 % 2**32


LARGE: dict[str, tuple[Callable[[int], str], range]] = {
    "alike": (lambda number: f"layers#{number // 10}@w{number % 10}x", range(1, 20)),
    "flat": (lambda number: f"@{mixed(number):08x}x", range(200, 220)),
    "deep": (
        lambda number: "@" + "@".join(f"{mixed(number):08o}"[:5]) + f"@{number}x",
        range(60, 220),
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
        hint = "--prefix NAME shows a part, --all everything"
        assert lines[-1].endswith(hint) == (kind != "alike")


def test_show_all_shows_every_leaf(run: Run) -> None:
    save_pytree([{"w": np.zeros(1, np.int8)}] * 300, "many.safetensors")
    _, folded, _ = run("show", "many.safetensors")
    assert "#0..299@w  300 x int8[1]     300  300 B" in folded
    _, out, _ = run("show", "--all", "many.safetensors")
    rows = table_of(out).splitlines()[2:]
    assert [row.split()[0] for row in rows] == [f"#{number}@w" for number in range(300)]


def test_show_of_a_prefix_shows_what_is_below_it(run: Run) -> None:
    save_pytree(small(), "small.safetensors")
    code, out, _ = run("show", "small.safetensors", "--prefix", "@opt")
    assert code == 0
    rows = [row.split()[0] for row in table_of(out).splitlines()[2:]]
    assert rows == ["@opt", "#0", "#1", "#2", "#0", "#3", "@mu", "@nu"]
    assert "\ncontents  3 leaves with 3 parameters\n" in out
    code, out, err = run("show", "small.safetensors", "--prefix", "@nothing")
    assert (code, out) == (1, "")
    assert "has nothing at the prefix '@nothing'" in err


def test_show_reads_the_header_and_the_small_values(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree({"w": np.ones(1_000_000), "step": 3}, "large.safetensors")
    reads: list[tuple[int, int]] = []
    read_into = FileSource.read_into

    def recorded(self: FileSource, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, sum(map(len, buffers))))
        return read_into(self, buffers, offset)

    monkeypatch.setattr(FileSource, "read_into", recorded)
    assert run("show", "large.safetensors")[0] == 0
    assert [offset for offset, length in reads if length > 8] == [0]
    assert max(length for _, length in reads) <= 1 << 16
    assert sum(length == 8 for _, length in reads) == 1  # the step


def test_show_of_shards(run: Run) -> None:
    save_pytree([np.zeros(1000), np.ones(1000), np.ones(9)], "folder", max_shard_size=9000)
    _, out, _ = run("show", "folder")
    assert "\nsize      16.1 kB of tensors, in 2 shards of " in out
    assert "#1" in out
    assert run("diff", "folder", "folder/model.safetensors.index.json")[0] == 0
    assert run("verify", "folder")[0] == 0


def test_a_leaf_that_is_a_node_too_has_its_own_size(run: Run) -> None:
    save_file({"w": np.zeros(2, np.float32), "w.scale": np.zeros(4, np.float32)}, "both")
    _, out, _ = run("show", "both")
    assert re.search(r"^w +float32\[2\] +2 +8 B$", out, re.MULTILINE)


def test_packed_dtypes_are_shown_and_compared_as_they_are_stored(run: Run) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    for name, data in (("a", b"\1\2"), ("b", b"\1\3")):
        Path(f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "F4[4]" in run("show", "a.safetensors")[1]
    assert "F4[4] 1 of 2 differ" in run("diff", "a.safetensors", "b.safetensors")[1]
    code, out, _ = run("verify", "a.safetensors", columns=200)
    assert code == 0
    assert "remark    'x' is of the packed dtype F4" in out


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
        "parameters": 6,
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
            {"name": "@n#0", "kind": "int", "bytes": 8, "value": "1"},
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


def test_values_in_json_can_be_read(run: Run) -> None:
    nan, payload = math.nan, np.frombuffer(b"\1" + b"\xff" * 7, np.float64)[0]
    values: dict[str, Any] = {
        "small": -5, "large": 2**80, "largest": 10**4299, "negative": -(2**80),
        "nan": nan, "payload": payload, "inf": -math.inf, "complex": complex(nan, 1),
        "array": np.complex64(complex(1, nan)), "text": "nan", "truth": False,
    }  # fmt: skip
    save_pytree(values, "values.safetensors")
    code, out, _ = run("show", "--json", "values.safetensors")
    assert code == 0
    found = {leaf["name"].removeprefix("@"): leaf for leaf in strictly(out)["leaves"]}
    for name, value in values.items():
        assert found[name]["value"] == str(value)
        if name not in {"text", "truth"}:
            assert repr(type(value)(found[name]["value"])) == repr(value)
    assert {name: leaf["bits"] for name, leaf in found.items() if "bits" in leaf} == {
        "nan": "7ff8000000000000",
        "payload": "ffffffffffffff01",
        "complex": "3ff00000000000007ff8000000000000",
        "array": "7fc000003f800000",
    }


def test_values_of_too_many_digits_are_hexadecimal_in_json(run: Run) -> None:
    save_pytree(1 << 20_000, "large.safetensors")
    (leaf,) = strictly(run("show", "--json", "large.safetensors")[1])["leaves"]
    assert leaf["value"].startswith("0x1000")
    assert int(leaf["value"], 0) == 1 << 20_000


def test_show_leaves_out_rows_and_says_so(run: Run) -> None:
    leaves = {f"{number:03}x": np.zeros(number, np.int8) for number in range(300)}
    save_pytree(leaves, "flat.safetensors")
    save_pytree(dict.fromkeys("cd", leaves), "deep.safetensors")
    lines = run("show", "flat.safetensors")[1].splitlines()
    assert len(table_of("\n".join(lines)).splitlines()) == 1 + 1 + 200 + 2
    assert lines[-1] == "100 rows are left out; --prefix NAME shows a part, --all everything"
    assert table_of(run("show", "deep.safetensors")[1]) == (
        "\nname  type            params     size\n"
        "@c    300 leaves ...   44.9k  44.9 kB\n"
        "@d    300 leaves ...   44.9k  44.9 kB\n"
        "\n... has more below; --prefix NAME shows a part, --all everything\n"
    )


def test_show_says_that_there_are_digests(run: Run) -> None:
    save_pytree({"x": 1}, "x.safetensors", checksum=True)
    _, out, _ = run("show", "x.safetensors")
    assert "\ndigests   one for each tensor; verify checks them\n" in out


def test_show_prints_twenty_metadata_entries(run: Run) -> None:
    metadata = {f"entry{number:02}": "x" * 2000 * (number == 3) for number in range(30)}
    save_pytree({}, "x.safetensors", metadata=metadata)
    _, out, _ = run("show", "x.safetensors")
    assert "\n          entry19: ''\n          ... and 11 more in --json\n" in out
    assert "entry20" not in out
    assert "(2,000 characters)" in " ".join(out.split())

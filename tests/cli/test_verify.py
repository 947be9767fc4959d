"""`verify`: what is damaged, and what is not."""

import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from command import Run, small, strictly
from pytree2safetensors import FileFormatError, load_into_pytree, load_pytree, save_pytree
from pytree2safetensors._cli.verify import verify_file
from pytree2safetensors._storage.file_source import FileSource
from pytree2safetensors.testing._nodes import Keyed

pytestmark = pytest.mark.usefixtures("own_folder")


def test_verify_says_when_all_is_well(run: Run) -> None:
    save_pytree(small(), "small.safetensors", checksum=True)
    code, out, err = run("verify", "small.safetensors")
    assert (code, err) == (0, "")
    assert out == (
        "small.safetensors: sound\nread      14 tensors, 4.3 kB\n"
        "digests   one for each tensor; all match\n"
    )


def test_verify_says_when_there_are_no_digests(run: Run) -> None:
    save_pytree({"w": 1}, "w.safetensors")
    _, out, _ = run("verify", "w.safetensors")
    assert out == (
        "w.safetensors: sound\nread      1 tensor, 8 B\n"
        "digests   none, so changed values go unnoticed; checksum=True saves digests\n"
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
    assert out.startswith("w.safetensors: damaged\nread ")
    assert err == (
        "pytree2safetensors: w.safetensors is damaged: "
        "'@w' does not match its digest: its data is damaged\n"
    )
    path.write_bytes(content[:-40] + b"\x07" * 40)
    assert run("verify", "w.safetensors")[2] == (
        "pytree2safetensors: w.safetensors is damaged: 2 problems\n"
    )


def test_a_damaged_shard_is_named(run: Run) -> None:
    tree = {"a": np.zeros(3), "b": np.zeros(3), "c": np.zeros(100_000)}
    save_pytree(tree, "folder", checksum=True, max_shard_size=24)
    for number, name in ((1, "@c"), (3, "@b")):
        shard = Path("folder", f"model-{number:05}-of-00003.safetensors")
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + b"\x07")
        problem = f"{name!r} in {str(shard)!r} does not match its digest: its data is damaged"
        code, _, err = run("verify", "folder")
        assert (code, err) == (1, f"pytree2safetensors: folder is damaged: {problem}\n")
        with pytest.raises(FileFormatError) as caught:
            load_pytree("folder")
        assert str(caught.value) == f"{problem}; restore the file from a copy"
        with pytest.raises(FileFormatError) as caught:
            load_into_pytree(tree, "folder")
        assert str(caught.value) == f"{problem}; restore the file from a copy"
        shard.write_bytes(content)


def test_a_folder_that_is_no_checkpoint_is_not_damaged(run: Run) -> None:
    Path("empty").mkdir()
    Path("two").mkdir()
    for name in "ab":
        save_pytree({"a": 1}, f"two/{name}.safetensors")
    Path("unfinished").mkdir()
    save_pytree({"a": 1}, "unfinished/model-00001-of-00002.safetensors")
    for folder, said in {
        "empty": "the folder 'empty' has no safetensors file and no index",
        "two": "the folder 'two' has 'a.safetensors', 'b.safetensors'; pass the path of the one to "
        "load",
        "unfinished": "the folder 'unfinished' has 'model-00001-of-00002.safetensors' but no index: a "
        "save was interrupted or is in progress, or the index was not copied; save or copy the folder "
        "again",
    }.items():
        assert run("verify", folder) == (1, "", f"pytree2safetensors: {said}\n")
        code, out, _ = run("verify", "--json", folder)
        assert (code, strictly(out)) == (1, {"file": folder, "error": said})


def test_a_folder_of_a_store_that_is_no_checkpoint_is_not_damaged(run: Run) -> None:
    pytest.importorskip("fsspec")
    for name in "ab":
        save_pytree({"a": 1}, f"memory://verify/two/{name}.safetensors")
    code, out, err = run("verify", "memory://verify/two")
    assert (code, out) == (1, "")
    assert err.endswith("; pass the path of the one to load\n")


def test_verify_of_names_that_make_no_tree_is_no_error(run: Run) -> None:
    save_file({"a": np.zeros(1), "a.b": np.zeros(1)}, "foreign.safetensors")
    code, out, err = run("verify", "foreign.safetensors", columns=200)
    assert (code, err) == (0, "")
    assert (
        "remark    loads only into a template, because 'a' and 'a.b' name a leaf and a node" in out
    )


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
        assert "remark    loads only into a template, because " in out


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_verify_finds_a_key_whose_data_have_another_shape(shape: tuple[int, ...], run: Run) -> None:
    note = {"version": 1, "leaves": {"@a": ["key", "threefry2x32"]}}
    save_file(
        {"@a": np.zeros(shape, np.uint32)},
        "w.safetensors",
        {"pytree2safetensors": json.dumps(note)},
    )
    code, _, err = run("verify", "w.safetensors")
    assert code == 1
    assert "'@a' is noted as a key of threefry2x32, whose data must end in the shape [2]" in err


def test_verify_finds_a_note_that_contradicts_the_names(run: Run) -> None:
    note = json.dumps({"version": 1, "nodes": {"@a": "tuple"}})
    save_file({"@a@b": np.zeros(1)}, "w.safetensors", {"pytree2safetensors": note})
    code, _, err = run("verify", "w.safetensors")
    assert code == 1
    assert "the note of 'w.safetensors' contradicts its tensors" in err


def test_verify_does_not_call_a_newer_file_damaged(run: Run) -> None:
    save_file({"a": np.zeros(1)}, "w.safetensors", {"pytree2safetensors": '{"version": 2}'})
    code, out, err = run("verify", "w.safetensors")
    assert (code, out) == (1, "")
    assert err.endswith("knows only version 1; install a newer pytree2safetensors\n")
    _, out, _ = run("verify", "--json", "w.safetensors")
    assert strictly(out).keys() == {"file", "error"}


def test_verify_does_not_call_a_file_damaged_that_is_truncated_meanwhile(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree(small(), "w.safetensors")
    monkeypatch.setattr(FileSource, "read_into", lambda *_: 0)
    said = "'w.safetensors' was truncated while it was read"
    assert run("verify", "w.safetensors") == (1, "", f"pytree2safetensors: {said}\n")


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
    assert err == f"pytree2safetensors: w.safetensors is damaged: {strictly(out)['problems'][0]}\n"


def test_verify_lists_a_hundred_problems_unless_asked(run: Run) -> None:
    save_pytree([np.ones(1, np.int8)] * 150, "x.safetensors", checksum=True)
    content = Path("x.safetensors").read_bytes()
    Path("x.safetensors").write_bytes(content[:-150] + bytes(150))
    code, out, err = run("verify", "x.safetensors")
    assert code == 1
    assert out.endswith("\n          ... and 50 more; --all lists them\n")
    assert err == "pytree2safetensors: x.safetensors is damaged: 150 problems\n"
    assert len(run("verify", "--all", "x.safetensors")[1].splitlines()) == 3 + 150

"""The command: its arguments, its exit codes, and how it ends."""

import errno
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from command import Run, small, start, strictly
from pytree2safetensors import save_pytree
from versions import posix

pytestmark = pytest.mark.usefixtures("own_folder")


def test_options_may_precede_a_file_without_a_command(run: Run) -> None:
    save_pytree(small(), "tree")
    assert run("--json", "tree") == run("show", "tree", "--json")
    assert run("--all", "--prefix", "", "tree") == run("show", "tree", "--all")


@pytest.mark.parametrize("arguments", [["-h"], ["show", "-h"], ["--version"], ["show"]])
def test_what_needs_no_file_needs_no_jax(arguments: list[str]) -> None:
    script = """
import sys
from pytree2safetensors.__main__ import main
try:
    main(sys.argv[1:])
finally:
    assert "pytree2safetensors" in sys.modules
    sys.exit(100 if "jax" in sys.modules or "numpy" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True)


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
        (b"", "'file' has 0 bytes and is not a safetensors file"),
        (pickled(), "(it looks like a pickle)"),
        (zipped(), "(it looks like a zip archive)"),
        (b"\x10" + b"\0" * 7 + b"{}", "'file' is truncated"),
        (b"\2" + b"\0" * 7 + b"[]", "'file' is not a safetensors file"),
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


def test_a_url_that_cannot_be_opened_gets_one_line(run: Run) -> None:
    code, out, err = run("show", "no-such-store://bucket/file")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'no-such-store://bucket/file' cannot be opened with fsspec" in err


def test_an_empty_file_name_is_shown(run: Run) -> None:
    code, _, err = run("show", "")
    assert (code, err) == (1, "pytree2safetensors: '': No such file or directory\n")


def test_a_file_name_of_control_characters_is_escaped(run: Run) -> None:
    code, _, err = run("show", "a\x1b\nb")
    # Windows has no such names.
    reason = os.strerror(errno.EINVAL if os.name == "nt" else errno.ENOENT)
    assert (code, err) == (1, f"pytree2safetensors: 'a\\x1b\\nb': {reason}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["show"], ["diff", "a"], ["verify"], ["--json"], ["diff", "a", "b", "c"],
        ["diff", "a", "b", "--prefix", "c"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(run: Run, arguments: Sequence[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pytree2safetensors ")


@pytest.mark.parametrize("command", ["show", "diff", "verify"])
def test_unknown_options_get_the_usage_of_the_command(run: Run, command: str) -> None:
    code, out, err = run(command, "a", *(["b"] if command == "diff" else []), "--bogus")
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: pytree2safetensors {command} ")
    assert err.endswith(f"pytree2safetensors {command}: error: unrecognized arguments: --bogus\n")


@pytest.mark.parametrize("command", ["show", "verify"])
def test_nothing_is_printed_for_a_file_that_cannot_be_read(run: Run, command: str) -> None:
    save_pytree({"a": 1}, "tree")
    alone = run(command, "tree")[1]
    assert run(command, "missing", "tree", "missing", "tree")[:2] == (1, f"{alone}\n{alone}")


def test_json_has_an_object_for_each_file_that_cannot_be_read(run: Run) -> None:
    save_pytree({"a": 1}, "tree")
    said = "missing: No such file or directory"
    for command in ("show", "verify"):
        code, out, err = run(command, "--json", "missing", "tree")
        assert (code, err) == (1, f"pytree2safetensors: {said}\n")
        first, second = map(strictly, out.splitlines())
        assert first == {"file": "missing", "error": said}
        assert second["file"] == "tree"
    code, out, err = run("diff", "--json", "tree", "missing")
    assert (code, err) == (1, f"pytree2safetensors: {said}\n")
    assert strictly(out) == {"files": ["tree", "missing"], "error": said}


def test_an_interrupt_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pytree2safetensors._cli.verify.verify_file", interrupt)
    assert run("verify", "file") == (130, "", "")


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
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


@posix
@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)])
def test_closed_streams_are_no_error(closed: str, code: int) -> None:
    save_pytree({"a": 1}, "tree")
    for file, expected in (("tree", code), ("missing", 1)):
        command = f"{sys.executable} -m pytree2safetensors show {file} {closed}"
        run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert run.returncode == expected
        assert "Traceback" not in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is full")
def test_what_cannot_be_printed_is_an_error() -> None:
    save_pytree(small(), "tree")
    command = [sys.executable, "-m", "pytree2safetensors", "show", "tree"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "pytree2safetensors: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is full")
def test_other_files_are_answered_if_an_error_cannot_be_printed() -> None:
    save_pytree({"a": 1}, "tree")
    command = [sys.executable, "-m", "pytree2safetensors", "verify", "missing", "tree"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.startswith("tree: sound\n")

"""Text for terminals: escaped, in columns, in colors."""

import io
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from command import Run, small
from pytree2safetensors import save_pytree
from pytree2safetensors._cli.main import main
from pytree2safetensors._cli.terminal import count, labelled, line, plain, size

pytestmark = pytest.mark.usefixtures("own_folder")


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


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (999, "999"), (1000, "1.0k"), (124_439_808, "124.4M"), (70_553_706_496, "70.6B"),
        (999_950, "1.0M"), (10**16, "10000.0T"),
    ],
)  # fmt: skip
def test_counts_have_a_unit(number: int, text: str) -> None:
    assert count(number) == text


def test_a_line_escapes_control_characters() -> None:
    assert line("a\x1b[2J\u202e\xe9\n") == r"a\x1b[2J\u202e" + "\xe9" + r"\n"


def test_labelled_lines_of_wide_characters_fit_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for text in ("\u6f22" * 30, "b" + "\u6f22" * 30, "ab \u6f22\u5b57 " + "\u6f22" * 30):
        lines = [*labelled("metadata", text)]
        assert lines[0].startswith(f"metadata  {text[:12]}")
        assert "".join(part[10:] for part in lines).replace(" ", "") == text.replace(" ", "")
        assert 39 <= max(len(part) + sum(map(part.count, "\u6f22\u5b57")) for part in lines) <= 40


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_of(out: io.StringIO, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command prints on a stdout."""
    # Not in a fixture: pytest replaces stdout between fixtures and test.
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        main(arguments)
    return out.getvalue()


@pytest.fixture
def _shows_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WT_SESSION", "")  # as newer terminals of Windows have it


@pytest.mark.usefixtures("_shows_colors")
@pytest.mark.parametrize("command", ["show", "diff", "verify"])
def test_colors_change_nothing_but_color(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pytree(small(), "a.safetensors")
    save_pytree({**small(), "step": 8, "new": 1}, "b.safetensors")
    arguments = [command, "a.safetensors", *(["b.safetensors"] if command == "diff" else [])]
    colored = screen_of(Terminal(), monkeypatch, *arguments)
    piped = screen_of(io.StringIO(), monkeypatch, *arguments)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9]*m", "", colored) == piped


@pytest.mark.usefixtures("_shows_colors")
@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_gets_no_colors_if_the_user_wants_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pytree({"a": 1}, "a.safetensors")
    monkeypatch.setenv(name, value)
    assert "\x1b" not in screen_of(Terminal(), monkeypatch, "verify", "a.safetensors")


@pytest.mark.usefixtures("_shows_colors")
def test_a_file_cannot_forge_a_color(monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"\x1b[32m": np.zeros(1)}, "a.safetensors")
    screen = screen_of(Terminal(), monkeypatch, "show", "a.safetensors")
    assert "\x1b[32m" not in screen
    assert r"'\x1b[32m'" in screen

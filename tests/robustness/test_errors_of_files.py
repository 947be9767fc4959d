"""The messages of errors about paths that are not safetensors files."""

import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytree2safetensors import (
    FileFormatError,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
)

superuser = not hasattr(os, "geteuid") or os.geteuid() == 0


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


MAKERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "missing.safetensors": lambda path: None,
    "nowhere/model": lambda path: None,
    "folder": Path.mkdir,
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"abc"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 4)),
    "archive": _zip,
    "array.npy": lambda path: np.save(path, np.ones(3)),
    "arrays.npz": lambda path: np.savez(path, np.ones(3)),
    "weights.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(8)),
    "model.gguf": lambda path: path.write_bytes(b"GGUF\3" + bytes(11)),
    "text": lambda path: path.write_text("a text of some length"),
    "cut": lambda path: path.write_bytes(b"\x40\0\0\0\0\0\0\0{}"),
    "other": lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"),
}

PATHS: list[tuple[str, type[Exception], str]] = [
    ("missing", FileNotFoundError, "[Errno 2] No such file or directory: 'missing'"),
    (
        "missing.safetensors",
        FileNotFoundError,
        "[Errno 2] No such file or directory: 'missing.safetensors'",
    ),
    ("nowhere/model", FileNotFoundError, "[Errno 2] No such file or directory: 'nowhere/model'"),
    ("", FileNotFoundError, "[Errno 2] No such file or directory: ''"),
    ("folder", FileFormatError, "the folder 'folder' has no safetensors file and no index"),
    ("empty", FileFormatError, "'empty' has 0 bytes and is not a safetensors file"),
    ("empty/model", FileNotFoundError, "[Errno 2] No such file or directory: 'empty/model'")
    if os.name == "nt"
    else ("empty/model", NotADirectoryError, "[Errno 20] Not a directory: 'empty/model'"),
    ("short", FileFormatError, "'short' has 3 bytes and is not a safetensors file"),
    (
        "pickle",
        FileFormatError,
        "'pickle' is not a safetensors file (it looks like a pickle): it begins with a header length "
        "of 177,538,176 bytes, and the format allows 100,000,000",
    ),
    (
        "archive",
        FileFormatError,
        "'archive' is not a safetensors file (it looks like a zip archive): it begins with a header "
        "length of # bytes, and the format allows 100,000,000",
    ),
    (
        "array.npy",
        FileFormatError,
        "'array.npy' is not a safetensors file (it looks like NumPy's): it begins with a header "
        "length of # bytes, and the format allows 100,000,000",
    ),
    (
        "arrays.npz",
        FileFormatError,
        "'arrays.npz' is not a safetensors file (it looks like a zip archive): it begins with a "
        "header length of # bytes, and the format allows 100,000,000",
    ),
    *(
        (
            name,
            FileFormatError,
            f"{name!r} is not a safetensors file (it looks like {kind}): it begins with a header "
            "length of # bytes, and the format allows 100,000,000",
        )
        for name, kind in (("weights.h5", "HDF5"), ("model.gguf", "GGUF"))
    ),
    (
        "text",
        FileFormatError,
        "'text' is not a safetensors file: it begins with a header length of # bytes, and the format "
        "allows 100,000,000",
    ),
    (
        "cut",
        FileFormatError,
        "'cut' is truncated: its header should take 64 bytes, and the file has 10; copy or download it "
        "again",
    ),
    (
        "other",
        FileFormatError,
        "'other' is not a safetensors file: its header does not begin with {",
    ),
]

LOADERS: list[Callable[[Any], Any]] = [
    load_pytree,
    load_abstract,
    load_metadata,
    lambda path: load_pytree(path, mmap=True),
    lambda path: load_into_pytree({"a": 1}, path),
]


@pytest.mark.parametrize("load", LOADERS, ids=range(len(LOADERS)))
@pytest.mark.parametrize(("path", "error", "text"), PATHS, ids=[path for path, _, _ in PATHS])
def test_a_file_of_another_format_gets_one_line(
    path: str,
    error: type[Exception],
    text: str,
    load: Callable[[Any], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in {path, path.partition("/")[0]} & set(MAKERS):
        MAKERS[name](Path(name))
    with pytest.raises(error) as caught:
        load(path)
    assert type(caught.value) is error
    assert re.fullmatch(re.escape(text).replace(r"\#", "[0-9,]+"), str(caught.value))


@pytest.mark.skipif(superuser, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(1, path)
    path.chmod(0)
    with pytest.raises(PermissionError) as caught:
        load_pytree(path)
    assert str(caught.value) == f"[Errno 13] Permission denied: {str(path)!r}"


UNPRIVILEGED = """
import os, sys
import pytree2safetensors
pytree2safetensors.__all__  # imports the modules while they can be read
os.setgid(65534), os.setuid(65534)
os.chdir(sys.argv[1])
for work in (
    lambda: pytree2safetensors.load_pytree("secret"),
    lambda: pytree2safetensors.save_pytree(2, "model"),
    lambda: pytree2safetensors.save_pytree(2, "closed/model"),
):
    try:
        work()
    except PermissionError as error:
        print(error)
"""


@pytest.mark.skipif(
    not superuser or not hasattr(os, "setuid"), reason="giving up rights is for the superuser"
)
def test_what_may_not_be_read_or_written_is_reported() -> None:
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        folder = Path(scratch)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o700)
        save_pytree(1, folder / "secret")
        (folder / "secret").chmod(0o600)
        save_pytree(1, folder / "model")
        found = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines() == [
            "[Errno 13] Permission denied: 'secret'",
            "[Errno 13] Permission denied: 'model'",
            "[Errno 13] Permission denied: 'closed/model'",
        ]
        assert load_pytree(folder / "model") == 1
        assert {path.name for path in folder.iterdir()} == {"closed", "secret", "model"}


def test_file_objects_have_names_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"abc")
    with path.open("rb") as opened, pytest.raises(FileFormatError) as caught:
        load_pytree(opened)
    assert str(caught.value) == f"{str(path)!r} has 3 bytes and is not a safetensors file"
    with pytest.raises(FileFormatError) as caught:
        load_pytree(io.BytesIO(b"abc"))
    assert str(caught.value) == "the BytesIO has 3 bytes and is not a safetensors file"


def test_text_is_no_file() -> None:
    with pytest.raises(TypeError) as caught:
        load_pytree(io.StringIO("a text of some length"))  # type: ignore[arg-type] # the mistake
    assert str(caught.value) == "the StringIO gives str, not bytes; open it in binary mode"


def test_a_file_object_cannot_be_mapped() -> None:
    saved = io.BytesIO()
    save_pytree({"a": 1}, saved)
    with pytest.raises(ValueError, match="maps a file") as caught:
        load_pytree(io.BytesIO(saved.getvalue()), mmap=True)
    assert str(caught.value) == "mmap=True maps a file on disk; load a file object without it"


SAVES: list[tuple[str, type[OSError], str]] = [
    ("", FileNotFoundError, "[Errno 2] No such file or directory: ''"),
    (
        "folder",
        IsADirectoryError,
        "[Errno 21] Is a directory (max_shard_size= saves to a folder): 'folder'",
    ),
    (
        "new/",
        FileNotFoundError,
        "[Errno 2] No such file or directory (max_shard_size= saves to a folder): 'new/'",
    ),
    (
        "nowhere/model",
        FileNotFoundError,
        "[Errno 2] No such file or directory (the folder 'nowhere' is missing; make it first): "
        "'nowhere/model'",
    ),
    ("empty/model", NotADirectoryError, "[Errno 20] Not a directory: 'empty/model'"),
    ("x" * 300, OSError, f"[Errno 36] File name too long: '{'x' * 300}'"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="systems number and word errors differently")
@pytest.mark.parametrize(("path", "error", "text"), SAVES, ids=[path[:9] for path, _, _ in SAVES])
def test_where_nothing_can_be_saved_the_error_names_the_path(
    path: str, error: type[OSError], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").write_bytes(b"")
    with pytest.raises(error) as caught:
        save_pytree({"a": 1}, path)
    assert str(caught.value) == text
    assert caught.value.filename == path
    assert {found.name for found in tmp_path.iterdir()} == {"folder", "empty"}
    assert not list(Path("folder").iterdir())

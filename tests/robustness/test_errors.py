"""What the errors say: the text of each message, with the key path, the file and the remedy."""

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

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pytree2safetensors
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    UnsupportedLeafError,
    WeightsMismatchError,
    dict2pytree,
    keypath2string,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
    string2keypath,
)
from pytree2safetensors._leaves.describe import DeletedLeaf

superuser = not hasattr(os, "geteuid") or os.geteuid() == 0

# --- the classes ------------------------------------------------------------------------------

CLASSES: list[tuple[type[Exception], type[Exception]]] = [
    (KeyPathError, ValueError),
    (TreeStructureError, ValueError),
    (UnsupportedLeafError, TypeError),
    (WeightsMismatchError, ValueError),
    (FileFormatError, ValueError),
]


@pytest.mark.parametrize(("error", "builtin"), CLASSES)
def test_each_error_is_the_packages_and_a_built_in_one(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, Pytree2SafetensorsError)
    assert issubclass(error, builtin)
    assert not issubclass(error, OSError)
    assert error.__module__ == "pytree2safetensors"
    assert getattr(pytree2safetensors, error.__name__) is error
    assert error.__name__ in pytree2safetensors.__all__
    assert error.__doc__


def test_what_is_deleted_cannot_be_stored() -> None:
    assert issubclass(DeletedLeaf, UnsupportedLeafError)
    assert issubclass(DeletedLeaf, RuntimeError)  # as JAX's own error of it is


def test_there_are_no_other_errors() -> None:
    assert set(Pytree2SafetensorsError.__subclasses__()) == {error for error, _ in CLASSES}


@pytest.mark.parametrize("error", [error for error, _ in CLASSES])
def test_errors_go_from_process_to_process(error: type[Exception]) -> None:
    found = pickle.loads(pickle.dumps(error("text")))
    assert type(found) is error
    assert str(found) == "text"


def test_a_mismatch_goes_from_process_to_process_with_its_lists() -> None:
    error = WeightsMismatchError("text", ["@a"], ["@b"], ["@c: differs"])
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.missing) == ("text", ("@a",))
    assert (found.unexpected, found.mismatched) == (("@b",), ("@c: differs",))


# --- paths that are no safetensors files ------------------------------------------------------


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


MAKERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "nowhere/model": lambda path: None,
    "folder": Path.mkdir,
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"abc"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 4)),
    "archive": _zip,
    "array.npy": lambda path: np.save(path, np.ones(3)),
    "arrays.npz": lambda path: np.savez(path, np.ones(3)),
    "text": lambda path: path.write_text("a text of some length"),
    "cut": lambda path: path.write_bytes(b"\x40\0\0\0\0\0\0\0{}"),
    "other": lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"),
}

PATHS: list[tuple[str, type[Exception], str]] = [
    ("missing", FileNotFoundError, "[Errno 2] No such file or directory: 'missing'"),
    ("nowhere/model", FileNotFoundError, "[Errno 2] No such file or directory: 'nowhere/model'"),
    ("", FileNotFoundError, "[Errno 2] No such file or directory: ''"),
    ("folder", FileFormatError, "the folder 'folder' has no safetensors file and no index"),
    ("empty", FileFormatError, "'empty' has 0 bytes and is not a safetensors file"),
    ("empty/model", NotADirectoryError, "[Errno 20] Not a directory: 'empty/model'"),
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
    (
        "text",
        FileFormatError,
        "'text' is not a safetensors file: it begins with a header length of # bytes, and the format "
        "allows 100,000,000",
    ),
    (
        "cut",
        FileFormatError,
        "'cut' is truncated: its header should take 64 bytes, and the file has 10",
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
def test_what_is_no_safetensors_file_is_told_in_one_line(
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
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(1, path)
    path.chmod(0)
    with pytest.raises(PermissionError) as caught:
        load_pytree(path)
    assert str(caught.value) == f"[Errno 13] Permission denied: {str(path)!r}"


UNPRIVILEGED = """
import os, sys
import pytree2safetensors
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
def test_what_may_not_be_read_or_written_is_told() -> None:
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
    ("folder", IsADirectoryError, "[Errno 21] Is a directory: 'folder'"),
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


# --- trees, names and leaves ------------------------------------------------------------------


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node that gives both its children one key."""

    def tree_flatten_with_keys(self) -> Any:
        key = jax.tree_util.GetAttrKey("same")
        return [(key, 1), (key, 2)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Twins":
        return cls()


@jax.tree_util.register_pytree_with_keys_class
class Strs:
    """A node whose keys are plain strs."""

    def tree_flatten_with_keys(self) -> Any:
        return [("weight", 1)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Strs":
        return cls()


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


def cyclic() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


FUNCTION = "builtins.builtin_function_or_method"
TREES: list[tuple[Any, type[Exception], str]] = [
    (
        {"f": print, "g": [b"x", np.array(["a"]), 1]},
        UnsupportedLeafError,
        "3 of the tree's leaves cannot be stored:\n"
        f"  '@f': {FUNCTION}\n"
        "  '@g#0': builtins.bytes\n"
        "  '@g#1': numpy.ndarray of dtype <U1\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its '
        "template. (A class of your own is no leaf once it is registered as a pytree node.)",
    ),
    (
        {"rng": np.random.default_rng(0)},
        UnsupportedLeafError,
        "1 of the tree's leaves cannot be stored:\n"
        "  '@rng': numpy.random._generator.Generator, whose .bit_generator.state can be saved\n"
        'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of its '
        "template. (A class of your own is no leaf once it is registered as a pytree node.)",
    ),
    (
        {"a": jax.eval_shape(lambda: jnp.zeros(3)), "f": print},
        UnsupportedLeafError,
        "2 of the tree's leaves cannot be stored:\n"
        f"  '@a': {jax.ShapeDtypeStruct.__module__}.ShapeDtypeStruct of dtype float32\n"
        f"  '@f': {FUNCTION}\n"
        "Only concrete arrays can be saved. Call this outside jit; for a Ref, or another object that "
        "holds an array, save the array.",
    ),
    (
        {"a": deleted()},
        DeletedLeaf,
        "the array at '@a' has been deleted or donated; save it before, or save the array that "
        "took its place",
    ),
    (
        {"a": {float("nan"): 1}},
        KeyPathError,
        "a dict key is the float nan, which is not finite, in a key path that begins '@a'",
    ),
    (
        {"a": {frozenset(): 1}},
        KeyPathError,
        "a dict key must be a str, None, bool, int, float, bytes or a tuple of these, not frozenset() "
        "of type builtins.frozenset, in a key path that begins '@a'",
    ),
    (
        {"\ud800": 1},
        KeyPathError,
        "a dict key with a lone surrogate, '\\ud800', has no UTF-8 spelling, in a key path that "
        "begins ''",
    ),
    (
        [Twins()],
        KeyPathError,
        "two children of one node have the key path '#0.same': the node type test_errors.Twins "
        "gives both one key",
    ),
    (
        [Strs()],
        KeyPathError,
        "cannot spell 'weight' of type builtins.str: not one of JAX's own key classes (where the node "
        "type is registered, give a GetAttrKey instead of this str), in a key path that begins '#0'",
    ),
    (
        {"a": {1: 1, "b": 2}},
        TreeStructureError,
        "JAX cannot sort the keys of the dict at '@a', of these types: int, str; use keys that "
        "compare with each other",
    ),
    (
        {"a": {1j: 1, 2j: 2}},
        KeyPathError,
        "a dict key must be a str, None, bool, int, float, bytes or a tuple of these, not 1j of type "
        "builtins.complex, in a key path that begins '@a'",
    ),
    (
        {"s": "\ud83d\ude00"},
        UnsupportedLeafError,
        "1 of the tree's leaves cannot be stored:\n"
        "  '@s': builtins.str with the two halves of a surrogate pair, which JSON makes one "
        'character\nSave with unsupported="skip" to leave them out; load_into_pytree then keeps '
        "those of its template. (A class of your own is no leaf once it is registered as a pytree "
        "node.)",
    ),
    (
        cyclic(),
        TreeStructureError,
        "the tree below * is cyclic, or nested deeper than JAX can flatten; flatten it into fewer "
        "levels",
    ),
]


@pytest.mark.parametrize(("tree", "error", "text"), TREES, ids=range(len(TREES)))
def test_a_tree_that_cannot_be_saved_is_told(
    tree: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        save_pytree(tree, tmp_path / "model")
    assert type(caught.value) is error
    assert re.fullmatch(re.escape(text).replace(r"\*", ".*"), str(caught.value))
    assert not list(tmp_path.iterdir())


def test_a_traced_value_is_told() -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        jax.jit(lambda x: save_pytree({"a": x}, io.BytesIO()))(1.0)
    assert "'@a': jax._src" in str(caught.value)
    assert "Tracer, a traced value\n" in str(caught.value)
    assert "Call this outside jit" in str(caught.value)


def test_every_unsupported_leaf_is_listed() -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        save_pytree([print] * 1000, io.BytesIO())
    lines = str(caught.value).splitlines()
    assert lines[0] == "1000 of the tree's leaves cannot be stored:"
    assert lines[1:-1] == [f"  '#{i}': {FUNCTION}" for i in range(1000)]


METADATA: list[tuple[dict[str, str], str]] = [
    (
        {"pytree2safetensors": "{}"},
        "the metadata may not set 'pytree2safetensors', which this package writes itself; choose "
        "another name",
    ),
    (
        {"pytree2safetensors.sha256": "{}"},
        "the metadata may not set 'pytree2safetensors.sha256', which this package writes itself; "
        "choose another name",
    ),
    (
        {"a": "\ud800"},
        "the metadata entry 'a' holds a lone surrogate, which has no UTF-8 form",
    ),
]


@pytest.mark.parametrize(("metadata", "text"), METADATA)
def test_metadata_that_cannot_be_saved_are_told(metadata: dict[str, str], text: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        save_pytree(1, io.BytesIO(), metadata=metadata)
    assert str(caught.value) == text


def test_a_header_beyond_the_limit_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytree2safetensors._format.layout.MAX_HEADER", 1000)
    with pytest.raises(FileFormatError) as caught:
        save_pytree([1.0] * 100, io.BytesIO())
    assert re.fullmatch(
        r"the header would take [0-9],[0-9]+ bytes, and the format allows 1,000; save with "
        r"max_shard_size=, which gives each file a part of the tensors",
        str(caught.value),
    )


DICTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"#01": 1},
        KeyPathError,
        "'#01' is not a key path: at position 1, an index is a decimal number from 0 to "
        "2147483647, without sign or leading zero; the canonical spelling is '#1'",
    ),
    (
        {"a.b": 1, "a@c": 2},
        TreeStructureError,
        "'a@c' and 'a.b' make the node at 'a' two kinds of node at once",
    ),
    (
        {"a": 1, "a.b": 2},
        TreeStructureError,
        "'a' and 'a.b' name a leaf and a node at the same place",
    ),
    (
        {"a.b": 1, "a": 2},
        TreeStructureError,
        "'a.b' and 'a' name a leaf and a node at the same place",
    ),
    (
        {r"@\(1)": 1, r"@\(True)": 2},
        TreeStructureError,
        r"'@\\(1)' and '@\\(True)' have dict keys that are equal in Python",
    ),
    (
        {"@a": [1]},
        TreeStructureError,
        "the value of '@a' is of type list, which JAX does not treat as a leaf; give each of its "
        "leaves a name",
    ),
    (
        {"@a": None},
        TreeStructureError,
        "the value of '@a' is of type NoneType, which JAX does not treat as a leaf; give each of "
        "its leaves a name",
    ),
    (
        {r"@a#\(1)": 1},
        TreeStructureError,
        "the node without keys at '@a' lacks 1 of its 2 children",
    ),
    (
        {"@a#2000000": 1},
        TreeStructureError,
        "the list at '@a' would have 2000001 elements, and the tree more than 1048576 gaps",
    ),
]


@pytest.mark.parametrize(("found", "error", "text"), DICTS, ids=range(len(DICTS)))
def test_names_that_make_no_tree_are_told(
    found: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        dict2pytree(found)
    assert str(caught.value) == text


KEYPATHS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: keypath2string((jax.tree_util.SequenceKey(-1),)),
        "an index is at least 0 and at most 2147483647, not -1, in a key path that begins ''",
    ),
    (
        lambda: string2keypath(".a"),
        "'.a' is not a key path: at position 0, a leading name has no '.'; the "
        "canonical spelling is 'a'",
    ),
    (
        lambda: set_weights({"a": 1}, {"@a": 1}, prefix="#01"),
        "'#01' is not a key path: at position 1, an index is a decimal number from 0 to "
        "2147483647, without sign or leading zero; the canonical spelling is '#1'",
    ),
]


@pytest.mark.parametrize(("work", "text"), KEYPATHS, ids=range(len(KEYPATHS)))
def test_what_is_no_key_path_is_told(work: Callable[[], Any], text: str) -> None:
    with pytest.raises(KeyPathError) as caught:
        work()
    assert str(caught.value) == text


MISTYPED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: keypath2string((jax.tree_util.DictKey("a"), "b")),  # type: ignore[arg-type] # the mistake
        "cannot spell 'b' of type builtins.str: not one of JAX's own key classes (where the node "
        "type is registered, give a GetAttrKey instead of this str), in a key path that begins '@a'",
    ),
    (
        lambda: keypath2string(3),  # type: ignore[arg-type] # the mistake
        "keypath2string: path must be a tuple of keys, not int",
    ),
    (
        lambda: string2keypath(3),  # type: ignore[arg-type] # the mistake
        "string2keypath: string must be a spelled key path, which is a str, not int",
    ),
]


@pytest.mark.parametrize(("work", "text"), MISTYPED, ids=range(len(MISTYPED)))
def test_what_is_of_another_type_is_no_key_path(work: Callable[[], Any], text: str) -> None:
    with pytest.raises((KeyPathError, TypeError)) as caught:  # the tests' own checks come first
        work()
    assert str(caught.value) == text or type(caught.value).__name__ == "TypeCheckError"


WRONG: list[Callable[[], Any]] = [
    lambda: save_pytree(1, 3),  # type: ignore[arg-type] # the mistake, here and below
    lambda: save_pytree(1, io.BytesIO(), metadata={"a": 1}),  # type: ignore[dict-item]
    lambda: save_pytree(1, io.BytesIO(), unsupported="no"),  # type: ignore[arg-type]
    lambda: save_pytree(1, io.BytesIO(), durable="no"),  # type: ignore[arg-type]
    lambda: load_pytree(3),  # type: ignore[arg-type]
    lambda: load_pytree(b"model"),  # type: ignore[arg-type]
    lambda: load_pytree("model", prefix=None),  # type: ignore[arg-type]
    lambda: load_into_pytree({}, "model", rename=3),  # type: ignore[arg-type]
    lambda: set_weights({}, [1]),  # type: ignore[arg-type]
    lambda: dict2pytree([1]),  # type: ignore[arg-type]
    lambda: PyTreeContainer([1]),  # type: ignore[arg-type]
    lambda: UnkeyedContainer(3),  # type: ignore[arg-type]
]


@pytest.mark.skipif(bool(os.environ.get("JAXTYPING_DISABLE")), reason="the checks are off")
@pytest.mark.parametrize("work", WRONG, ids=range(len(WRONG)))
def test_arguments_of_wrong_types_are_type_errors(work: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        work()


def test_a_prefix_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree({f"k{i}": i for i in range(9)}, path)
    loads: list[Callable[[], Any]] = [
        lambda: load_pytree(path, prefix="@x"),
        lambda: load_into_pytree({"a": 1}, path, prefix="@x"),
    ]
    for load in loads:
        with pytest.raises(WeightsMismatchError) as caught:
            load()
        assert str(caught.value) == (
            f"{str(path)!r} has nothing at the prefix '@x'; its names begin with '@k0', '@k1', "
            "'@k2', '@k3', '@k4'"
        )


# --- templates --------------------------------------------------------------------------------

STORED = {"layer": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}, "step": 3}
KEEP = "strict=False loads what fits."


def changed(**leaves: Any) -> Any:
    """A template that differs from what is stored."""
    return {"layer": {**STORED["layer"], **leaves}, "step": 3}  # type: ignore[dict-item] # a dict


STRUCT = jax.eval_shape(lambda: jnp.zeros(2))
SKIP = 'unexpected="skip" ignores what the template lacks; '
MISMATCHES: list[tuple[Any, dict[str, Any], tuple[int, int, int], str]] = [
    (
        {**STORED, "rate": 0.1},
        {},
        (1, 0, 0),
        "  missing (the template has them):\n    '@rate'\n"
        f"rename= maps names; prefix= takes a subtree; {KEEP}",
    ),
    (
        {"step": 3},
        {},
        (0, 2, 0),
        "  unexpected (the template has no place for them):\n    '@layer@b'\n    '@layer@w'\n"
        f"{SKIP}{KEEP}",
    ),
    (
        changed(w=np.ones((3, 2), np.float32)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has float32[3,2], and stored is float32[2,3]\n"
        f"{KEEP}",
    ),
    (
        changed(w=np.ones((2, 3), np.float16)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has float16[2,3], and stored is float32[2,3]\n"
        f"cast=True converts dtypes; {KEEP}",
    ),
    (
        changed(w=np.ones((2, 3), np.int32)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has int32[2,3], and stored is float32[2,3]\n"
        f"{KEEP}",
    ),
    (
        changed(w="text"),
        {},
        (0, 0, 1),
        "  mismatched:\n"
        f"    '@layer@w': the template has a Python str, and stored is float32[2,3]\n{KEEP}",
    ),
    (
        changed(w=print),
        {},
        (0, 1, 0),
        f"  unexpected (the template has no place for them):\n    '@layer@w'\n{SKIP}{KEEP}",
    ),
    (
        {**STORED, "step": True},
        {},
        (0, 0, 1),
        "  mismatched:\n    '@step': the template has a Python bool, and stored is a Python int\n"
        f"{KEEP}",
    ),
    (
        {**STORED, "step": jax.random.key(0)},
        {},
        (0, 0, 1),
        "  mismatched:\n"
        f"    '@step': the template has key<threefry2x32>[], and stored is a Python int\n{KEEP}",
    ),
    # All kinds in one report.
    (
        {
            "layer": {"w": np.ones(6, np.float32), "bias": np.zeros(3, np.float32)},
            "stepp": 3,
            "f": abs,
        },
        {},
        (2, 2, 1),
        "  missing (the template has them):\n"
        "    '@layer@bias' (nearest: '@layer@b')\n"
        "    '@stepp' (nearest: '@step')\n"
        "  unexpected (the template has no place for them):\n"
        "    '@layer@b'\n"
        "    '@step'\n"
        "  mismatched:\n"
        "    '@layer@w': the template has float32[6], and stored is float32[2,3]\n"
        "Nothing fits, which strict=False does not allow either: rename= maps names; prefix= takes "
        "a subtree.",
    ),
    # Nothing fits.
    (
        {"x": 1},
        {"strict": False},
        (1, 3, 0),
        "  missing (the template has them):\n    '@x'\n"
        "  unexpected (the template has no place for them):\n"
        "    '@layer@b'\n    '@layer@w'\n    '@step'\n"
        "Nothing fits, which strict=False does not allow either: rename= maps names; prefix= takes "
        "a subtree.",
    ),
    (
        {},
        {"strict": False},
        (0, 3, 0),
        "  unexpected (the template has no place for them):\n"
        "    '@layer@b'\n    '@layer@w'\n    '@step'\n"
        "Nothing fits, which strict=False does not allow either.",
    ),
    # What is abstract cannot be kept.
    (
        {**STORED, "new": STRUCT},
        {"strict": False},
        (1, 0, 0),
        "  missing (the template has them):\n    '@new'\n"
        "strict=False keeps the template's leaves, and what is abstract or deleted has no value to keep.",
    ),
]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "dictionary"])
@pytest.mark.parametrize(
    ("template", "options", "counts", "text"), MISMATCHES, ids=range(len(MISMATCHES))
)
def test_a_mismatch_is_told_whole(
    template: Any,
    options: dict[str, Any],
    counts: tuple[int, int, int],
    text: str,
    from_file: bool,
    tmp_path: Path,
) -> None:
    before = jax.tree_util.tree_map(lambda leaf: leaf, template)
    path = tmp_path / "model"
    save_pytree(STORED, path)
    label = repr(str(path)) if from_file else "the dictionary"
    found = dict(sorted(pytree2dict(STORED).items()))
    with pytest.raises(WeightsMismatchError) as caught:
        _ = (
            load_into_pytree(template, path, **options)
            if from_file
            else set_weights(template, found, **options)
        )
    missing, unexpected, mismatched = counts
    head = f"{missing} missing, {unexpected} unexpected, {mismatched} mismatched"
    assert str(caught.value) == f"{label} does not fit the template: {head}\n{text}"
    error = caught.value
    assert (len(error.missing), len(error.unexpected), len(error.mismatched)) == counts
    # Nothing is half applied.
    for old, new in zip(*map(jax.tree_util.tree_leaves, (before, template)), strict=True):
        assert old is new


def test_the_lists_name_every_leaf() -> None:
    found = {f"@new{i:05}": 1 for i in range(10_000)} | {f"@{i:05}": 1 for i in range(10_000)}
    template = {f"{i:05}": "text" for i in range(10_000)} | {f"old{i:05}": 1 for i in range(10_000)}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, found)
    assert list(caught.value.missing) == [f"@old{i:05}" for i in range(10_000)]
    assert list(caught.value.unexpected) == [f"@new{i:05}" for i in range(10_000)]
    assert [line.split(":")[0] for line in caught.value.mismatched] == [
        f"'@{i:05}'" for i in range(10_000)
    ]
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("10000 missing, 10000 unexpected, 10000 mismatched")
    assert lines.count("    ... and 9,980 more") == 3
    assert len(lines) == 1 + 3 * 22 + 1
    assert len(str(caught.value)) < 6000
    assert lines[2] == "    '@old00000' (nearest: '@new00000')"
    assert lines[22] == "    ... and 9,980 more"


def test_long_names_are_shortened() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"x" * 100_000: 1}, {"@" + "y" * 100_000: 1})
    assert len(str(caught.value)) < 1500
    assert "(100,001 characters)" in str(caught.value)


def test_names_are_shown_so_that_they_do_nothing() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"\x1b[31m": 1}, {"@\u202e\n": 1})
    assert r"'@\x1b[31m'" in str(caught.value)
    assert r"'@\u202e\n'" in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()


NEAREST = [
    ("layers#10@query", ["layers#2@key", "layers#10@qvery", "head"], "layers#10@qvery"),
    ("decoder.w", ["encoder.w", "x"], "encoder.w"),
    ("w", ["completely.different"], None),
]


@pytest.mark.parametrize(("wanted", "there", "nearest"), NEAREST)
def test_the_nearest_name_is_shown(wanted: str, there: list[str], nearest: str | None) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(dict2pytree({wanted: 1}), dict.fromkeys(there, 1))
    line = str(caught.value).splitlines()[2].strip()
    assert line == f"{wanted!r}" + (f" (nearest: {nearest!r})" if nearest else "")

"""The library passes its own conformance kit, with only its public interface."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance.describe import WIDTHS, describe_path, describe_tree
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    keypath2string,
    load_abstract,
    load_metadata,
    load_pytree,
    string2keypath,
)

pytestmark = pytest.mark.filterwarnings("ignore:JAX does not support the dtypes")  # of 64 bits

KIT = Path(__file__).parent / "kit"
CLASSES = {
    "name": KeyPathError,
    "tree": TreeStructureError,
}  # of reasons; the others are of the format


def cases(name: str) -> Any:
    return json.loads((KIT / name).read_text("ascii"))


ACCEPTED, REFUSED, KEYPATHS = cases("accepted.json"), cases("refused.json"), cases("keypaths.json")


def error_of(case: dict[str, Any], load: Any) -> type[Exception] | None:
    try:
        load(KIT / case["file"])
    except Pytree2SafetensorsError as error:
        return type(error)
    return None


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case["file"])
def test_what_must_load_loads_as_the_kit_says(case: dict[str, Any]) -> None:
    path = KIT / case["file"]
    try:
        tree = load_pytree(path)
    except FileFormatError as error:
        if "this ml_dtypes lacks" in str(error):
            pytest.skip(str(error))
        raise
    assert describe_tree(tree) == case["tree"]
    assert load_metadata(path) == case["metadata"]
    load_abstract(path)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["file"])
def test_what_must_be_refused_is_refused_when_the_kit_says(case: dict[str, Any]) -> None:
    expected = CLASSES.get(case["reason"], FileFormatError)
    opened = expected if case["stage"] == "open" else None
    assert error_of(case, load_metadata) is opened
    assert error_of(case, load_pytree) is expected


@pytest.mark.parametrize("case", KEYPATHS["accepted"], ids=lambda case: ascii(case["string"]))
def test_key_paths_are_read_and_spelled_as_the_kit_says(case: dict[str, Any]) -> None:
    path = string2keypath(case["string"])
    assert describe_path(path) == case["path"]
    assert keypath2string(path) == case["string"]


@pytest.mark.parametrize("string", KEYPATHS["refused"], ids=ascii)
def test_strings_that_spell_no_key_path_are_refused(string: str) -> None:
    with pytest.raises(KeyPathError):
        string2keypath(string)


@pytest.mark.parametrize(("name", "values"), cases("values.json").items())
def test_the_values_of_small_dtypes_are_those_of_the_kit(name: str, values: list[str]) -> None:
    if not hasattr(ml_dtypes, name) and name != "float16":
        pytest.skip(f"this version of ml_dtypes has no {name}")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    codes = np.arange(len(values), dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
    if dtype.itemsize == 2:
        codes *= np.uint16(257)
    assert [value.hex() for value in codes.view(dtype).astype(float).tolist()] == values


def test_the_kit_is_complete_and_small() -> None:
    named = {case["file"].split("/")[1] for case in [*ACCEPTED, *REFUSED]}
    found = {path.name for folder in ("accepted", "refused") for path in (KIT / folder).iterdir()}
    assert named == found
    assert len(ACCEPTED) + len(REFUSED) >= 300
    files = [path for path in KIT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    dtypes = {
        leaf["dtype"] for case in ACCEPTED for leaf in leaves_of(case["tree"]) if "dtype" in leaf
    }
    assert len(dtypes) == 32
    assert {*WIDTHS} <= dtypes


def leaves_of(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves of a described tree."""
    if "leaf" in tree:
        yield tree
    for item in tree.get("items", []):
        yield from leaves_of(item[1] if isinstance(item, list) else item)

"""The table of what survives in each library says what happens."""

import importlib
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks" / "survival.rst").read_text("utf-8")
PACKAGES = {
    "safetensors": "safetensors",
    "orbax": "orbax-checkpoint",
    "flax msgpack": "flax",
    "jaxon": "jaxon",
    "equinox, given a template": "equinox",
}


@pytest.fixture
def survival(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("survival")


def columns() -> dict[str, dict[str, str]]:
    """Each library's cells by the names of the rows."""
    rows = [re.findall(r"- ?(.*)", row) for row in PAGE.split("\n   * ")[1:]]
    names, *found = zip(*rows, strict=True)
    return {head: dict(zip(names[1:], cells, strict=True)) for head, *cells in found}


def test_the_table_has_all_specimens_and_counts_them(survival: Any) -> None:
    found = columns()
    assert list(found) == list(survival.LIBRARIES)
    for cells in found.values():
        *names, last = cells
        assert names == list(survival.SPECIMENS)
        kept = [cells[name] for name in names].count(survival.YES)
        assert (last, cells[last]) == ("survive", f"{kept} of {len(names)}")


def test_this_library_keeps_what_the_table_says(survival: Any) -> None:
    said = columns()["this library"]
    found = {}
    for name, specimen in survival.SPECIMENS.items():
        try:
            specimen()
        except AttributeError:  # of a dtype that this JAX or ml_dtypes does not have
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="JAX does not support the dtypes")
            found[name] = survival.outcome(name, survival.ours)
    assert found == {name: said[name] for name in found}
    assert len(found) > 45


@pytest.mark.parametrize("library", PACKAGES)
def test_other_libraries_keep_what_the_table_says(survival: Any, library: str) -> None:
    for name in ("jax", PACKAGES[library]):
        wanted = re.search(rf" {name} (\d[^,;]*)", PAGE)
        assert wanted is not None
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "none"
        if installed != wanted[1]:
            pytest.skip(f"the table is of {name} {wanted[1]}")
    *cells, _ = columns()[library].values()
    assert survival.column(library, {"here": sys.executable}) == cells

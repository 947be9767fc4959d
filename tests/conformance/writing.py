"""Writing the conformance kit: each case is checked against the package before it is added."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, given, seed, settings

from conformance.describe import describe_tree
from pytree2safetensors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    load_metadata,
    load_pytree,
    save_pytree,
)

LARGEST = 12_000  # bytes of one case
INDEX = "model.safetensors.index.json"
CLASSES = {"name": KeyPathError, "tree": TreeStructureError}  # of reasons; the others are of format


def draw(strategy: Any, count: int, number: int, fits: Callable[[Any], bool]) -> list[Any]:
    """Draw different examples that fit, always the same ones."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=40 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        if len(found) < count and fits(example):
            found.append(example)

    # Otherwise Hypothesis also draws constants from the source code, which changes.
    with patch("hypothesis.internal.conjecture.providers.is_local_module_file", return_value=False):
        collect()
    assert len(found) == count, f"only {len(found)} of {count} fit"
    return found


REASONS = (  # what a message says, and the word for it
    ("the note of", "note"),
    ("digest", "digest"),
    ("the metadata of", "metadata"),
    (" twice", "header"),
    ("overlap|hole|bytes after|bytes of data", "layout"),
    ("describes|gives|has the name", "tensor"),
    ("", "header"),
)
# Messages about files that the format lets a reader refuse or load.
OPTIONAL = (
    "what memory can address",
    "dimensions, and",
    "the tree would have more",
    "a packed dtype",
)


class Seen:
    """Remembers texts, and says whether one is new."""

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def is_new(self, thing: Any) -> bool:
        text = json.dumps(thing, sort_keys=True)
        new = text not in self.texts
        self.texts.add(text)
        return new


class Kit:
    """The kit: the folder to which its files go, its lists of cases, and where the package disagrees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accepted: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.contents: set[bytes] = set()  # of files that are refused
        self.optional: set[str] = set()  # the messages that were found
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("accepted", "refused"):
            (folder / name).mkdir(parents=True)

    def accept(self, name: str, tree: Any, metadata: dict[str, str], origin: str) -> None:
        """Add a file or folder that loads as a tree."""
        path = self.folder / "accepted" / name
        expected = describe_tree(tree)
        try:
            found = describe_tree(load_pytree(path)), load_metadata(path)
        except Pytree2SafetensorsError as error:
            self.problems.append(f"{name} is refused: {error}")
        else:
            if found != (expected, metadata):
                self.problems.append(f"{name}: {found} is not {expected}")
        case = {"file": f"accepted/{name}", "from": origin, "metadata": metadata, "tree": expected}
        self.accepted.append(case)

    def accept_saved(self, name: str, tree: Any, origin: str, **options: Any) -> None:
        """Add what the package saves."""
        save_pytree(tree, self.folder / "accepted" / name, **options)
        given = options.get("metadata", {}).items()
        self.accept(name, tree, {k: v for k, v in given if (k, v) != ("format", "flax")}, origin)

    def refuse(self, name: str, reason: str = "", why: str = "") -> None:
        """Add a file or folder that is refused; by default, the package's message says why."""
        path = self.folder / "refused" / name
        stage, error = "open", _error_of(load_metadata, path)
        if error is None:
            stage, error = "load", _error_of(load_pytree, path)
        message = str(error).replace(f"{str(path)!r}", "the file").replace(f"{path}/", "")
        why = why or re.split("; (?:load_into_pytree|copy or download)", message)[0]
        reason = reason or next(word for part, word in REASONS if re.search(part, why))
        if type(error) is not CLASSES.get(reason, FileFormatError):
            self.problems.append(f"{name} is refused with {error!r}; expected: {reason}, {why}")
        case = {"file": f"refused/{name}", "stage": stage, "reason": reason, "why": why}
        optional = [part for part in OPTIONAL if part in why]
        self.optional.update(optional)
        self.refused.append({**case, "optional": True} if optional else case)

    def refuse_bytes(self, group: str, reason: str, content: bytes, why: str = "") -> None:
        """Add a file that is refused, if it is small and new."""
        if len(content) > LARGEST or content in self.contents:
            return
        self.contents.add(content)
        number = sum(case["file"].startswith(f"refused/{group}-") for case in self.refused) + 1
        name = f"{group}-{number:03}.safetensors"
        (self.folder / "refused" / name).write_bytes(content)
        self.refuse(name, reason, why)

    def write(self, name: str, cases: Any) -> None:
        """Write JSON, one case a line."""
        if isinstance(cases, list):
            text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
        else:
            members = (
                f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
                for name, rows in cases.items()
            )
            text = "{\n" + ",\n".join(members) + "\n}\n"
        (self.folder / name).write_text(text, "ascii")


def _error_of(load: Callable[[Path], Any], path: Path) -> Pytree2SafetensorsError | None:
    try:
        load(path)
    except Pytree2SafetensorsError as error:
        return error
    return None

"""Keeps what tox found in docs/compatibility.json, for the table of the compatibility page.

    tox run -m jax --result-json results.json
    python docs/_ext/environments.py results.json

Later results replace earlier ones of the same environment.
"""

import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parents[1] / "compatibility.json"
PACKAGES = ("jax", "numpy", "safetensors")
VERSION = re.compile(r"\bPython ([0-9]+\.[0-9]+\.[0-9]+)")
OTHERS = ("types", "docs", "coverage", "links")  # which have JAX, and ask something else


def condense(path: Path) -> dict[str, dict[str, str]]:
    """Take from tox's results what the table shows: of environments that tested with JAX."""
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    day = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).date().isoformat()
    found = {}
    for name, environment in result["testenvs"].items():
        if name.startswith(".") or not environment.get("test"):
            continue
        installed = dict(
            line.split("==") for line in environment["installed_packages"] if "==" in line
        )
        if "jax" not in installed or name in OTHERS:
            continue
        passed = all(command["retcode"] == 0 for command in environment["test"])
        printed = "".join(command["output"] for command in environment["test"])
        version = VERSION.search(printed)  # which tox knows by its minor release alone
        if version is None:
            raise ValueError(f"{path}: {name} does not print its Python's version")
        found[name] = {
            "date": day,
            "python": version[1],
            **{package: installed[package] for package in PACKAGES},
            "result": "passes" if passed else "fails",
        }
    return found


def table() -> list[str]:
    """Write the table, newest JAX first."""
    if not KEPT.exists():
        return ["No results have been published for this version yet."]
    kept = json.loads(KEPT.read_text("utf-8"))
    lines = [
        "| environment | Python | JAX | NumPy | safetensors | tests | run on |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(
        ([[int(part) for part in kept[name]["jax"].split(".")], name] for name in kept),
        reverse=True,
    )
    for _, name in rows:
        cells = kept[name]
        columns = ("python", *PACKAGES, "result", "date")
        shown = [cells[column] for column in columns]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Merge the results that are named on the command line."""
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    for path in sys.argv[1:]:
        kept |= condense(Path(path))
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()

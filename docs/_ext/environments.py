"""Keeps what tox found in docs/compatibility.json, for the table of the compatibility page.

    tox run -m jax --result-json results.json
    python docs/_ext/environments.py results.json

Later results replace earlier ones of the same environment.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parents[1] / "compatibility.json"
PYTHON = re.compile(r"^Python (\S+)", re.MULTILINE)  # in what the first command prints
PACKAGES = ("jax", "numpy", "safetensors")


def condense(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Take from tox's result what the table shows."""
    found = {}
    for name, environment in result["testenvs"].items():
        if not name.startswith("py") or not environment.get("test"):
            continue
        installed = dict(
            line.split("==") for line in environment["installed_packages"] if "==" in line
        )
        passed = all(command["retcode"] == 0 for command in environment["test"])
        found[name] = {
            "python": PYTHON.search(environment["test"][0]["output"])[1],
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
        "| environment | Python | JAX | NumPy | safetensors | tests |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(
        ([[int(part) for part in kept[name]["jax"].split(".")], name] for name in kept),
        reverse=True,
    )
    for _, name in rows:
        cells = kept[name]
        shown = [cells["python"], *(cells[package] for package in PACKAGES), cells["result"]]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Merge the results that are named on the command line."""
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    for path in sys.argv[1:]:
        kept |= condense(json.loads(Path(path).read_text("utf-8")))
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()

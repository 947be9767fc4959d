"""The README's first command does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_the_quickstart_loads_what_it_saved(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    pytest.importorskip("sklearn")
    # With one device, as on the machine of whoever runs it first.
    environment = {**os.environ, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [line.split()[-2:] for line in run.stdout.splitlines() if line.startswith("  ")]
    tables = [row for row in rows if row[0].startswith("0.")]
    assert len(tables) == 3
    assert all(here == there for here, there in tables)
    assert "Every bit of 20 leaves is the same" in run.stdout
    assert "params@layers#0@w" in run.stdout
    assert not list(tmp_path.iterdir())

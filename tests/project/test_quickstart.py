"""The example that the README tells to run does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_the_quickstart_loads_what_it_saved(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    pytest.importorskip("sklearn")
    # With one device, as on the machine of a new user.
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
    verdict, _, _, *rows = run.stdout.splitlines()
    assert verdict == "PASSED: all 14 leaves have equal bits in both processes."
    accuracies = [row.split()[-2:] for row in rows[:3]]
    assert all(here == there and float(here) > 0.95 for here, there in accuracies)
    listing = run.stdout.partition("lists them:\n\n")[2].splitlines()
    assert any("layers" in line for line in listing)
    assert len(listing) <= 15
    assert not list(tmp_path.iterdir())

"""An interrupt may occur anywhere: files stay whole, nothing is left behind, and later saves work."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(sys.platform != "linux", reason="nothing says which descriptors are open"),
]

# Of each operation; they have 2,000 to 9,000.
POSITIONS = int(os.environ.get("INTERRUPTS", settings().max_examples // 2))
SEED = os.environ.get(
    "HOSTILE_SEED", "0" if settings().derandomize else f"{random.SystemRandom().random()}"
)


def test_an_interrupt_leaves_the_old_or_the_new_and_nothing_else() -> None:
    script = Path(__file__).parents[1] / "interrupts.py"
    run = subprocess.run(
        [sys.executable, str(script), str(POSITIONS), SEED],
        capture_output=True, text=True, check=False, timeout=3600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stdout, f"with seed {SEED}:\n{run.stdout}"

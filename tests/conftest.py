"""The settings of all tests: eight CPU devices, and one of three Hypothesis profiles."""

# The package itself is not imported here: what a conftest imports can escape the runtime type checks.
import os
import sys

# Before JAX looks at them, and for the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from command import Run

# jaxtyping's plugin may have imported JAX, which reads its variables then.
jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call] # JAX gives it no types

# No deadline: compilation makes a first example slow. No health check of speed: machines share their cores.
settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
for _name, _examples in (("random", 2_000), ("thorough", 20_000)):
    settings.register_profile(
        _name,
        derandomize=False,
        deadline=None,
        max_examples=_examples,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _eight_cpu_devices() -> None:
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


@pytest.fixture(scope="session", autouse=True)
def _processes_end() -> Iterator[None]:
    """End the processes that tests share, before the coverage of all processes is added up."""
    yield
    if "together" in sys.modules:
        sys.modules["together"].end_all()


# --- for tests of the command -----------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    """Run the command on a screen of some columns."""
    # What a conftest imports at its top can escape the runtime type checks.
    from pytree2safetensors._cli.main import main

    def run(*arguments: str, columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main(arguments)
        except SystemExit as ended:  # argparse refuses
            assert isinstance(ended.code, int)
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

"""The settings of all tests: eight CPU devices, and one of three Hypothesis profiles."""

# The package itself is not imported here: what a conftest imports can escape the runtime type checks.
import functools
import itertools
import os
import sys

# Before JAX looks at them, and for the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

from collections.abc import Callable, Iterator
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Free JAX's compiled programs after every 1,000 examples of a property.

    A program takes three memory maps, and Linux allows a process 65,530. XLA crashes beyond that.
    """
    numbers = itertools.count(1)

    def freeing(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def call(*args: object, **options: object) -> None:
            if next(numbers) % 1_000 == 0:
                jax.clear_caches()  # type: ignore[no-untyped-call] # JAX gives it no types
            run(*args, **options)

        return call

    handles = (getattr(getattr(item, "obj", None), "hypothesis", None) for item in items)
    for handle in {id(handle): handle for handle in handles}.values():  # cases share their handle
        if handle is not None:
            handle.inner_test = freeing(handle.inner_test)


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

"""A folder for each test, and the command on a screen of some width."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Run


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

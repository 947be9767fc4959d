"""The functions of the guide "Checkpoints by step" survive a kill before each of their lines."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from upath import UPath

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "checkpoints.md"
SCORES = [0.5, 0.9, 0.1, 0.2, 0.3, 0.4]


class Killed(BaseException):
    """The process ends here."""


def guide() -> types.SimpleNamespace:
    """Execute the first block of the page."""
    code = GUIDE.read_text("utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    return types.SimpleNamespace(**names)


def kill_before_line(number: int, code: CodeType, call: Callable[[], object]) -> bool:
    """Call a function, and end it before a given line; return whether it was ended."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code is not code:
            return None
        left -= event == "line"
        if not left:
            raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("step", range(1, 7))
def test_a_kill_before_any_line_leaves_checkpoints(step: int, tmp_path: Path) -> None:
    names = guide()
    line = 0
    killed = True
    while killed:
        line += 1
        folder = tmp_path / str(line)
        folder.mkdir()
        for done in range(1, step):
            names.save_step(folder, {"step": done}, done, SCORES[done - 1], {}, keep=2)

        def save(folder: Path = folder) -> None:
            names.save_step(folder, {"step": step}, step, SCORES[step - 1], {}, keep=2)

        killed = kill_before_line(line, names.save_step.__code__, save)
        found = names.resume(folder, {"step": 0})
        assert found in ({"step": step}, {"step": step - 1} if step > 1 else None)
        saved = found["step"] if found else 0
        if saved:
            best = max(names.checkpoints(folder), key=names.score_of)
            assert names.score_of(best) == max(SCORES[:saved])
        save()
        assert names.resume(folder, {"step": 0}) == {"step": step}
        newest = {*range(max(1, step - 1), step + 1)}
        best_step = max(range(1, step + 1), key=lambda number: SCORES[number - 1])
        kept = {int(path.stem.removeprefix("step-")) for path in names.checkpoints(folder)}
        assert kept == newest | {best_step}
    assert line > 5, "no line was reached"


def test_nan_is_never_the_best_score(tmp_path: Path) -> None:
    names = guide()
    for step, score in enumerate([float("nan"), 0.5, float("nan"), 0.1, 0.2]):
        names.save_step(tmp_path, {"step": step}, step, score, {}, keep=2)
    steps = [int(path.stem.removeprefix("step-")) for path in names.checkpoints(tmp_path)]
    assert steps == [1, 3, 4]


def test_a_bucket_keeps_the_newest_checkpoints_and_the_best() -> None:
    names, folder = guide(), UPath("memory://checkpoints-by-step/run")
    assert names.resume(folder, {"step": 0}) is None
    for step, score in enumerate(SCORES):
        names.save_step(folder, {"step": step}, step, score, {}, keep=2)
        assert names.resume(folder, {"step": 0}) == {"step": step}
    assert [path.name for path in names.checkpoints(folder)] == [
        f"step-0000000{step}.safetensors" for step in (1, 4, 5)
    ]


@pytest.mark.parametrize("url", ["memory://run", "s3://bucket/run"])
def test_a_url_that_is_no_path_in_a_bucket_makes_no_local_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = guide()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AttributeError):
        names.resume(url, {"step": 0})
    with pytest.raises(TypeError):
        names.save_step(url, {"step": 0}, 0, 0.5, {})
    with pytest.raises(ValueError, match="looks like a URL whose slashes pathlib has joined"):
        names.save_step(Path(url), {"step": 0}, 0, 0.5, {})
    assert [*tmp_path.iterdir()] == []

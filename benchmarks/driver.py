"""Start the workers, one at a time, and collect what they print."""

import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systems import SYSTEMS
from workloads import WORKLOADS

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
SAMPLE_SECONDS = 0.002
HOST_MEMORY = ("RssAnon", "RssShmem")  # pinned memory is counted in the second
MEMORY = {"save": 1.6, "load": 2.6}  # in units of the data, backed before each run


@dataclass(frozen=True)
class Cell:
    """What one figure is about."""

    workload: str
    system: str
    op: str


@dataclass
class Driver:
    """The settings of one comparison, and what it found."""

    folder: Path
    scale: float
    timeout: float
    pythons: dict[str, str]
    failures: dict[Cell, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, cell: Cell, path: Path, round_number: int, watch: bool = False) -> bool:
        """Run one worker; a cell that failed once is not tried again."""
        if cell in self.failures:
            return False
        try:
            answer = self._work(cell, path, watch)
            if not answer.get("same", True):
                raise WorkerError("other bits than were saved")
        except WorkerError as error:
            self.failures[cell] = str(error)
            print(f"  {cell.workload} {cell.op} {cell.system}: {error}", flush=True)
            return False
        self.runs.append(
            vars(cell) | {"round": round_number, "watched": watch, "bytes": size(path)} | answer
        )
        print(
            f"  {cell.workload} {cell.op} {cell.system}: {answer['wall']:.3f} s, cpu {answer['cpu']:.3f} s",
            flush=True,
        )
        return True

    def _work(self, cell: Cell, path: Path, watch: bool) -> dict[str, Any]:
        task = vars(cell) | {
            "scale": self.scale,
            "path": str(path),
            "memory": MEMORY[cell.op],
            "check": watch,
        }
        environment = SYSTEMS[cell.system].environment
        with (self.folder / "errors").open("w+") as errors:
            process = subprocess.Popen(
                [self.pythons[environment], str(HERE / "worker.py"), json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=surroundings(environment, WORKLOADS[cell.workload].devices),
            )
            timer = threading.Timer(self.timeout, process.kill)
            timer.start()
            try:
                answer = _converse(process, watch)
            finally:
                timer.cancel()
                process.kill()
                process.wait()
            if answer is None:
                errors.seek(0)
                raise WorkerError(
                    reason(
                        errors.read().replace(str(HERE.parent), ""),
                        process.returncode,
                        self.timeout,
                    )
                )
        return answer


class WorkerError(Exception):
    """A worker that ended without a result."""


def reason(errors: str, code: int, timeout: float) -> str:
    """Say in a line why a worker gave no result."""
    lines = [line for line in errors.splitlines() if line.strip()]
    if lines and not lines[-1].startswith(" ") and "Error" in errors:
        return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:200]
    return f"no result within {timeout:.0f} s" if code == -9 else f"exit code {code}"


def surroundings(environment: str, devices: int) -> dict[str, str]:
    """Return a worker's environment variables."""
    flags = (
        {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    )
    source = {"PYTHONPATH": str(SOURCE)} if environment == "here" else {}
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")
    }
    return inherited | {"JAX_PLATFORMS": "cpu"} | flags | source


def _converse(process: "subprocess.Popen[str]", watch: bool) -> dict[str, Any] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    watcher = None
    for line in process.stdout:
        word, _, rest = line.partition(" ")
        if word.strip() == "READY":
            process.stdin.write("go\n")
            process.stdin.flush()
        elif word == "START" and watch:
            watcher = Watcher(process.pid, int(rest))
        elif word.strip() == "END" and watcher:
            watcher.stop()
        elif word == "RESULT":
            answer: dict[str, Any] = json.loads(rest)
            return answer | ({"anonymous": watcher.stop()} if watcher else {})
    if watcher:
        watcher.stop()
    return None


def memory_of(process: int, fields: tuple[str, ...]) -> int:
    """Add up fields of a process's status, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(fields))


class Watcher:
    """Sample the anonymous memory of a process: unlike its peak, that leaves out the pages of mapped files."""

    def __init__(self, process: int, start: int, fields: tuple[str, ...] = ("RssAnon",)) -> None:
        self.process = process
        self.fields = fields
        self.start = start
        self.highest = start
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        with suppress(OSError):  # the process may be gone
            while not self.ended.is_set():
                self.highest = max(self.highest, memory_of(self.process, self.fields))
                time.sleep(SAMPLE_SECONDS)

    def stop(self) -> int:
        """End the sampling and return the highest value over the first."""
        self.ended.set()
        self.thread.join()
        return self.highest - self.start


def size(path: Path) -> int:
    """Count the bytes of a file or of a folder's files."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

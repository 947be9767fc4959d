"""Measure loads onto an accelerator and saves from it, against the limits of the machine and other libraries.

    pip install -e . flax orbax-checkpoint
    python benchmarks/accelerator.py

It needs Linux, and takes up to five minutes on one GPU. It leaves out, and names, what does not fit. It uses
the first device that JAX finds. On a CPU it shows, with small trees, that everything runs, and says nothing about
accelerators. A whole run on an accelerator writes to docs/benchmarks: `accelerator.json` (every run),
`accelerator.rst` (tables) and `accelerator.svg`; any other run only writes where --output says.

How to read it. Each system does one task in a process of its own, which has imported the library and used the
device before: that costs a second and some gigabytes of JAX's. "First" is the first run in the process, which pins
memory and compiles; "again" is the median of the later runs, where there was time for any. Files are in the page
cache, and saves do not flush them. Host memory is the highest anonymous and pinned memory over what there was before.
The bits of what was loaded are compared.

The limits: copies of 64 MiB from pinned memory to the device, and back; reads of a file by as many threads as there
are processors (16 at most) into memory that is used again; writes by one thread into a file whose space is reserved.
A load can be no faster than the slower of the first and the third, and a save no faster than the slower of the other
two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import accelerator_report as report
from accelerator_report import FOLDER, MODEL, OURS, SMALL
from driver import HOST_MEMORY, SOURCE, Watcher, reason, remove
from environment import machine, this_version, versions

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "docs" / "benchmarks"
MOST = 20_000_000_000  # bytes of the tree
ON_CPU = 200_000_000
LEAVES = 20_000
ASK = """
import jax, json
device = jax.devices()[0]
limit = (device.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([device.platform, device.device_kind, limit]))
"""


class Task(NamedTuple):
    """What one process does."""

    system: str
    workload: str
    op: str

    @property
    def file(self) -> str:
        """The name of the file or folder that it writes or reads."""
        return f"{self.workload}-{self.system}".replace(" ", "-")


FLAX, ORBAX, BY_HAND = "safetensors.flax", "orbax", "by hand"
# In this order, as time may run out; a file is removed after the last task that uses it.
TASKS = (
    Task("", MODEL, "limits"),
    Task(OURS, MODEL, "save"),
    Task(OURS, MODEL, "load"),
    Task(BY_HAND, MODEL, "save"),
    Task(BY_HAND, MODEL, "load"),
    Task(OURS, MODEL, "background"),
    Task(OURS, FOLDER, "save"),
    Task(OURS, FOLDER, "load"),
    Task(OURS, SMALL, "save"),
    Task(OURS, SMALL, "load"),
    Task(FLAX, MODEL, "save"),
    Task(FLAX, MODEL, "load"),
    Task(ORBAX, FOLDER, "save"),
    Task(ORBAX, FOLDER, "load"),
    *(Task(name, SMALL, op) for name in (FLAX, ORBAX) for op in ("save", "load")),
)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bytes", type=float, help="size of the tree (default: 20e9, or what fits)"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=[OURS, FLAX, ORBAX, BY_HAND], metavar="SYSTEM"
    )
    parser.add_argument("--seconds", type=float, default=280, help="start nothing after these")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one process")
    parser.add_argument("--folder", type=Path, help="where files are written (default: temporary)")
    parser.add_argument("--commit", default="", help="the name of this checkout (default: git's)")
    parser.add_argument("--output", type=Path, help="where the results are written")
    return parser.parse_args()


class Failure(Exception):
    """A process that ended without a result."""


def run(task: Task, details: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Run one process, watch its memory, and return what it found."""
    given = task._asdict() | details | {"path": str(folder / task.file)}
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "accelerator_worker.py"), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), *inherited()])},
        )
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            answer = listen(process)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if answer is None:
            errors.seek(0)
            raise Failure(reason(errors.read(), process.returncode, timeout))
    if not answer.get("same", True):
        raise Failure("other bits than were saved")
    return answer


def inherited() -> list[str]:
    """Return the places where packages may be beside the usual ones."""
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def listen(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Follow a worker; watch its memory between its START and its END."""
    assert process.stdout is not None
    watcher = None
    answer = None
    for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        if word == "START":
            watcher = Watcher(process.pid, int(rest), HOST_MEMORY)
        elif word == "END" and watcher:
            watcher.stop()
        elif word == "RESULT":
            answer = json.loads(rest)
    peak = watcher.stop() if watcher else 0
    return None if answer is None else answer | {"host memory": peak}


def measure(
    options: argparse.Namespace, folder: Path, result: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Do all tasks, in order, as long as there is time; give what is known after each."""
    start = time.monotonic()
    chosen = [task for task in TASKS if task.system in {"", *(options.systems or [task.system])}]
    details = {"bytes": result["bytes"], "leaves": result["leaves"]}
    for position, task in enumerate(chosen):
        what = " ".join(filter(None, [task.workload, task.op, task.system]))
        left = options.seconds - (time.monotonic() - start)
        try:
            if left <= 0:
                raise Failure("no time was left")
            if task.op == "load" and not (folder / task.file).exists():
                raise Failure("nothing was saved")
            details["folder"] = task.workload == FOLDER
            answer = run(task, details, folder, options.timeout)
        except Failure as failure:
            result["failures"].append({"what": what, "reason": str(failure)})
            print(f"  {what}: {failure}", flush=True)
        else:
            result["runs"].append(task._asdict() | answer)
            print(f"  {what}: {said(answer)}", flush=True)
        if all(later.file != task.file for later in chosen[position + 1 :]):
            remove(folder / task.file)
        yield result


def said(answer: dict[str, Any]) -> str:
    """Sum up an answer in a line."""
    if "saves" in answer:
        return ", ".join(
            f"call {save['call']:.3f} s of {save['total']:.3f} s" for save in answer["saves"]
        )
    if isinstance(answer["seconds"], dict):
        rates = {name: answer["bytes"] / median(found) for name, found in answer["seconds"].items()}
        return ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items())
    runs = ", ".join(f"{seconds:.3f}" for seconds in answer["seconds"])
    return f"{runs} s; {answer['host memory'] / 1e6:.0f} MB of host memory"


def warm(path: Path, nbytes: int) -> None:
    """Write as many bytes and remove them: a virtual machine gets its memory at the first use."""
    block = bytes(16 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, nbytes, len(block)):
            file.write(block)
    remove(path)


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    platform, kind, limit = json.loads(asked.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        result: dict[str, Any] = {
            "device": kind,
            "platform": platform,
            "machine": machine(folder),
            "versions": versions(),
            "commit": options.commit or this_version(),
            "bytes": int(
                options.bytes or (ON_CPU if platform == "cpu" else fitting(folder, limit))
            ),
            "leaves": LEAVES if platform != "cpu" else LEAVES // 10,
            "failures": [],
            "runs": [],
        }
        print(report.about(result), flush=True)
        warm(folder / "warm", result["bytes"])
        output = options.output
        if platform != "cpu" and not options.systems and not output:
            output = OUTPUT
        for so_far in measure(options, folder, result):
            if output:  # what is there stays, whatever happens to the rest
                report.write(so_far, output)
    print(report.as_text(result))


def fitting(folder: Path, limit: int) -> int:
    """Say how large a tree may be: the device holds it twice, the disk three times, and the page cache twice."""
    disk = os.statvfs(folder)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MOST, limit // 3 if limit else MOST, disk.f_bavail * disk.f_frsize // 3, memory // 4)


if __name__ == "__main__":
    main()

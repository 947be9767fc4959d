"""Measure this library against the others that save trees of JAX arrays, and against the bytes alone.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py                    # everything; half an hour, 8 GB of memory and of disk
    python benchmarks/compare.py --quick            # small trees, one round: shows that everything runs
    python benchmarks/compare.py --workloads many state --systems pytree2safetensors safetensors --rounds 7

It needs Linux. The library is taken from this checkout; the original 0.1.4 gets an environment of its own, made on
the first run and kept in benchmarks/.cache. Every run is a process of its own; the systems take turns, so that a
machine whose speed drifts is slow for all of them. The results go to docs/benchmarks: `speed.json` (every run),
`speed.rst` (tables) and the charts; a run with --quick or of less than everything prints, and writes only where
--output says, after each workload.

How to read it. Times of saving are without a flush to the disk, as all the peers save, unless it
says "flushed". The baseline writes the bytes after `fallocate`, and reads them with two threads into
fresh memory. Extra memory is the highest resident memory over what there was before; mapped pages
of the file count in it, and "anonymous" leaves them out. Before each run a small tree of the same
kind is saved and loaded (so what a first load of many equal leaves compiles is in "first load"
alone), the file is in the page cache, and the memory that the run is about to use is touched once
and given back: on a virtual machine the first touch of memory costs twenty times what the second
does, and is what one would measure otherwise. One run in each cell is watched for
its memory and its result, which is compared bit by bit; its time does not count. Where one core does
all the work (many and state), "times ours" compares CPU time, and wall time elsewhere.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import chart
import report
from driver import SOURCE, Cell, Driver, remove
from environment import machine, original_python, this_version, versions
from systems import SYSTEMS, TREES
from workloads import WORKLOADS

QUICK_SCALE = 1 / 32
OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks"
IMPORT = """
import resource, sys
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
import jax, safetensors.flax, jaxtyping, beartype
start = cpu()
import pytree2safetensors
pytree2safetensors.save_pytree
print(cpu() - start)
"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="trees of a 32nd of the size, one round"
    )
    parser.add_argument("--rounds", type=int, help="runs that count in each cell (default 3)")
    parser.add_argument("--scale", type=float, help="size of the trees (default 1)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120,
        help="seconds for one worker, its preparations included",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the files are written (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, help="where the results are written")
    return parser.parse_args()


def measure(driver: Driver, workload: str, systems: list[str], rounds: int) -> None:
    """Measure one workload: first every save and load once, watched, then `rounds` times in turn."""
    mine = [name for name in systems if workload in SYSTEMS[name].workloads]
    writers = dict.fromkeys(SYSTEMS[name].written_by or name for name in mine)
    files = {name: driver.folder / f"{workload}-{i}" for i, name in enumerate(writers)}
    for name, path in files.items():
        driver.run(Cell(workload, name, "save"), path, 0, watch=True)
    for turn in range(rounds + 1):
        first = turn % len(mine)  # the order differs, because each leaves data to write to the next
        for name in mine[first:] + mine[:first]:
            system = SYSTEMS[name]
            file = files[system.written_by or name]
            if turn and system.saves and name in files and workload in TREES:
                again = driver.folder / f"{workload}-again"
                driver.run(Cell(workload, name, "save"), again, turn)
                remove(again)
            saved = Cell(workload, system.written_by or name, "save") not in driver.failures
            if system.loads and saved:
                driver.run(Cell(workload, name, "load"), file, turn, watch=turn == 0)
    for path in files.values():
        remove(path)


def import_times(pythons: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Time the import of the package over that of its dependencies."""
    names = {"here": "this library", "original": "original 0.1.4"}
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for key, python in pythons.items():
            source = {"PYTHONPATH": str(SOURCE)} if key == "here" else {}
            program = IMPORT if key == "here" else IMPORT.replace(", beartype", "")
            run = subprocess.run(
                [python, "-c", program],
                # What is installed has its bytecode.
                env=os.environ | source | {"PYTHONDONTWRITEBYTECODE": ""},
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode == 0:
                times.setdefault(names[key], []).append(float(run.stdout))
    return {name: found[1:] for name, found in times.items()}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the temporary folder goes all the same
    scale = options.scale or (QUICK_SCALE if options.quick else 1)
    rounds = options.rounds or (1 if options.quick else 3)
    whole = options.workloads == list(WORKLOADS) and options.systems == list(SYSTEMS) and scale == 1
    pythons = {"here": sys.executable, "original": original_python()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        driver = Driver(folder, scale, options.timeout, pythons)
        result: dict[str, Any] = {
            "machine": machine(folder),
            "versions": versions(),
            "commit": this_version(),
            "rounds": rounds,
            "scale": scale,
            "imports": import_times(pythons, max(rounds, 3)),
            "failures": [],
            "runs": driver.runs,
        }
        for workload in options.workloads:
            print(WORKLOADS[workload].title, flush=True)
            measure(driver, workload, options.systems, rounds)
            failures = driver.failures.items()
            result["failures"] = [vars(cell) | {"reason": why} for cell, why in failures]
            if options.output:  # what is there stays, whatever happens to the rest
                write(result, options.output)
    print(report.as_text(result))
    if whole and not options.output:
        write(result, OUTPUT)


def write(result: dict[str, Any], output: Path) -> None:
    """Write the files that the documentation includes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "speed.rst").write_text(report.as_rst(result))
    chart.write(result, output)


if __name__ == "__main__":
    main()

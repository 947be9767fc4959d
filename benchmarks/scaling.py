"""Measure what a leaf costs, and how cost grows with the number of leaves.

    python benchmarks/scaling.py            # 1,000 to 1,000,000 leaves
    python benchmarks/scaling.py --sizes 1000 10000

Each size is a process of its own. Each step is run several times, and the table shows the least CPU time of a run
for each leaf, in microseconds: the first call, which may compile, never counts, and neither does time that other
processes took. Beside the library's functions stand what they are compared with: JAX's own flattening, and the
parsing of a JSON list of the names. The result goes to docs/benchmarks/scaling.rst where the sizes are the default.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rst
from driver import surroundings
from environment import machine, this_version, versions

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SECONDS = 1.0
AT_LEAST = 2
OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks"


def steps(leaves: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the steps to measure, on a tree of that many leaves."""
    import jax
    from workloads import fill, many

    import pytree2safetensors as library

    tree = fill(many(leaves / 100_000))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    flat = library.pytree2dict(tree)
    names = list(flat)
    text = json.dumps(names)
    path = folder / "tree.safetensors"
    return {
        "jax.tree_util.tree_flatten_with_path": lambda: jax.tree_util.tree_flatten_with_path(tree),
        "pytree2dict": lambda: library.pytree2dict(tree),
        "keypath2string of every path": lambda: [library.keypath2string(p) for p in paths],
        "json.loads of the names": lambda: json.loads(text),
        "string2keypath of every name": lambda: [library.string2keypath(name) for name in names],
        "dict2pytree": lambda: library.dict2pytree(flat),
        "set_weights": lambda: library.set_weights(tree, flat),
        "save_pytree, durable=False": lambda: library.save_pytree(tree, path, durable=False),
        "load_pytree": lambda: library.load_pytree(path),
        "load_into_pytree": lambda: library.load_into_pytree(tree, path),
        "load_abstract": lambda: library.load_abstract(path),
    }


def least(step: Callable[[], Any]) -> float:
    """Run a step several times after a first that does not count, and return its least CPU time."""
    step()
    gc.collect()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while len(times) < AT_LEAST or time.monotonic() < end:
        start = time.process_time()
        result = step()
        times.append(time.process_time() - start)
        del result
    return min(times)


def work(leaves: int) -> None:
    """Measure every step at one size and print microseconds a leaf as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: least(step) / leaves * 1e6 for name, step in steps(leaves, Path(folder)).items()
        }
    print(json.dumps(found))


def main() -> None:
    """Start a process for each size, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    found = {leaves: start(leaves) for leaves in options.sizes}
    head = ["µs a leaf", *(f"{leaves:,} leaves" for leaves in found)]
    names = list(next(iter(found.values())))
    rows = [[name, *(f"{found[leaves][name]:.2f}" for leaves in found)] for name in names]
    print(rst.plain(head, rows))
    if options.output or tuple(options.sizes) == SIZES:
        write(options.output or OUTPUT, head, rows)


def start(leaves: int) -> dict[str, float]:
    """Measure one size in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--worker", str(leaves)],
        env=surroundings("here", 1),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def write(output: Path, head: list[str], rows: list[list[str]]) -> None:
    """Write the table that the documentation includes."""
    output.mkdir(parents=True, exist_ok=True)
    used = versions()
    place = ", ".join(machine(Path(tempfile.gettempdir())).values())
    about = (
        f"Measured on {place}; python {used['python']}, jax {used['jax']}; this library at {this_version()}."
        " Trees of dicts and lists, five deep; leaves of shape (4,); least CPU time of several runs.\n"
    )
    code = [[f"``{row[0]}``" if "of" not in row[0].split() else row[0], *row[1:]] for row in rows]
    text = about + "\n" + rst.table("What a leaf costs", head, code)
    (output / "scaling.rst").write_text(text)


if __name__ == "__main__":
    main()

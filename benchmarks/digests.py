"""What digests cost: saves and loads with and without them, against hashing the data on one core.

`checksum=True` takes SHA-256, for which most processors have instructions of their own. The second
part shows the other digests of the standard library. Files are in memory, so that no disk disturbs the times.

    python benchmarks/digests.py [--small]
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import jax
import numpy as np
from rst import plain, table

from pytree2safetensors import load_pytree, save_pytree

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "digests.rst"
ROUNDS = 5
DIGESTS: dict[str, Callable[[memoryview], object]] = {
    "sha256": hashlib.sha256,
    "sha1": hashlib.sha1,
    "blake2b": hashlib.blake2b,
    "md5": hashlib.md5,
    "crc32": zlib.crc32,
}


def seconds(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Measure works in turn, so that what else runs disturbs all alike; the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            found[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in found.items()}


def saves_and_loads(tree: Any, folder: Path) -> dict[str, Callable[[], object]]:
    """Return saves to a file, a folder and a stream, and the loads of what they save."""

    def save(target: Path, how: str, checksum: bool) -> None:
        options: dict[str, Any] = {"durable": False, "checksum": checksum}
        if how == "stream":
            with target.open("wb") as stream:
                save_pytree(tree, stream, checksum=checksum)
        elif how == "folder":
            shutil.rmtree(target, ignore_errors=True)
            save_pytree(tree, target, max_shard_size="200MB", **options)
        else:
            target.unlink(missing_ok=True)
            save_pytree(tree, target, **options)

    def load(target: Path, how: str) -> Any:
        if how != "stream":
            return load_pytree(target)
        with target.open("rb") as stream:
            return load_pytree(stream)

    works: dict[str, Callable[[], object]] = {}
    for how in ("file", "folder", "stream"):
        for checksum in (False, True):
            target = folder / f"{how}-{checksum}"
            works[f"save {how} {checksum}"] = lambda t=target, h=how, c=checksum: save(t, h, c)
            works[f"load {how} {checksum}"] = lambda t=target, h=how: load(t, h)
    return works


def spread(values: list[float]) -> str:
    """Write the median of some values, and their range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="data of some megabytes; write no table"
    )
    small = parser.parse_args().small
    size = (8 << 20) if small else (1 << 30)
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    tree = {f"w{n}": jax.numpy.asarray(part) for n, part in enumerate(np.split(data, 8))}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # no disk is written meanwhile
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        works = saves_and_loads(tree, Path(folder))
        found = seconds({"hash": lambda: hashlib.sha256(data.data), **works})
    one_core = statistics.median(found["hash"])
    rows = [["hash on one core", "", spread(found["hash"]), ""]]
    for how in ("file", "folder", "stream"):
        for what in ("save", "load"):
            without, digested = (found[f"{what} {how} {checksum}"] for checksum in (False, True))
            cost = (statistics.median(digested) - statistics.median(without)) / one_core
            rows.append([f"{what} a {how}", spread(without), spread(digested), f"{cost:.2f}"])
    head = ["", "seconds", "with digests", "cost / hashing on one core"]
    versions = (
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, median of {ROUNDS} (range)"
    )
    print(versions, plain(head, rows), sep="\n\n")
    if not small:
        OUTPUT.write_text(table(f"Digests of 1 GiB; {versions}", head, rows))
    part = data[: 256 << 20].data
    rates = seconds({name: lambda d=digest: d(part) for name, digest in DIGESTS.items()})
    gigabytes = {name: [len(part) / 1e9 / second for second in rates[name]] for name in rates}
    print("", plain(["digest", "GB/s"], [[n, spread(v)] for n, v in gigabytes.items()]), sep="\n")


if __name__ == "__main__":
    main()

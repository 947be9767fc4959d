"""What a web server's latency costs: a file of 1 GiB, loaded over HTTP from another process.

The server is that of the tests, on this machine. Without latency the two share its cores, so that the
row without latency is what these give.

    python benchmarks/remote.py [--small]
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fsspec
import jax
import numpy as np
from rst import table

import pytree2safetensors as p2s
from web_server import web_server

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "remote.rst"
BLOCK = 16 << 20  # bytes of one request by hand
ROUNDS = 3


def serve(path: str, delay: float, pipe: Any) -> None:
    """Serve a file until the other end of the pipe says that it is enough."""
    with web_server() as server:
        server.files["/file"], server.delay = Path(path).read_bytes(), delay
        pipe.send(f"{server.url}/file")
        pipe.recv()


def load(url: str) -> None:
    jax.block_until_ready(p2s.load_pytree(url))


def one_after_the_other(url: str) -> None:
    """Read with fsspec as users do: one range, then the next."""
    with fsspec.open(url, "rb", block_size=BLOCK) as file:
        while file.read(BLOCK):
            pass


def one_request(url: str) -> None:
    with urllib.request.urlopen(url) as answer:
        while answer.read(1 << 20):
            pass


WAYS = {
    "load_pytree": load,
    "fsspec, ranges of 16 MiB one after the other": one_after_the_other,
    "one request for the whole file": one_request,
}


def measure(path: Path, delay: float) -> dict[str, list[float]]:
    """Take the seconds of each way, in turns."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=serve, args=(str(path), delay, theirs))
    server.start()
    url = mine.recv()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, run in WAYS.items():
            start = time.perf_counter()
            run(url)
            found[way].append(time.perf_counter() - start)
    mine.send("enough")
    server.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="64 MiB, and nothing is written")
    small = parser.parse_args().small
    count = 4 if small else 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        p2s.save_pytree([np.full(4 << 20, i, np.float32) for i in range(count)], path)
        rows = []
        for delay in (0.0, 0.1):
            for way, seconds in measure(path, delay).items():
                spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
                row = [f"{delay * 1000:.0f} ms", way, f"{statistics.median(seconds):.2f}", spread]
                print(*row, sep="  ", flush=True)
                rows.append(row)
    versions = f"JAX {jax.__version__}, fsspec {fsspec.__version__}, {os.cpu_count()} cores"
    print(versions)
    if not small:
        head = ["latency of a request", "way", "seconds, median", "spread"]
        title = f"1 GiB over HTTP on one machine; {versions}, {ROUNDS} rounds"
        OUTPUT.write_text(table(title, head, rows))


if __name__ == "__main__":
    main()

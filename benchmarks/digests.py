"""How fast the standard library digests memory, on this machine.

`checksum=True` takes SHA-256, for which most processors have instructions of their own.

    python benchmarks/digests.py
"""

import hashlib
import statistics
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np

SIZE = 256 << 20
ROUNDS = 5
DIGESTS: dict[str, Callable[[memoryview], object]] = {
    "sha256": hashlib.sha256,
    "sha1": hashlib.sha1,
    "blake2b": hashlib.blake2b,
    "md5": hashlib.md5,
    "crc32": zlib.crc32,
}


def main() -> None:
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).data
    rates: dict[str, list[float]] = {name: [] for name in DIGESTS}
    for _ in range(ROUNDS):  # interleaved, so that what else runs disturbs all alike
        for name, digest in DIGESTS.items():
            start = time.perf_counter()
            digest(data)
            rates[name].append(SIZE / 1e9 / (time.perf_counter() - start))
    print(f"Python {sys.version.split()[0]}, {SIZE >> 20} MiB, median of {ROUNDS} (range), GB/s")
    for name, found in rates.items():
        print(f"{name:8} {statistics.median(found):5.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()

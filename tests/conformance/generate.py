"""Write the conformance kit, from fixed trees, strategies with a fixed seed, and tables of what is refused.

    python tests/conformance/generate.py

What it writes is committed. Another version of Hypothesis draws other trees.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance import accepted, refused, tables
from conformance.writing import OPTIONAL, Kit


def main() -> None:
    warnings.filterwarnings("ignore", "JAX does not support the dtypes")
    kit = Kit(Path(__file__).parent / "kit")
    for add in (*accepted.PARTS, *refused.PARTS):
        add(kit)
    kit.problems += [f"no message has: {part}" for part in OPTIONAL if part not in kit.optional]
    kit.write("accepted.json", kit.accepted)
    kit.write("refused.json", kit.refused)
    kit.write("keypaths.json", tables.key_paths())
    kit.write("values.json", tables.small_values())
    size = sum(path.stat().st_size for path in kit.folder.rglob("*") if path.is_file())
    print("\n".join(kit.problems))
    print(f"{len(kit.accepted)} accepted, {len(kit.refused)} refused, {size:,} bytes")


if __name__ == "__main__":
    main()

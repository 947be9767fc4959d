"""Write the golden files that do not exist yet. Existing files never change."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_trees import FOLDER, GOLDEN, save

with tempfile.TemporaryDirectory() as scratch:
    for name in GOLDEN:
        for file, content in save(name, Path(scratch)).items():
            path = FOLDER / file
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                print(f"wrote {file}: {len(content):,} bytes")

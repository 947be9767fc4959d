"""Print the changelog of a release, after checking that its tag, version and date are right.

python release_notes.py v0.2.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, version: str, changelog: str) -> str:
    """Return the changelog's section for `version`; raise ValueError if anything disagrees."""
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, but _version.py says {version}")
    found = re.search(
        rf"^## \[{re.escape(version)}\] - (.+)\n((?:(?!## |\[).*\n?)*)", changelog, re.MULTILINE
    )
    if found is None:
        raise ValueError(f"CHANGELOG.md has no section for {version}")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", found[1]):
        raise ValueError(f"CHANGELOG.md says {found[1]!r} where the date of {version} belongs")
    return found[2].strip()


def main() -> None:
    """Check the project as it is."""
    text = (ROOT / "src" / "pytree2safetensors" / "_version.py").read_text("utf-8")
    version = text.split('__version__ = "')[1].split('"')[0]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    try:
        print(notes(sys.argv[1], version, changelog))
    except ValueError as error:
        sys.exit(f"cannot release: {error}")


if __name__ == "__main__":
    main()

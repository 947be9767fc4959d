"""Run the tests of the JavaScript reader with Node's own test runner; pass with a remark if there is no Node."""

import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (20, 19)  # the first Node that detects modules itself


def find_node() -> tuple[str | None, str]:
    """Return the path of a Node that is new enough, or None and the reason."""
    node = shutil.which("node")
    if node is None:
        return None, "there is no node"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(map(int, version.removeprefix("v").split(".")[:2])) < OLDEST:
        return None, f"node is {version.strip()}, and the tests need 20.19"
    return node, ""


def main() -> int:
    """Return the exit status."""
    node, reason = find_node()
    if node is None:
        print(f"skipped: {reason}")
        return 0
    tests = sorted(map(str, Path(__file__).parent.glob("*.test.js")))
    return subprocess.run([node, "--test", *tests], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

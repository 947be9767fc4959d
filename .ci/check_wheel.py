"""Check the distributions in a folder, and the package as it is installed from a wheel.

    python -I check_wheel.py FOLDER

Nothing but the package and what it depends on may be needed.
"""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

NAME = "pytree2safetensors"
DEPENDENCIES = {"jax", "safetensors", "jaxtyping", "beartype"}
OPTIONAL = {"fsspec", "hypothesis", "tqdm"}
UNUSED = {*OPTIONAL, "chex", "equinox", "flax", "optax", "orbax", "pytest", "treescope"}


def check_wheel(path: Path) -> None:
    """Check that the wheel holds the package, typed, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (information,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(information).decode())
    folders = {name.split("/")[0] for name in names}
    assert folders == {NAME, information.split("/")[0]}, folders
    assert f"{NAME}/py.typed" in names
    assert not [name for name in names if "test_" in name or "conftest" in name]

    required = metadata.get_all("Requires-Dist", [])
    plain = {line.split(">=")[0] for line in required if "extra ==" not in line}
    extra = {line.split(">=")[0] for line in required if "extra ==" in line}
    assert (plain, extra) == (DEPENDENCIES, OPTIONAL), required
    description = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert links
    assert all(link.startswith("https://") for link in links), links
    assert "pip install pytree2safetensors\n" in description
    assert "git+" not in description, "the README for the repository, not for a package index"
    assert "PyPI" not in description, "a remark that is false once the package is there"


def check_sdist(path: Path) -> None:
    """Check that whoever has the source alone can test it."""
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    for name in (
        "tox.ini",
        "tests/conftest.py",
        "docs/conf.py",
        "typings/safetensors/__init__.pyi",
    ):
        assert name in names, name


def check_installed() -> None:
    """Check that the package works with its dependencies alone, and imports nothing else."""
    import pytree2safetensors

    assert "site-packages" in pytree2safetensors.__file__, pytree2safetensors.__file__
    for name in pytree2safetensors.__all__:
        assert getattr(pytree2safetensors, name) is not None
    assert not UNUSED & {name.split(".")[0] for name in sys.modules}
    present = [name for name in sorted(OPTIONAL) if importlib.util.find_spec(name)]
    assert not present, f"the environment has {present}, so it proves nothing"

    tree = {"a": (1, None, [2.5, "b"])}
    pytree2safetensors.save_pytree(tree, "tree.safetensors")
    assert pytree2safetensors.load_pytree("tree.safetensors") == tree
    command = Path(sys.executable).with_name(NAME)
    arguments = [command, "show", "--paths", "tree.safetensors"]
    shown = subprocess.run(arguments, check=True, capture_output=True)
    assert b"@a#2#0" in shown.stdout


def main() -> None:
    """Check everything."""
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    check_installed()
    print(f"Python {sys.version.split()[0]}: {wheel.name} and {sdist.name} hold what they should")


if __name__ == "__main__":
    main()

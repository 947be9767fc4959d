"""The files of the project agree with each other: versions, environments, commands."""

import configparser
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

import pytree2safetensors

ROOT = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")


def pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        parsed: dict[str, Any] = tomllib.load(file)
    return parsed


def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def words(text: str) -> set[str]:
    return set(re.split(r"[\s,]+", text.strip()))


def label(name: str) -> set[str]:
    lines = dict(line.split("=", 1) for line in tox()["tox"]["labels"].strip().splitlines())
    return words({key.strip(): value for key, value in lines.items()}[name])


def floors() -> dict[str, str]:
    project = pyproject()["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return dict(line.split(">=") for line in project["dependencies"] + extras)


def test_the_readme_gives_the_command_that_ci_runs() -> None:
    *_, command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert f"\n```sh\n{command}\n```\n" in (ROOT / "README.md").read_text("utf-8")


def test_the_oldest_environment_installs_the_declared_floors() -> None:
    pinned = dict(re.findall(r"oldest: (\S+)==(\S+)", tox()["testenv"]["deps"]))
    for name, floor in floors().items():
        assert pinned[name].removesuffix(".0") == floor.removesuffix(".0")


def test_each_jax_minor_has_its_line_and_its_place_in_the_label() -> None:
    lines = re.findall(r"(jax[\d.]+): jax==(\S+)", tox()["testenv"]["deps"])
    assert all(pin.removesuffix(".*") == factor.removeprefix("jax") for factor, pin in lines)
    assert {env.split("-")[1] for env in label("jax")} == {factor for factor, _ in lines}
    assert f"py-jax{floors()['jax']}" in label("jax")


def test_the_classifiers_name_the_pythons_that_tox_runs() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [line for line in pyproject()["project"]["classifiers"] if line.startswith(prefix)]
    assert {f"py3{line.removeprefix(prefix)}" for line in named} == label("python")
    assert pyproject()["project"]["requires-python"] == ">=3.10"
    assert "py310" in label("python")


def test_the_workflow_runs_every_environment() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    listed = re.findall(r"^ {10}- ([\w.-]+)$|env: (py[\w.-]+) ", workflow, re.MULTILINE)
    assert {name for names in listed for name in names if name} == (
        label("jax") | label("python") | label("rest")
    )
    assert "- run: .ci/run\n" in workflow


def test_what_is_installed_is_this_version() -> None:
    try:
        installed = version("pytree2safetensors")
    except PackageNotFoundError:
        pytest.skip("runs from the source folder, without an installation")
    assert installed == pytree2safetensors.__version__


def test_the_workflow_runs_on_every_operating_system() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert {"ubuntu", "macos", "windows"} == {*re.findall(r"(\w+)-latest", workflow)}


def test_the_documentation_and_the_citation_name_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {pytree2safetensors.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest, *_ = re.findall(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)
    assert newest == pytree2safetensors.__version__
    assert changelog.count(f"\n[{newest}]: https://") == 1


CHANGELOG = """# Changelog

## [0.3.0] - 2027-01-31

### Added

- Something.

## [0.2.0] - 2026-12-01

- More.

[0.3.0]: https://example.org
"""


def release_notes(tag: str, version: str, changelog: str = CHANGELOG) -> str:
    script = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))
    text: str = script["notes"](tag, version, changelog)
    return text


def test_release_notes_are_the_section_of_the_version() -> None:
    assert release_notes("v0.3.0", "0.3.0") == "### Added\n\n- Something."
    assert release_notes("v0.2.0", "0.2.0") == "- More."


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "message"),
    [
        ("v0.3.1", "0.3.0", CHANGELOG, "the tag is v0.3.1, but _version.py says 0.3.0"),
        ("v0.4.0", "0.4.0", CHANGELOG, "CHANGELOG.md has no section for 0.4.0"),
        ("v1.0", "1.0", "## [1.0] - Unreleased\n", "CHANGELOG.md says 'Unreleased' where the date"),
    ],
)
def test_a_release_with_a_contradiction_is_refused(
    tag: str, version: str, changelog: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        release_notes(tag, version, changelog)


def test_the_readme_on_a_package_index_installs_from_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    readme = pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for change in readme["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert "\n```sh\npip install pytree2safetensors\n```\n" in text
    assert "PyPI" not in text


def test_this_python_is_supported() -> None:
    assert f"py3{sys.version_info.minor}" in label("python")


def test_an_import_brings_the_dependencies_and_nothing_else() -> None:
    script = """
import sys
import beartype, jax, jaxtyping, safetensors.flax
before = {name.split(".")[0] for name in sys.modules}
from pytree2safetensors import *
after = {name.split(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # What jaxtyping, old or new, depends on and imports once there is something to check.
    own = {"wadler_lindig", "typeguard", "typing_extensions"}
    assert {*run.stdout.split()} - own == {"pytree2safetensors"}


def test_public_names_are_listed_and_others_do_not_exist() -> None:
    script = """
import pytree2safetensors
assert "save_pytree" not in vars(pytree2safetensors)
assert {"__version__", *pytree2safetensors.__all__} <= {*dir(pytree2safetensors)}
assert "save_pytree" in vars(pytree2safetensors)
public = [name for name in dir(pytree2safetensors) if not name.startswith("_")]
assert public == pytree2safetensors.__all__, public
for name in "nonsense", "_nonsense", "__nonsense__":
    try:
        getattr(pytree2safetensors, name)
    except AttributeError as error:
        assert str(error) == f"module 'pytree2safetensors' has no attribute {name!r}", error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

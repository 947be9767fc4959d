"""Every code block of the README and of the documentation runs, and its output is correct.

`UPDATE_SCREENS=1 pytest tests/project/test_docs.py` writes what commands print into the pages.
"""

import ast
import doctest
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OPTIONAL = {
    "chex",
    "equinox",
    "flax",
    "fsspec",
    "haiku",
    "huggingface_hub",
    "optax",
    "orbax",
    "tqdm",
    "treescope",
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SHOWN = {"", "js", "json", "sh", "text", "toml"}  # kinds of blocks that are read and not run


class Block(NamedTuple):
    """A fenced block: its info string, its text, and the line that its text begins on."""

    info: str
    text: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    """Find the blocks of a page."""
    text = page.read_text("utf-8")
    for found in re.finditer(r"^(```+)([^\n]*)\n(.*?)^\1[ ]*$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[2].strip(), found[3], text.count("\n", 0, found.start(3)))


def imports_of(block: Block) -> set[str]:
    """Name the packages that a block of Python imports."""
    tree = ast.parse(block.text)
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def run_python(page: Path, block: Block, namespace: dict[str, object]) -> None:
    """Execute a block, with the page's own lines in a traceback."""
    exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


def run_session(page: Path, block: Block, namespace: dict[str, object]) -> None:
    """Execute the lines after `>>>`, and compare what they print."""
    parser = doctest.DocTestParser()
    test = parser.get_doctest(block.text, {}, page.stem, str(page), block.line)
    test.globs = namespace
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def free_address() -> str:
    """Find a port that is not in use."""
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def run_command(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Return what a command prints; end it, and whatever it started, when it takes too long."""
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        encoding="utf-8",
    ) as process:
        try:
            return process.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0] + "\nand took too long"


has_shell = os.name == "posix"  # elsewhere, `bash` may be that of another system on this machine


def run_console(page: Path, block: Block, folder: Path) -> None:
    """Run the commands after `$`, and compare what they print."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore", JAX_PLATFORMS="cpu")
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("XLA_FLAGS", None)
    for command, expected in re.findall(
        r"^\$ ([^\n]*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE
    ):
        printed = run_command(
            command.replace("localhost:12345", free_address()), folder, environment
        )
        # Without what JAX's CPU devices say to each other.
        printed = re.sub(r"^\[Gloo\].*\n+", "", printed, flags=re.MULTILINE).lstrip("\n")
        same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
        if not same and "UPDATE_SCREENS" in os.environ:
            old, new = (f"$ {command}\n{text}" for text in (expected, printed))
            page.write_text(page.read_text("utf-8").replace(old, new), "utf-8")
            continue
        assert same, f"$ {command}\nthe page says\n{expected}\nit printed\n{printed}"


def run(page: Path, block: Block, namespace: dict[str, object], folder: Path) -> None:
    """Do what the kind of a block asks for."""
    if block.info == "python":
        run_python(page, block, namespace)
    elif block.info == "pycon":
        run_session(page, block, namespace)
    elif block.info == "console":
        run_console(page, block, folder)
    elif block.info == "{code-block} python":
        found = re.fullmatch(r":caption: (\S+)\n\n?(.*)", block.text, re.DOTALL)
        assert found, block
        (folder / found[1]).write_text(found[2], "utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = list(blocks_of(page))
    if not has_shell and any(block.info == "console" for block in blocks):
        pytest.skip("a page with commands for a POSIX shell")
    for block in blocks:
        if block.info == "python":
            needed = imports_of(block) & OPTIONAL
            for name in sorted(needed | ({"tqdm"} if "progress=True" in block.text else set())):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where classes of the page are looked up
    with warnings.catch_warnings():
        # Those of the page's frameworks are their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        for block in blocks:
            run(page, block, vars(module), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_of_known_kinds(page: Path) -> None:
    runs = {"python", "pycon", "console", "{code-block} python"}
    for block in blocks_of(page):
        assert block.info in SHOWN | runs or re.match(r"\{(?!code)[\w-]+\}", block.info), block


def test_a_wrong_block_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    wrong = {
        "python": "assert 1 == 2\n",
        "pycon": ">>> 1\n2\n",
        "console": "$ python -c 'print(1)'\n2\n",
    }
    if not has_shell:
        del wrong["console"]
    for info, text in wrong.items():
        page.write_text(f"# Page\n\n```{info}\n{text}```\n", "utf-8")
        (block,) = blocks_of(page)
        assert block == Block(info, text, 3)
        with pytest.raises(AssertionError):
            run(page, block, {}, tmp_path)


def test_the_conversion_to_bfloat16_keeps_what_is_no_float() -> None:
    page = (DOCS / "guides" / "pytorch.md").read_text("utf-8")
    [code] = re.findall(r"`(jax\.tree\.map\([^`]+, model\))`", page)
    model = {"key": jax.random.key(0), "w": jnp.ones(2), "step": jnp.int32(300)}
    converted = eval(code, {"jax": jax, "jnp": jnp, "model": model})
    assert converted["key"] is model["key"]
    assert converted["step"] is model["step"]
    assert converted["w"].dtype == jnp.bfloat16


def test_the_table_of_the_api_page_names_every_public_name() -> None:
    import pytree2safetensors

    table = (DOCS / "api.md").read_text("utf-8").partition("\n## ")[0]
    assert [name for name in pytree2safetensors.__all__ if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_outside_of_the_site_lead_somewhere(name: str) -> None:
    site = "https://pytree2safetensors.readthedocs.io/en/latest/"
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text("utf-8"))
    pages = [link.removeprefix(site) for link in links if link.startswith(site)]
    local = [link for link in links if "://" not in link]
    assert pages or local
    assert [page for page in pages if not (DOCS / page).with_suffix(".md").exists()] == []
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_charts_show_the_published_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    chart = importlib.import_module("chart")
    runs = json.loads((DOCS / "benchmarks" / "speed.json").read_text("utf-8"))["runs"]
    for name, panels in chart.CHARTS.items():
        drawn = (DOCS / "benchmarks" / f"{name}.svg").read_text("utf-8")
        assert chart.draw(panels, runs) == drawn, "run python benchmarks/chart.py"


def tests_of(path: Path) -> set[str]:
    """Name the test functions of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_guarantees_name_the_tests_of_the_laws() -> None:
    named = set(re.findall(r"`(test_law_\w+)`", (DOCS / "guarantees.md").read_text("utf-8")))
    exist = {
        name
        for file in (ROOT / "tests" / "laws").glob("test_*.py")
        for name in tests_of(file)
        if name.startswith("test_law_")
    }
    assert named == exist


def headings_of_the_specification() -> list[str]:
    """Name the sections of both pages of the specification, in order, without appendices."""
    text = "".join((DOCS / page).read_text("utf-8") for page in ("format.md", "interface.md"))
    return re.findall(r"^## (?!Appendix)(.+)$", text, re.MULTILINE)


def sections_of_modules() -> set[str]:
    """Name the sections that modules say they implement."""
    package = ROOT / "src" / "pytree2safetensors"
    found: set[str] = set()
    for path in package.rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for line in re.findall(r"^Specification: (.+)\.$", said, re.MULTILINE):
            found.update(re.findall(r"\*([^*]+)\*", line))
    return found - {"Laws"}  # which are in guarantees.md


def test_every_section_of_the_specification_has_its_modules() -> None:
    assert sections_of_modules() == {*headings_of_the_specification()}


def test_every_module_says_what_it_is() -> None:
    for path in (ROOT / "src" / "pytree2safetensors").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def called(drawn: set[str], act: Callable[[], object]) -> set[str]:
    """Return which of the functions of a drawing are called."""
    found: set[str] = set()

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found.add(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in drawn:
            home, _, function = name.rpartition(".")
            module = importlib.import_module(f"pytree2safetensors.{home}")
            original = getattr(module, function)
            recording = recorded(name, original)
            ours = [m for key, m in sys.modules.items() if key.startswith("pytree2safetensors.")]
            for importer in ours:
                if vars(importer).get(function) is original:
                    patch.setattr(importer, function, recording)
        act()
    return found


def test_a_save_and_a_load_take_the_steps_of_the_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytree2safetensors as p2s

    monkeypatch.syspath_prepend(DOCS / "_ext")
    diagram = importlib.import_module("diagram")
    save, load = ({step[0] for step in steps[1:]} for steps in (diagram.SAVE, diagram.LOAD))
    file, tree = tmp_path / "file", {"layers": [(jnp.ones((2, 3)), 1.5)], "step": 7}
    assert called(save, lambda: p2s.save_pytree(tree, file)) == save
    compare, build = "_load.matching.compare", "_tree.unflatten.build"
    assert {compare, build} < load
    assert called(load, lambda: p2s.load_pytree(file)) == load - {compare}
    assert called(load, lambda: p2s.load_into_pytree(tree, file)) == load - {build}


def test_docstrings_name_sections_that_exist() -> None:
    sections = {"Laws", *headings_of_the_specification()}
    sources = (ROOT / "src" / "pytree2safetensors").rglob("*.py")
    text = "".join(source.read_text("utf-8") for source in sources)
    lines = re.findall(r"Specification: (\*.+\*)\.", text)
    named = {name for line in lines for name in re.findall(r"\*([^*]+)\*", line)}
    assert named
    assert named <= sections

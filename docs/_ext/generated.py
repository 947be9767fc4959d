"""The `generated` directive: parts of pages that are made from the project's own data."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomllib  # of Python 3.11: the documentation is built with that or newer
from anatomy import hexdump, layout, vectors
from diagram import LOAD, SAVE, draw
from docutils import nodes
from environments import table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
KEY_PATHS = ROOT / "tests" / "data" / "keypaths.json"
KEYS = {
    "attr": "GetAttrKey({!r})",
    "item": "DictKey({!r})",
    "literal": "DictKey({})",
    "index": "SequenceKey({})",
    "flat": "FlattenedIndexKey({})",
}


def code(text: str) -> str:
    """Write `text` as inline code that stands in a table."""
    shown = text if text.isprintable() and text.strip() == text and text else repr(text)
    fence = "``" if "`" in shown else "`"
    return fence + shown.replace("|", r"\|") + fence


def accepted() -> list[str]:
    """List the key paths of the tests' table, with their spelling."""
    lines = ["| key path | spelling |", "|---|---|"]
    for pair in json.loads(KEY_PATHS.read_text("utf-8"))["accepted"]:
        keys = ", ".join(KEYS[kind].format(value) for kind, value in pair["path"])
        lines.append(f"| {code(keys) if keys else 'no keys'} | {code(pair['string'])} |")
    return lines


def rejected() -> list[str]:
    """List the strings of the tests' table that spell no key path, with the reason in the error."""
    from pytree2safetensors import KeyPathError, string2keypath

    lines = ["| string | why it is not a key path |", "|---|---|"]
    for string in json.loads(KEY_PATHS.read_text("utf-8"))["rejected"]:
        try:
            string2keypath(string)
        except KeyPathError as error:
            reason = str(error).split(" is not a key path: ")[1].replace("|", r"\|")
            lines.append(f"| {code(string)} | {code(reason)} |")
    return lines


BENCHMARKS = ROOT / "docs" / "benchmarks"


def chart(name: str) -> list[str]:
    """Put a chart of the benchmarks into the page, so that the style sheet reaches its text."""
    return ["```{raw} html", (BENCHMARKS / f"{name}.svg").read_text("utf-8"), "```"]


def conditions() -> list[str]:
    """List where and with what the benchmarks ran."""
    said = json.loads((BENCHMARKS / "speed.json").read_text("utf-8"))
    versions = {name: version for name, version in said["versions"].items() if name != "python"}
    rows = {
        **said["machine"],
        "Python": said["versions"]["python"],
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "this library": f"commit {said['commit']}",
        "runs": f"medians of {said['rounds']}, the libraries in turn, each run in a new process",
    }
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())]


def included(stem: str) -> list[str]:
    """Include tables that the benchmarks wrote."""
    return ["```{eval-rst}", f".. include:: /benchmarks/{stem}.rst", "```"]


PACKAGE = ROOT / "src" / "pytree2safetensors"


def described() -> dict[str, tuple[str, list[str]]]:
    """Give each module's first line, and the sections of the specification that it implements."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        line = said.partition("\n")[0]
        marked = re.search(r"^Specification: (.+)\.$", said, re.MULTILINE)
        sections = re.findall(r"\*([^*]+)\*", marked[1]) if marked else []
        found[path.relative_to(PACKAGE).as_posix()] = line, sections
    return found


def layers() -> list[str]:
    """List the layers of the import contract, the highest first, each folder with its first line."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    lines = ["| layer | folder or module | what it is |", "|---|---|---|"]
    said = described()
    layers = contracts["contracts"][0]["layers"]
    for number, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        for name in layer.split("|"):
            short = name.strip().removeprefix("pytree2safetensors.")
            found = said.get(f"{short}/__init__.py") or said[f"{short}.py"]
            lines.append(f"| {number} | `{short}` | {found[0]} |")
    return lines


def sections() -> list[str]:
    """List the sections of the specification, each with the modules that implement it."""
    by_section: dict[str, list[str]] = {}
    for name, (_, marked) in described().items():
        for section in marked:
            by_section.setdefault(section, []).append(f"`{name}`")
    lines = ["| section | modules |", "|---|---|"]
    for page in ("format.md", "interface.md"):
        headings = re.findall(r"^## (.+)$", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
        for name in filter(by_section.__contains__, headings):
            link = f"[{name}]({page}#{name.lower().replace(' ', '-')})"
            lines.append(f"| {link} | {', '.join(by_section[name])} |")
    return lines


def modules() -> list[str]:
    """List the modules, a table for each folder, each module with what it says of itself."""
    folders: dict[str, list[str]] = {}
    for name, (said, _) in described().items():
        folder, _, module = name.rpartition("/")
        if module != "__init__.py":
            folders.setdefault(folder, []).append(f"| `{module}` | {said} |")
    lines: list[str] = []
    for folder, rows in sorted(folders.items()):
        lines += ["", f"### `{folder or 'pytree2safetensors'}`", ""]
        lines += ["| module | what it is |", "|---|---|", *rows]
    return lines


MUTATION = ROOT / "tests" / "mutation"


def mutation() -> list[str]:
    """Tell how many changes to the code the tests noticed."""
    found = json.loads((MUTATION / "figures.json").read_text("utf-8"))
    total, killed, known = found["mutants"], found["killed"], found["equivalent"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        "| | |",
        "|---|---|",
        f"| changes | {total:,}, drawn with seed {found['seed']} |",
        f"| killed | {killed:,} |",
        f"| without a difference | {known} |",
        f"| survived | {len(found['survived'])} |",
        f"| killed, of those with a difference | {killed / (total - known):.1%} |",
        f"| versions | {versions} |",
    ]


def changes(found: list[dict[str, str]]) -> list[str]:
    """List changes to the code."""
    lines = ["", "| where | before | after |", "|---|---|---|"]
    for change in found:
        where = " ".join(filter(None, [change["module"], change["function"]]))
        lines.append(f"| {code(where)} | {code(change['before'])} | {code(change['after'])} |")
    return lines


def equivalent() -> list[str]:
    """List the changes that no test can notice, under the reason that they share."""
    lines: list[str] = []
    for group in json.loads((MUTATION / "equivalent.json").read_text("utf-8")):
        lines += ["", group["reason"], *changes(group["changes"])]
    return lines


def survived() -> list[str]:
    """List the changes that no test noticed."""
    found = json.loads((MUTATION / "figures.json").read_text("utf-8"))["survived"]
    return changes(found) if found else ["None of this sample."]


MAKERS: dict[str, Callable[..., list[str]]] = {
    "layers": layers,
    "sections": sections,
    "modules": modules,
    "accepted": accepted,
    "rejected": rejected,
    "chart": chart,
    "conditions": conditions,
    "included": included,
    "environments": table,
    "mutation": mutation,
    "equivalent": equivalent,
    "survived": survived,
    "layout": lambda: ["```{raw} html", layout(), "```"],
    "hexdump": lambda: ["```text", *hexdump(), "```"],
    "vectors": vectors,
    "save": lambda: ["```{raw} html", draw(SAVE, "The path from a tree to a file"), "```"],
    "load": lambda: ["```{raw} html", draw(LOAD, "The path from a file to a tree"), "```"],
}


class Generated(SphinxDirective):
    """Insert the Markdown that one of the makers gives."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(KEY_PATHS))
        maker, *arguments = self.arguments
        return self.parse_text_to_nodes("\n".join(MAKERS[maker](*arguments)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

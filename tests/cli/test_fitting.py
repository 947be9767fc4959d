"""`show --template`: what it prints, and wrong usage."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from command import Run
from pytree2safetensors import save_pytree

pytestmark = pytest.mark.usefixtures("own_folder")

MODULE = """
import numpy as np
from pytree2safetensors import Rule

TREE = {"a": np.zeros((3, 2), np.float32)}
ONE = Rule("a.weight", "a", "o i -> i o")
RULES = [ONE]

def template():
    return TREE
"""


@pytest.fixture
def model(tmp_path: Path, own_folder: None) -> str:
    """A file, and a module of a name that no other test imports."""
    safetensors.numpy.save_file({"a.weight": np.zeros((2, 3), np.float32)}, "model.safetensors")
    name = f"model_{tmp_path.name}"
    Path(f"{name}.py").write_text(MODULE, "utf-8")
    return name


COMPLAINT = "pytree2safetensors: model.safetensors does not fit the template"
FITS = [
    "'model.safetensors': 1 of 1 leaves fit",
    "  fits  '@a' = 'a'  float32[3,2]  'a.weight' float32[2,3]  'o i -> i o'",
]


@pytest.mark.parametrize("template", ["TREE", "template"])
def test_a_file_is_compared_with_a_template(run: Run, model: str, template: str) -> None:
    options = ["--template", f"{model}:{template}", "--rules", f"{model}:RULES"]
    assert run("show", "model.safetensors", *options) == (0, "\n".join([*FITS, ""]), "")
    code, printed, _ = run("show", "model.safetensors", *options, "--json")
    assert code == 0
    assert json.loads(printed) == {
        "file": "model.safetensors",
        "fits": True,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "lines": FITS,
    }


def test_without_rules_the_names_are_compared(run: Run, model: str) -> None:
    code, printed, complaint = run("show", "model.safetensors", "--template", f"{model}:TREE")
    assert (code, complaint) == (1, f"{COMPLAINT}\n")
    assert "  missing  '@a' = 'a'  float32[3,2]  there is no '@a'" in printed.splitlines()
    code, printed, complaint = run(
        "show", "model.safetensors", "--template", f"{model}:TREE", "--json"
    )
    assert (code, complaint) == (1, f"{COMPLAINT}\n")
    found = json.loads(printed)
    assert (found["fits"], found["missing"], found["unexpected"]) == (False, ["@a"], ["a.weight"])
    save_pytree({"a": np.ones((3, 2), np.float32)}, "own.safetensors")
    _, printed, _ = run("show", "own.safetensors", "--template", f"{model}:TREE")
    assert printed.startswith("'own.safetensors': 1 of 1 leaves fit\n")


@pytest.mark.parametrize("name", ["missing", "unexpected", "mismatched"])
def test_the_exit_code_says_whether_a_load_would_fail(run: Run, model: str, name: str) -> None:
    array = np.zeros((2, 2) if name == "mismatched" else (3, 2), np.float32)
    tree = {"missing": {}, "unexpected": {"a": array, "b": array}, "mismatched": {"a": array}}[name]
    save_pytree(tree, "own.safetensors")
    template = f"{model}:TREE"
    code, printed, _ = run("show", "own.safetensors", "--template", template, "--json")
    found = json.loads(printed)
    assert (code, found["fits"]) == (1, False)
    for kind in ("missing", "unexpected", "mismatched"):
        assert bool(found[kind]) is (kind == name)


def test_rules_of_a_wrong_type_are_refused(run: Run, model: str) -> None:
    options = ["--template", f"{model}:TREE", "--rules", f"{model}:ONE"]
    code, _, complaint = run("show", "model.safetensors", *options)
    assert code == 2
    assert (
        "error: --rules: rename must be a function, a mapping of strs to strs, or a sequence of Rules, "
        "not a Rule; put it in a list"
    ) in " ".join(complaint.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rules", "os:path"], "error: --rules needs --template"),
        (["--template", "os"], "error: argument --template: 'os' is not MODULE:NAME"),
        (
            ["--template", "os:gone"],
            "error: argument --template: cannot import 'os:gone': module 'os' has no attribute 'gone'",
        ),
        (
            ["--template", "gone:x"],
            "--template: cannot import 'gone:x': No module named 'gone'",
        ),
    ],
)
def test_wrong_usage_is_refused(run: Run, model: str, options: list[str], said: str) -> None:
    code, _, complaint = run("show", "model.safetensors", *options)
    assert code == 2
    assert said in " ".join(complaint.split())

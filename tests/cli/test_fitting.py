"""`show --template`: what it prints, and wrong usage."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from command import Run
from pytree2safetensors import save_pytree

pytestmark = pytest.mark.usefixtures("own_folder")

MODULE = """
import functools

import jax
import numpy as np
from pytree2safetensors import Rule

TREE = {"a": np.zeros((3, 2), np.float32)}
ONE = Rule("a.weight", "a", "o i -> i o")
RULES = [ONE]
EMPTY = None

def template():
    return TREE

class Built:
    def __new__(cls):
        return TREE

class Maker:
    def __call__(self):
        return TREE

made = Maker()
bound = functools.partial(jax.eval_shape, template)

@jax.tree_util.register_pytree_with_keys_class
class Model(dict):  # like an Equinox module that is called to compute
    def __call__(self):
        raise AssertionError
    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(key), self[key]) for key in self], tuple(self)
    def tree_flatten(self):
        return list(self.values()), tuple(self)
    tree_unflatten = classmethod(lambda cls, keys, leaves: cls(zip(keys, leaves)))

NODE = Model(TREE)

def needs_mesh():
    raise ValueError("mesh of 8 devices")

def needs_devices():
    return needs_runtime()

def needs_runtime():
    raise RuntimeError("8 devices")

def needs_argument(size):
    return TREE

def broken(tree_flatten, tree_flatten_with_keys):
    class Broken:
        tree_unflatten = classmethod(lambda cls, keys, leaves: cls())
    Broken.tree_flatten = tree_flatten
    Broken.tree_flatten_with_keys = tree_flatten_with_keys
    return jax.tree_util.register_pytree_with_keys_class(Broken)()

def flat(self):
    return (), ()

def lacks_key(self):
    return {}["w"]

def refuses(self):
    raise ValueError("no weights yet")

class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def fails(self):
    raise Speechless

SPEECHLESS = broken(flat, fails)
LACKS_KEY = broken(flat, lacks_key)
LACKS_KEY_LATER = [broken(lacks_key, flat)]

def refusing():
    return broken(flat, refuses)
"""


@pytest.fixture
def model(tmp_path: Path, own_folder: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file, and a module of a name that no other test imports."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    safetensors.numpy.save_file({"a.weight": np.zeros((2, 3), np.float32)}, "model.safetensors")
    name = f"model_{tmp_path.name}"
    Path(f"{name}.py").write_text(MODULE, "utf-8")
    return name


COMPLAINT = "pytree2safetensors: model.safetensors does not fit the template"
FITS = [
    "'model.safetensors': 1 of 1 leaves fit",
    "  fits  '@a' = 'a'  float32[3,2]  'a.weight' float32[2,3]  'o i -> i o'",
]


@pytest.mark.parametrize("template", ["TREE", "template", "Built", "made", "bound", "NODE"])
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


@pytest.mark.parametrize("options", [[], ["--rules", "RULES"]])
def test_a_template_without_leaves_is_one(run: Run, model: str, options: list[str]) -> None:
    options = [f"{model}:{option}" if option.isupper() else option for option in options]
    code, printed, complaint = run(
        "show", "model.safetensors", "--template", f"{model}:EMPTY", *options
    )
    assert (code, complaint) == (1, f"{COMPLAINT}\n")
    assert "0 of 0 leaves fit" in printed


def test_long_lists_are_cut_unless_asked(run: Run, model: str) -> None:
    tree = {"a": np.zeros((3, 2), np.float32)}
    save_pytree(tree | {f"b{number:03}": np.int8(0) for number in range(250)}, "own.safetensors")
    options = ["own.safetensors", "--template", f"{model}:TREE"]
    lines = run("show", *options)[1].splitlines()
    assert lines[1].startswith("  fits")
    assert lines[2:5] == ["unused tensors:", "  '@b000'", "  '@b001'"]
    assert lines[-2:] == ["  '@b099'", "  ... and 150 more; --all lists them"]
    everything = run("show", *options, "--all")[1].splitlines()
    assert everything[2:] == ["unused tensors:", *(f"  '@b{number:03}'" for number in range(250))]
    assert json.loads(run("show", *options, "--json")[1])["lines"] == everything


def test_of_many_leaves_those_that_do_not_fit_are_shown(run: Run, model: str) -> None:
    with Path(f"{model}.py").open("a", encoding="utf-8") as module:
        module.write("MANY = {f'a{number:03}': np.zeros(1) for number in range(150)}")
    tree = {f"a{number:03}": np.zeros(1) for number in range(150) if number not in {20, 140}}
    save_pytree(tree, "own.safetensors")
    lines = run("show", "own.safetensors", "--template", f"{model}:MANY")[1].splitlines()
    fits = [f"'@a{number:03}'" for number in range(99) if number != 20]
    assert [text.split()[1] for text in lines[1:-1]] == sorted([*fits, "'@a020'", "'@a140'"])
    assert lines[-1] == "  ... and 50 more; --all lists them"


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
            "error: argument --template: cannot import 'os:gone': "
            "AttributeError: module 'os' has no attribute 'gone'",
        ),
        (
            ["--template", "gone:x"],
            "--template: cannot import 'gone:x': ModuleNotFoundError: No module named 'gone'",
        ),
        (
            ["--template", ".gone:x"],
            "--template: cannot import '.gone:x': TypeError: the 'package' argument is required",
        ),
    ],
)
def test_wrong_usage_is_refused(run: Run, model: str, options: list[str], said: str) -> None:
    code, _, complaint = run("show", "model.safetensors", *options)
    assert code == 2
    assert said in " ".join(complaint.split())
    assert "Traceback" not in complaint


@pytest.mark.parametrize("error", ["ValueError", "TypeError", "RuntimeError"])
@pytest.mark.parametrize("option", ["--template", "--rules"])
def test_an_error_of_an_imported_module_is_shown(
    run: Run, model: str, option: str, error: str
) -> None:
    Path(f"broken_{model}.py").write_text(f"def f():\n    raise {error}('mesh')\nf()\n", "utf-8")
    name = f"broken_{model}:x"
    code, printed, complaint = run("show", "model.safetensors", option, name)
    assert (code, printed) == (2, "")
    assert complaint.startswith("Traceback (most recent call last):\n  File ")
    assert f'broken_{model}.py", line 2, in f\n' in complaint
    assert "importlib" not in complaint
    assert complaint.endswith(f"error: argument {option}: cannot import {name!r}: {error}: mesh\n")


def test_a_module_that_is_no_python_is_named(run: Run, model: str) -> None:
    Path(f"broken_{model}.py").write_text("\nx = (\n", "utf-8")
    code, _, complaint = run("show", "model.safetensors", "--template", f"broken_{model}:x")
    assert code == 2
    assert complaint.endswith(f"SyntaxError: '(' was never closed (broken_{model}.py, line 2)\n")


def test_a_function_names_the_leaves(run: Run, model: str) -> None:
    Path(f"names_{model}.py").write_text("def names(path):\n    return path\n", "utf-8")
    options = ["--template", f"{model}:TREE", "--rules", f"names_{model}:names"]
    assert run("show", "model.safetensors", *options) == run(
        "show", "model.safetensors", "--template", f"{model}:TREE"
    )


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("    raise ValueError('mesh')", "the function of --rules raised ValueError: mesh"),
        ("    raise TypeError", "the function of --rules raised TypeError"),
        ("    return 1", "the function of --rules gave int for '@a', not str"),
    ],
)
def test_an_error_of_a_rules_function_is_shown(
    run: Run, model: str, function: str, said: str
) -> None:
    Path(f"names_{model}.py").write_text(f"def names(path):\n{function}\n", "utf-8")
    options = ["--template", f"{model}:TREE", "--rules", f"names_{model}:names"]
    code, printed, complaint = run("show", "model.safetensors", *options)
    assert (code, printed) == (1, "")
    *before, last = complaint.splitlines()
    assert last == f"pytree2safetensors: {said}"
    frames = [line for line in before if line.startswith("  File ")]
    assert ("line 2, in names" in "".join(frames)) == ("raise" in function)
    assert len(frames) < 2


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("LACKS_KEY", "KeyError: 'w'"),
        ("LACKS_KEY_LATER", "KeyError: 'w'"),
        ("refusing", "ValueError: no weights yet"),
    ],
)
def test_an_error_of_a_node_of_a_template_is_shown_once(
    run: Run, model: str, name: str, raised: str
) -> None:
    files = ["model.safetensors", "model.safetensors"]
    code, printed, complaint = run("show", *files, "--template", f"{model}:{name}")
    assert (code, printed) == (1, "")
    assert complaint.startswith("Traceback (most recent call last):\n")
    assert complaint.count("Traceback") == 1
    frames = [line for line in complaint.splitlines() if line.startswith("  File ")]
    assert frames[-1].startswith(f'  File "{Path.cwd()}')  # before it, the runtime type checks
    last = f"{raised}\npytree2safetensors: flattening the template raised {raised}\n"
    assert complaint.endswith(last)


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("needs_mesh", "ValueError: mesh of 8 devices"),
        ("needs_devices", "RuntimeError: 8 devices"),
    ],
)
def test_an_error_of_a_template_function_is_shown_once(
    run: Run, model: str, name: str, raised: str
) -> None:
    files = ["model.safetensors", "model.safetensors"]
    code, printed, complaint = run("show", *files, "--template", f"{model}:{name}")
    assert (code, printed) == (1, "")
    assert complaint.startswith(f'Traceback (most recent call last):\n  File "{Path.cwd()}')
    assert complaint.count("Traceback") == 1
    last = f"{raised}\npytree2safetensors: the function of --template raised {raised}\n"
    assert complaint.endswith(last)


def test_an_error_without_a_text_is_named(run: Run, model: str) -> None:
    code, printed, complaint = run("show", "model.safetensors", "--template", f"{model}:SPEECHLESS")
    assert (code, printed) == (1, "")
    assert complaint.startswith("Traceback (most recent call last):\n")
    assert complaint.endswith("\npytree2safetensors: flattening the template raised Speechless\n")


def test_a_template_function_with_arguments_is_refused(run: Run, model: str) -> None:
    template = f"{model}:needs_argument"
    assert run("show", "model.safetensors", "--template", template) == (
        1,
        "",
        "pytree2safetensors: the function of --template raised TypeError: needs_argument() missing "
        "1 required positional argument: 'size'\n",
    )


def test_a_template_function_may_import_what_is_in_the_folder(run: Run, model: str) -> None:
    Path("lib").mkdir()
    Path(f"lib/far_{model}.py").touch()
    Path(f"near_{model}.py").touch()
    Path(f"late_{model}.py").write_text(
        "import sys\n"
        "sys.path.insert(0, 'lib')\n"
        "def template():\n"
        f"    import far_{model}, near_{model}, {model}\n"
        f"    return {model}.TREE\n",
        "utf-8",
    )
    save_pytree({"a": np.ones((3, 2), np.float32)}, "own.safetensors")
    code, _, complaint = run("show", "own.safetensors", "--template", f"late_{model}:template")
    assert (code, complaint) == (0, "")

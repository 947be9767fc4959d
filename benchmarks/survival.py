"""Find out what of a tree survives saving and loading without a template, by trying it in each library.

    python benchmarks/survival.py

Each cell is a real save and a real load of `{"value": specimen, "other": array}` with the library's defaults; the
specimens stand in `specimens.py`. Two arrays are the same where dtype, shape, bits and weak type
are, whether NumPy or JAX holds them. Equinox cannot load without a template, so it is given one: the tree itself. The
result goes to docs/benchmarks/survival.rst.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rst
from driver import surroundings
from environment import original_python, this_version, versions
from specimens import BARE, SPECIMENS, array, describe, kept, same

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks"
TIMEOUT = 300
YES = "yes"


def ours(tree: Any, path: Path) -> Any:
    """Try this library, or the original."""
    import pytree2safetensors

    pytree2safetensors.save_pytree(tree, str(path))
    yield
    yield pytree2safetensors.load_pytree(str(path))


def orbax(tree: Any, path: Path) -> Any:
    """Try orbax.checkpoint."""
    import orbax.checkpoint

    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        yield
        yield checkpointer.restore(path)


def flax(tree: Any, path: Path) -> Any:
    """Try flax's msgpack."""
    import flax.serialization

    path.write_bytes(flax.serialization.to_bytes(tree))
    yield
    yield flax.serialization.msgpack_restore(path.read_bytes())


def equinox(tree: Any, path: Path) -> Any:
    """Try equinox, with a template."""
    import equinox

    with path.open("wb") as file:
        equinox.tree_serialise_leaves(file, tree)
    yield
    with path.open("rb") as file:
        yield equinox.tree_deserialise_leaves(file, tree)


def jaxon(tree: Any, path: Path) -> Any:
    """Try jaxon."""
    import jaxon

    jaxon.save(path, tree)
    yield
    yield jaxon.load(path)


def safetensors(tree: Any, path: Path) -> Any:
    """Try safetensors.flax, which has no trees."""
    import safetensors.flax

    safetensors.flax.save_file(tree, path)
    yield
    yield safetensors.flax.load_file(path)


LIBRARIES: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "this library": ("here", ours),
    "original 0.1.4": ("original", ours),
    "safetensors": ("here", safetensors),
    "orbax": ("here", orbax),
    "flax msgpack": ("here", flax),
    "jaxon": ("here", jaxon),
    "equinox, given a template": ("here", equinox),
}


def outcome(name: str, attempt: Callable[[Any, Path], Any]) -> str:
    """Save and load one specimen and say what came back."""
    value = SPECIMENS[name]()
    tree = value if name in BARE else {"value": value, "other": array()}
    with tempfile.TemporaryDirectory() as folder:
        stages = attempt(tree, Path(folder) / "tree")
        try:
            next(stages)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            return f"refused: {type(error).__name__}"
        try:
            found = next(stages)
        except Exception as error:  # noqa: BLE001
            return f"**saved, cannot be loaded**: {type(error).__name__}"
    if name in BARE:
        return verdict(value, found)
    return verdict(value, found["value"]) if "value" in found else "**lost**"


def verdict(value: Any, found: Any) -> str:
    """Compare what came back with what was saved."""
    if same(value, found):
        return YES
    alike = describe(value) == describe(found)
    if kept(value, found):
        return f"as {describe(found)}" + (f" of length {len(found)}" if alike else "")
    if alike:
        return "**other values**"
    return f"**changed**: {describe(found)}"


def work(library: str, first: int) -> None:
    """Try the specimens from the `first` on, and print each outcome as JSON."""
    warnings.simplefilter("ignore")
    for name in list(SPECIMENS)[first:]:
        print("OUTCOME", json.dumps(outcome(name, LIBRARIES[library][1])), flush=True)


def column(library: str, pythons: dict[str, str]) -> list[str]:
    """Try all specimens in one library; one that ends the process is an outcome too."""
    environment, _ = LIBRARIES[library]
    found: list[str] = []
    while len(found) < len(SPECIMENS):
        run = subprocess.run(
            [pythons[environment], __file__, "--worker", library, str(len(found))],
            env=surroundings(environment, 1),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("OUTCOME ")]
        found += [json.loads(line.removeprefix("OUTCOME ")) for line in lines]
        if run.returncode:
            if not lines and not found:
                raise RuntimeError(run.stderr)
            found.append("**ends the process**")
    return found


def main() -> None:
    """Try everything, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], int(options.worker[1]))
        return
    pythons = {"here": sys.executable, "original": original_python()}
    columns = {library: column(library, pythons) for library in options.libraries}
    rows = [[name, *(cells[i] for cells in columns.values())] for i, name in enumerate(SPECIMENS)]
    head = ["", *columns]
    survived = ["survive", *(f"{cells.count(YES)} of {len(cells)}" for cells in columns.values())]
    print(rst.plain(head, [*rows, survived]))
    if options.libraries == list(LIBRARIES):
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "survival.rst").write_text(text(head, [*rows, survived]))


def text(head: list[str], rows: list[list[str]]) -> str:
    """Write the table and its explanation for the documentation."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    about = (
        'Each cell is the result of a test: ``{"value": specimen, "other": array}`` was saved and loaded again with the'
        " library's defaults. *yes*: the structure, types, dtypes, shapes, bits and weak types are the same (a NumPy"
        " array and a JAX array count as the same). *as*: the values are there, but in another structure or type."
        " *refused*: saving raised an error. Bold: saving raised no error, but the value was lost or changed."
        " Equinox can only load into a template, so it got the original tree as the template. safetensors"
        " stores flat dicts of arrays, not trees.\n\n"
        f"With {found}; this library at {this_version()}.\n"
    )
    return about + "\n" + rst.table("What survives without a template", head, rows)


if __name__ == "__main__":
    main()

"""Mutation testing: change a condition or a constant, and see whether a test fails.

    python tests/mutation/run.py [--seed 0] [--share 0.22] [MODULE ...]

Each mutant of the sample is killed by a failing test, or survives. What survives is tested, removed, or
listed in equivalent.json with the reason why it changes nothing that the specification promises. The run
goes on where an earlier one with the same output folder stopped; delete the folder to start again.
"""

import argparse
import functools
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_PACKAGE = _ROOT / "src" / "pytree2safetensors"
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_PACKAGE.parent)]
os.chdir(_ROOT)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "HOSTILE_MUTATIONS": "100",
}

import jax  # noqa: E402, F401 # once, for all processes that this one forks
import pytest  # noqa: E402
from mutants import Mutant, mutants_of  # noqa: E402
from worker import QUICK, THOROUGH, WHOLE, Baseline, Killer, Reached, import_mutant  # noqa: E402

# What decides, and the tests that ask about it without processes of their own.
MODULES = [
    "_messages.py",
    "_tree/*.py",
    "_format/*.py",
    "_load/[!aev]*.py",
    "_load/ahead.py",
    "_load/assembling.py",
    "_leaves/cast.py",
    "_leaves/host.py",
    "_leaves/[defv]*.py",
    "_leaves/prng_keys.py",
    "_leaves/regions.py",
    "_leaves/renaming.py",
    "_leaves/spec.py",
    "_leaves/unstorable.py",
    "_save/chunks.py",
    "_save/contents.py",
    "_save/flat_dict.py",
    "_save/plan.py",
    "_save/renamed.py",
    "_save/share.py",
]
TESTS = ["tree", "format", "laws", "load", "leaves", "save", "conformance"]
TESTS += [f"robustness/test_{name}.py" for name in ("arguments", "errors", "fuzz")]
TESTS += [f"robustness/test_errors_of_{name}.py" for name in ("files", "templates")]
TESTS += [f"storage/test_{name}.py" for name in ("locations", "progress", "streams")]
TESTS += ["storage/test_remote_loading.py"]
_STALLED = 120.0  # seconds without a result after which a process is ended


def pytest_run(plugin: object, tests: list[str], folder: Path) -> None:
    """Run pytest with a plugin, quietly."""
    options = ["-q", "-s", "-n0", "--tb=no", "--assert=plain", "-m", "not multiprocess"]
    options += ["-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=failed"]
    options += ["-W", "ignore::SyntaxWarning"]  # of tests that ask for what it warns of
    options += [f"--basetemp={folder / 'tmp'}"]
    pytest.main([*options, *tests], plugins=[plugin])


def forked(work: Callable[[], None], log: Path, out: Path, seconds: float = 0) -> None:
    """Run something in a process of its own, until it ends or `out` stops growing.

    `seconds` is how long the tests between two results take.
    """
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (14 << 30, 14 << 30))
        try:
            work()
        except BaseException:  # noqa: BLE001 # nothing may go on in the child
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    size, since = -1, time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.2)
        if out.exists() and out.stat().st_size != size:
            size, since = out.stat().st_size, time.monotonic()
        if size >= 0 and time.monotonic() - since > _STALLED + 3 * seconds:
            os.kill(child, 9)


def results(out: Path) -> dict[str, tuple[str, str]]:
    """The last outcome of each mutant, and what killed it.

    A mutant that twice ended its process, or twice left something behind, is killed.
    """
    found: dict[str, tuple[str, str]] = {}
    started, broken = Counter[str](), Counter[str]()
    for line in out.read_text().splitlines() if out.exists() else []:
        name, outcome, killer = json.loads(line)
        started[name] = started[name] + 1 if outcome == "started" else 0
        broken[name] += outcome == "broken"
        if outcome == "started" and started[name] > 1 and not broken[name]:
            outcome, killer = "killed", "its process ended"
        if outcome == "broken" and broken[name] > 1:
            outcome = "killed"
        found[name] = outcome, killer
    return found


class Run(NamedTuple):
    """What all steps of a run need."""

    sample: list[Mutant]
    baseline: dict[str, Reached]
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "results.jsonl"

    def kill(self) -> None:
        """Try all mutants: those without a result quickly, and then those that survived.

        What then survives may have been reached only by an import, or by tests that came too late.
        """
        for survivor, seconds in (("", QUICK), ("survived", THOROUGH)):
            tried: set[str] = set()
            while todo := self.todo(survivor, tried):
                print(f"{len(todo)} of {len(self.sample)}", flush=True)
                done = results(self.out)
                in_place = [m for m in todo if done.get(m.id, ("",))[0] != "alone"]
                if in_place:
                    tried |= self.attempt(in_place, TESTS, seconds)
                    continue
                for mutant in todo:
                    tests = TESTS if survivor else near(mutant)
                    tried |= self.attempt([mutant], tests, seconds, alone=True)
        for mutant in self.todo("survived", set()):
            print(f"all tests near {mutant.module}", flush=True)
            self.attempt([mutant], near(mutant), WHOLE, alone=True)

    def todo(self, survivor: str, tried: set[str]) -> list[Mutant]:
        """The mutants without a result, or that survived for no known reason and were not tried again."""
        outcomes = {name: outcome for name, (outcome, _) in results(self.out).items()}
        tried = tried | {mutant.id for mutant in self.sample if is_known(mutant)}
        found = [(mutant, outcomes.get(mutant.id, "started")) for mutant in self.sample]
        return [
            mutant
            for mutant, outcome in found
            if outcome in {"started", "broken", "alone"}
            or (outcome == survivor and mutant.id not in tried)
        ]

    def attempt(
        self, mutants: list[Mutant], tests: list[str], seconds: float, *, alone: bool = False
    ) -> set[str]:
        """Run tests of some seconds on mutants in a process of their own; which of them it has tried."""
        killer = Killer(_PACKAGE, mutants, self.baseline, self.out, seconds, alone)
        before = len(self.out.read_text().splitlines()) if self.out.exists() else 0

        def work() -> None:
            if alone:
                import_mutant(_PACKAGE, mutants[0])
            pytest_run(killer, [f"tests/{name}" for name in tests], self.folder)

        forked(work, self.folder / "log", self.out, seconds)
        lines = self.out.read_text().splitlines()[before:] if self.out.exists() else []
        if not lines and alone:  # the tests cannot be imported with it
            killer.say(mutants[0], "killed", "import")
        return {json.loads(line)[0] for line in lines}


def near(mutant: Mutant) -> list[str]:
    """The tests that ask about the folder of a mutant."""
    folder, _, file = mutant.module.partition("/")
    return [folder.strip("_"), "laws"] if file else TESTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("modules", nargs="*", default=MODULES, help="patterns below the package")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample")
    parser.add_argument("--share", type=float, default=0.22, help="of all mutants in the sample")
    parser.add_argument("--out", type=Path, default=_ROOT / ".mutation", help="folder of results")
    parser.add_argument("--figures", type=Path, help="a JSON file to write the result to")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    modules = sorted({path for name in options.modules for path in _PACKAGE.glob(name)})
    mutants = [m for path in modules for m in mutants_of(_PACKAGE, str(path.relative_to(_PACKAGE)))]
    sample = [mutant for mutant in mutants if mutant.is_drawn(options.seed, options.share)]
    file = options.out / "baseline.json"
    if not file.exists():
        plugin = Baseline(_PACKAGE, file)
        tests = [f"tests/{name}" for name in TESTS]
        forked(functools.partial(pytest_run, plugin, tests, options.out), options.out / "log", file)
    baseline = {name: Reached(*reached) for name, reached in json.loads(file.read_text()).items()}
    Run(sample, baseline, options.out).kill()
    sys.exit(not report(sample, results(options.out / "results.jsonl"), options))


def report(
    sample: list[Mutant], done: dict[str, tuple[str, str]], options: argparse.Namespace
) -> bool:
    """Print the figures and what survived; whether enough is killed or known to be equivalent."""
    alive = [mutant for mutant in sample if done[mutant.id][0] == "survived"]
    survived = [mutant for mutant in alive if not is_known(mutant)]
    figures = {
        "seed": options.seed,
        "mutants": len(sample),
        "killed": len(sample) - len(alive),
        "equivalent": len(alive) - len(survived),
        "survived": [{key: getattr(mutant, key) for key in _KEYS} for mutant in survived],
        "versions": {"Python": sys.version.split()[0]}
        | {name: version(name) for name in ("jax", "numpy", "hypothesis", "pytest")},
    }
    print(json.dumps(figures, indent=2))
    if options.figures:
        options.figures.write_text(json.dumps(figures, indent=2) + "\n")
    return len(survived) < _MOST * len(sample)


_MOST = 0.1  # of all mutants that may survive for no known reason
EQUIVALENT = _HERE / "equivalent.json"
_KEYS = ("module", "function", "before", "after")


def is_known(mutant: Mutant) -> bool:
    """Return whether a mutant is listed in equivalent.json."""
    return tuple(getattr(mutant, key) for key in _KEYS) in _known()


@functools.cache
def _known() -> set[tuple[str, ...]]:
    groups = json.loads(EQUIVALENT.read_text())
    return {tuple(entry[key] for key in _KEYS) for group in groups for entry in group["changes"]}


if __name__ == "__main__":
    main()

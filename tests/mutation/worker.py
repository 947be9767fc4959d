"""A pytest plugin that runs tests on mutants, within one process that has collected all tests.

A mutant of a function takes its place by its code alone, so nothing is imported again. A mutant of
what runs on import needs a process of its own, in which it is there from the start.
"""

import contextlib
import functools
import gc
import json
import re
import signal
import sys
import time
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest
from _pytest.runner import SetupState, runtestprotocol
from hypothesis import HealthCheck, Phase, settings
from mutants import Mutant

_LONGEST = 5.0  # seconds of a test that is of use
_EXAMPLES = 20
# Seconds that the tests of a mutant take without it.
QUICK, THOROUGH, WHOLE = 2.0, 30.0, 600.0


class Reached(NamedTuple):
    """What a test of the baseline does: its seconds, and the lines of each module that it runs."""

    seconds: float
    lines: dict[str, list[int]]

    @property
    def cost(self) -> float:
        """Its seconds times the lines that it runs: tests of little code say more about it."""
        return self.seconds * sum(map(len, self.lines.values()))


class TimeUp(BaseException):
    """A test took much longer on a mutant."""


class _Plugin:
    """What both kinds of runs share."""

    def pytest_collection(self) -> None:
        settings.register_profile(
            "mutation",
            derandomize=True,
            deadline=None,
            database=None,
            max_examples=_EXAMPLES,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("mutation")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.is_importable = not session.testsfailed
        self.run({item.nodeid: item for item in session.items})
        return True

    def run(self, items: dict[str, pytest.Item]) -> None:
        raise NotImplementedError


def passes(item: pytest.Item, seconds: float) -> bool:
    """Run one test, as often as one likes; it fails if it takes much longer than some seconds."""
    item._initrequest()  # type: ignore[attr-defined] # as reruns do
    for number in (signal.SIGVTALRM, signal.SIGALRM):
        signal.signal(number, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, 60 + 10 * seconds, 5)  # of a test that waits for ever
    signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST + 10 * seconds, 5)
    try:
        reports = runtestprotocol(item, nextitem=None, log=False)
    except BaseException:  # noqa: BLE001 # pytest lets interrupts through
        item.session._setupstate = SetupState()  # what was set up is not torn down
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return all(report.passed for report in reports)


class Baseline(_Plugin):
    """Finds which tests reach which lines."""

    def __init__(self, package: Path, out: Path) -> None:
        self.package, self.out = package, out

    def run(self, items: dict[str, pytest.Item]) -> None:
        measured = coverage.Coverage(
            data_file=None, include=[f"{self.package}/*"], config_file=False
        )
        measured.start()
        seconds: dict[str, float] = {}
        for name, item in items.items():
            measured.switch_context(name)
            start = time.process_time()
            if passes(item, 0):
                seconds[name] = time.process_time() - start
            print(f"{time.process_time() - start:.2f} {name}", flush=True)
        measured.stop()
        lines: dict[str, dict[str, list[int]]] = {name: {} for name in seconds}
        for file in measured.get_data().measured_files():
            module = str(Path(file).relative_to(self.package))
            for line, names in measured.get_data().contexts_by_lineno(file).items():
                for name in names:
                    if name in lines:
                        lines[name].setdefault(module, []).append(line)
        found = {name: Reached(seconds[name], lines[name]) for name in seconds}
        self.out.write_text(json.dumps(found))


class Killer(_Plugin):
    """Runs the tests that reach a mutant, until one fails."""

    def __init__(
        self,
        package: Path,
        todo: list[Mutant],
        baseline: dict[str, Reached],
        out: Path,
        seconds: float,
        alone: bool = False,
    ) -> None:
        self.package, self.todo, self.baseline, self.out = package, todo, baseline, out
        self.alone = alone  # in a process that has imported the one mutant
        self.seconds = seconds
        self.last: dict[str, None] = {}  # what killed mutants, the latest last

    def run(self, items: dict[str, pytest.Item]) -> None:
        self.items = items
        for mutant in self.todo:
            self.say(mutant, "started")
            with exchanged(self.package, mutant, self.alone) as is_there:
                killer = self.killer(mutant) if is_there else ""
            if self.alone and not self.is_importable:
                killer = "import"
            if not killer:
                needs_import = mutant.imported or not is_there
                self.say(mutant, "alone" if needs_import and not self.alone else "survived")
            elif self.alone or self.check(killer):
                self.say(mutant, "killed", killer)
            else:  # the mutant left something behind
                self.say(mutant, "broken", killer)
                return

    def say(self, mutant: Mutant, outcome: str, killer: str = "") -> None:
        with self.out.open("a") as file:
            file.write(json.dumps([mutant.id, outcome, killer]) + "\n")

    def killer(self, mutant: Mutant) -> str:
        """The test that fails on a mutant, or none."""
        for name in self.order(mutant):
            if not self.check(name):
                self.last.pop(name, None)
                self.last[name] = None
                return name
        return ""

    def check(self, name: str) -> bool:
        return passes(self.items[name], self.baseline[name].seconds)

    def order(self, mutant: Mutant) -> list[str]:
        names = [name for name in reaching(mutant, self.baseline) if name in self.items]
        if self.seconds > QUICK:
            names.sort(key=lambda name: self.baseline[name].cost)
        latest = {name: number for number, name in enumerate(self.last)}
        names.sort(key=lambda name: -latest.get(name, -1))
        budget, chosen = self.seconds, []
        for name in names:
            budget -= self.baseline[name].seconds
            if budget > 0:
                chosen.append(name)
        return chosen


def reaching(mutant: Mutant, baseline: dict[str, Reached]) -> list[str]:
    """The tests that run the line of a mutant, the quick ones first."""
    by_line: dict[int, list[str]] = {}
    for name, reached in sorted(baseline.items(), key=lambda pair: pair[1].seconds):
        for line in reached.lines.get(mutant.module, []):
            by_line.setdefault(line, []).append(name)
    if mutant.imported:
        return list(dict.fromkeys(name for names in by_line.values() for name in names))
    # Some lines are part of a statement that starts above them.
    line = max((line for line in by_line if line <= mutant.line), default=0)
    return by_line.get(line, [])


def _time_is_up(*_: object) -> None:
    raise TimeUp


# --- mutants in place --------------------------------------------------------------------------


@contextlib.contextmanager
def exchanged(package: Path, mutant: Mutant, alone: bool) -> Iterator[bool]:
    """Let a module be its mutant; whether that was possible."""
    if alone:  # it is there
        yield True
        return
    path = str(package / mutant.module)
    module = sys.modules[f"{package.name}.{mutant.module.removesuffix('.py').replace('/', '.')}"]
    assert isinstance(module.__loader__, SourceFileLoader)
    code = module.__loader__.source_to_code(mutant.source.encode(), path)
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, package.name)
        try:
            count = _rebind(module, code, undo) if mutant.imported else _recode(path, code, undo)
        except Exception:  # noqa: BLE001 # a second import may be refused
            count = 0
        _forget(package.name)
        yield count > 0


def _recode(path: str, code: types.CodeType, undo: contextlib.ExitStack) -> int:
    """Give the functions of a module the code of its mutant; how many, or 0 if that is impossible."""
    changed, count = _codes(code), 0
    for function in _functions(path):
        new, old = changed[_key(function.__code__)], function.__code__
        if len(new.co_freevars) != len(old.co_freevars):
            return 0
        undo.callback(setattr, function, "__code__", old)
        function.__code__ = new
        count += 1
    return count


_DATA = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, re.Pattern)


def _rebind(module: types.ModuleType, code: types.CodeType, undo: contextlib.ExitStack) -> int:
    """Give a module the constants of its mutant, and all modules that import them by name."""
    other = types.ModuleType(module.__name__)
    exec(code, vars(other))
    package = module.__name__.partition(".")[0]
    places = [vars(found) for name, found in sys.modules.items() if name.startswith(package)]
    count = 0
    for name, new in vars(other).items():
        old = vars(module).get(name)
        if not name.startswith("__") and isinstance(new, _DATA) and new != old:
            for place in places:
                if name in place and place[name] is old:
                    undo.callback(place.__setitem__, name, old)
                    place[name] = new
                    count += 1
    return count


@functools.cache
def _functions(path: str) -> list[types.FunctionType]:
    """The functions of a module, whatever is wrapped around them."""
    return [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, types.FunctionType) and thing.__code__.co_filename == path
    ]


def _key(code: types.CodeType) -> tuple[str, int]:
    return getattr(code, "co_qualname", code.co_name), code.co_firstlineno


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    found = {_key(code): code}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _codes(constant)
    return found


@functools.cache
def _caches(package: str) -> list[Any]:
    things = (thing for thing in gc.get_objects() if hasattr(type(thing), "cache_clear"))
    return [thing for thing in things if str(thing.__module__).startswith(package)]


def _forget(package: str) -> None:
    """Clear what functions remember."""
    for cache in _caches(package):
        cache.cache_clear()


def import_mutant(package: Path, mutant: Mutant) -> None:
    """Make the import of a module read a mutant's source."""
    target = str(package / mutant.module)
    loader: Any = SourceFileLoader
    stats, data = loader.path_stats, loader.get_data

    def path_stats(self: SourceFileLoader, path: str) -> Any:
        # No compiled file is that old.
        return {"mtime": 1, "size": 0} if path == target else stats(self, path)

    def get_data(self: SourceFileLoader, path: str) -> Any:
        return mutant.source.encode() if path == target else data(self, path)

    loader.path_stats, loader.get_data = path_stats, get_data
    sys.dont_write_bytecode = True

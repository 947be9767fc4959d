"""A script that interrupts each operation, and prints what the interrupts left behind.

    python tests/interrupts.py POSITIONS SEED

It runs in a process of its own: the runtime type checks of the tests would take what a signal's handler
raises for a wrong type.
"""

import contextlib
import ctypes
import dis
import faulthandler
import functools
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytree2safetensors
from folders import names_in
from pytree2safetensors import (
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.saver import wait_for_earlier
from pytree2safetensors._storage.threads import undisturbed
from versions import assert_holds, litter, open_descriptors, version

# An interrupt may come at each instruction of the package, and of the code behind its `with` statements.
_OURS = (str(Path(pytree2safetensors.__file__).parent), contextlib.__file__)

# Called in place of a trace function, it sets a flag, and nothing else: Python itself then delivers the
# interrupt where it delivers any.
_set_flag = ctypes.PYFUNCTYPE(None, *3 * [ctypes.py_object])(
    ("PyErr_SetInterrupt", ctypes.pythonapi)
)

# Python looks for interrupts where a function begins, where a loop begins again, and after a call of a
# function in C. Python 3.14 also does so before any other instruction, but only if there is a trace function.
_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX"}
_LOOKS_EVERYWHERE = sys.version_info >= (3, 14)


def interrupted(
    work: Callable[[], object],
    at: int = -1,
    within: tuple[str, ...] = _OURS,
    *,
    everywhere: bool = not _LOOKS_EVERYWHERE,
) -> int:
    """Interrupt some work at the instruction with a number; return how many instructions it has.

    Only instructions `within` some files count. Unless `everywhere`, the interrupt waits for an
    instruction where Python would look for it without a trace function.

    Raises:
        KeyboardInterrupt: The interrupt came while the work was under way.
    """
    count, looking = 0, 0  # the id of a frame, which must not live longer

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal looking
        looking = id(frame)
        if not frame.f_code.co_filename.startswith(within):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return trace_instruction

    def trace_instruction(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal at, count, looking
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            looks = everywhere or looking == id(frame) or name == "JUMP_BACKWARD"
            looking = id(frame) if name in _CALLS else 0  # unless it calls a function in Python
            if 0 <= at <= count and looks:
                at = -1
                frame.f_trace = _set_flag
                return None
            count += 1
        return trace_instruction

    def handle(_: int, __: FrameType | None) -> None:
        sys.settrace(None)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return count


# --- operations ---------------------------------------------------------------------------------


class Operation(NamedTuple):
    """An operation to interrupt, and the save that came before it, if any."""

    run: Callable[[Path], object]
    before: dict[str, Any] | None
    saves: bool = True


SHARDS, MORE, ONE = {"max_shard_size": 1000}, {"max_shard_size": 500}, {"max_shard_size": "1GB"}


def saving(**options: Any) -> Callable[[Path], object]:
    return lambda path: save_pytree(version(2), path, **options)


def saving_in_the_background(**options: Any) -> Callable[[Path], object]:
    return lambda path: save_pytree_async(version(2), path, **options).result()


def loading_into(path: Path) -> object:
    return load_into_pytree(version(1), path)


OPERATIONS = {
    "a new file": Operation(saving(), None),
    "a file": Operation(saving(), {}),
    "a file with digests": Operation(saving(checksum=True), {}),
    "a new folder": Operation(saving(**SHARDS), None),
    "a folder": Operation(saving(**SHARDS), SHARDS),
    "a folder of other shards": Operation(saving(**MORE, checksum=True), SHARDS),
    "a folder of one file": Operation(saving(**ONE), SHARDS),
    "a file in the background": Operation(saving_in_the_background(), {}),
    "a folder in the background": Operation(saving_in_the_background(**SHARDS), SHARDS),
    "loading a file": Operation(load_pytree, {}, saves=False),
    "mapping a file": Operation(lambda path: load_pytree(path, mmap=True), {}, saves=False),
    "loading a folder": Operation(load_pytree, SHARDS, saves=False),
    "verifying a folder": Operation(load_pytree, {**SHARDS, "checksum": True}, saves=False),
    "mapping a folder": Operation(lambda path: load_pytree(path, mmap=True), SHARDS, saves=False),
    "loading into a template": Operation(loading_into, SHARDS, saves=False),
    "loading abstractly": Operation(load_abstract, SHARDS, saves=False),
    "loading metadata": Operation(load_metadata, SHARDS, saves=False),
}


def problems_of(operation: Operation, folder: Path, positions: int, seed: str) -> list[str]:
    """Interrupt an operation at many positions; return what went wrong."""
    path = folder / "model"
    restore(operation, path)
    interrupted(lambda: operation.run(path))  # the first run does what a process does only once
    restore(operation, path)
    count = interrupted(lambda: operation.run(path))
    chosen = random.Random(seed).sample(range(count), min(count, positions))
    gc.collect()
    gc.freeze()
    found, hits, held = [], 0, open_descriptors()
    for number in chosen:
        restore(operation, path)
        try:
            interrupted(lambda: operation.run(path), number)
        except KeyboardInterrupt as error:
            hits += 1
            where = place_of(error)
            del error
        else:
            where = "nowhere"
        for problem in problems_after(operation, path, held):
            found.append(f"{problem}: {where} ({number})")
            held = open_descriptors()
            gc.enable()
    assert hits >= len(chosen) // 3, f"{hits} of {len(chosen)} interrupts came"
    return found


def restore(operation: Operation, path: Path) -> None:
    """Save what was there before, unless it is still there."""
    if operation.before is None:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    elif operation.saves or not path.exists():
        save_pytree(version(1), path, durable=False, **operation.before)


def problems_after(operation: Operation, path: Path, held: int) -> list[str]:
    wait_for_earlier()  # background saves continue
    found = []
    if not gc.isenabled():
        found.append("the collector is off")
    if path.exists():
        try:
            assert_holds(path, 1, 2)
        except Exception as error:  # noqa: BLE001 # it is reported
            found.append(f"it holds something else, {error!r}")
    elif operation.before is not None:
        found.append("it is gone")
    if left := [*litter(path.parent), *litter(path)]:
        found.append(f"{len(left)} temporary files are left")
        for file in left:
            file.unlink()
    if open_descriptors() > held:
        gc.collect()  # a traceback may have them
        if open_descriptors() > held:
            found.append("a descriptor is left open")
    if set(names_in(path.parent)) - {"model"}:
        found.append(f"there is more: {names_in(path.parent)}")
    return found


def place_of(error: BaseException) -> str:
    """Return the lines of the package where the interrupt came."""
    places, trace = [], error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(_OURS):
            places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return " < ".join(places[:-4:-1])


def problems_of_waiting(wait: Callable[[Callable[[], object]], object]) -> list[str]:
    """Interrupt the thread that waits for work of another, everywhere, also in Python's own code."""
    within = (*_OURS, threading.__file__)
    found, count = [], interrupted(lambda: wait(lambda: None), within=within)
    for number in range(count):
        steps = list[str]()

        def work(steps: list[str] = steps) -> None:
            time.sleep(0.001)
            steps.append("done")

        faulthandler.dump_traceback_later(60, exit=True)  # if the threads wait for each other
        try:
            interrupted(functools.partial(wait, work), number, within, everywhere=True)
        except KeyboardInterrupt as error:
            before = bool(steps)
            time.sleep(0.01)
            if bool(steps) != before:
                found.append(f"the work went on: {place_of(error)} ({number})")
        else:
            assert steps == ["done"]
        finally:
            faulthandler.cancel_dump_traceback_later()
    return found


if __name__ == "__main__":
    for wait in (lambda work: Interrupt().run(work)), undisturbed:
        for problem in problems_of_waiting(wait):
            print(problem)
    sys.unraisablehook = lambda _: None  # an interrupt in a `__del__`, which only prints it
    for name, operation in OPERATIONS.items():
        with tempfile.TemporaryDirectory() as temporary:
            for problem in problems_of(operation, Path(temporary), int(sys.argv[1]), sys.argv[2]):
                print(f"{name}: {problem}")
    sys.stdout.flush()
    os._exit(0)  # an interrupt in `Thread.start` may leave a thread that never begins

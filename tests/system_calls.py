"""The operating-system calls of a save: recorded, and made to fail one after the other."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, NamedTuple

# The modules whose calls count: the package's own, and what of the standard library serves it.
_OURS = {"pytree2safetensors", "posixpath", "genericpath", "os"}
# What asks the process about itself, and cannot fail.
_INNER = {"fspath", "getpid", "geteuid", "getegid", "getuid", "getgid", "cpu_count", "strerror"}


class Call(NamedTuple):
    """One call, and what it was about: the last part of each path, or the kind of file."""

    name: str
    about: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.name, *self.about])


class Fault(NamedTuple):
    """What happens in place of a call, or after it."""

    name: str
    error: Callable[[], BaseException] | None = None
    after: bool = False  # the call has had its effect before


def failing(code: int) -> Fault:
    return Fault(errno.errorcode[code], lambda: OSError(code, os.strerror(code)))


SHORT = Fault("short write")
FAULTS = [
    *map(failing, (errno.ENOSPC, errno.EIO, errno.EINTR)),
    Fault("interrupt before", KeyboardInterrupt),
    # A signal's handler runs when the call that it came in has returned, and its result is lost.
    Fault("interrupt after", KeyboardInterrupt, after=True),
    SHORT,
]


class Recorder:
    """Records the calls, and lets one of them fail."""

    def __init__(self, fail_at: int = -1, fault: Fault = SHORT) -> None:
        self.calls: list[Call] = []
        self.fail_at, self.fault = fail_at, fault
        self.descriptors: dict[int, str] = {}
        self.failing = False

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = len(self.calls)
        files = [*args[:1], *(argument for argument in args[1:] if isinstance(argument, str))]
        call = Call(name, tuple(map(self.describe, files)))
        self.calls.append(call)
        if number == self.fail_at and self.fault is SHORT:
            args = (args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)])
        # A descriptor is gone when closing it fails.
        elif number == self.fail_at and not self.fault.after and name != "close":
            self.fail(args)
        try:
            result = function(*args, **kwargs)
        except OSError:
            if number == self.fail_at and self.fault.after:
                self.fail(args)
            raise
        if name == "open":
            self.descriptors[result] = self.describe(args[0])
        if number == self.fail_at and self.fault is not SHORT:
            self.fail(args)
        return result

    def fail(self, args: tuple[Any, ...]) -> None:
        assert self.fault.error is not None
        error = self.fault.error()
        if isinstance(error, OSError) and args and isinstance(args[0], str):
            error.filename = args[0]  # as the system's own errors have it
        raise error

    def describe(self, argument: Any) -> str:
        if isinstance(argument, int):
            return self.descriptors.get(argument, "?")
        path = Path(argument)
        if path.is_dir():
            return "folder"
        return "temporary" if path.suffix == ".tmp" else path.name


@contextmanager
def watched(recorder: Recorder) -> Iterator[Recorder]:
    """Let a recorder see every call to the operating system that the package makes."""
    names = [n for n, f in vars(os).items() if isinstance(f, BuiltinFunctionType)]
    originals = {name: getattr(os, name) for name in names if name not in _INNER}
    recording = False

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal recording
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if recording or caller not in _OURS:
                return function(*args, **kwargs)
            recording = True
            try:
                return recorder.call(name, function, *args, **kwargs)
            finally:
                recording = False

        return called

    try:
        for name, function in originals.items():
            setattr(os, name, wrapped(name, function))
        yield recorder
    finally:
        for name, function in originals.items():
            setattr(os, name, function)

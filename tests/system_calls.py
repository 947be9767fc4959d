"""The operating-system calls of the package: recorded, and made to fail one after the other."""

import errno
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, NamedTuple
from unittest import mock

# The modules whose calls count: the package, and modules of the standard library that it uses.
_OURS = {"pytree2safetensors", "posixpath", "genericpath", "os"}
# Calls about the process itself, which cannot fail.
_INNER = {"fspath", "getpid", "geteuid", "getegid", "getuid", "getgid", "cpu_count", "strerror"}


class Call(NamedTuple):
    """One call that the package makes: how many came before it, and what `run` does."""

    number: int
    name: str
    args: tuple[Any, ...]
    run: Callable[[], Any]


@contextmanager
def watched(act: Callable[[Call], Any], *, flushing: bool = True) -> Iterator[None]:
    """Ask `act` for the result of every call to the operating system that the package makes.

    Files are flushed by `fsync` on every system.

    Args:
        act: Calls `run`, or fails; calls that it makes itself are not watched.
        flushing: Whether `fsync` does anything, as disks are slow.
    """
    numbers, inside = iter(range(sys.maxsize)), threading.local()

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if getattr(inside, "act", False) or caller not in _OURS:
                return function(*args, **options)
            inside.act = True
            try:
                run = functools.partial(function, *args, **options)
                return act(Call(next(numbers), name, args, run))
            finally:
                inside.act = False

        return called

    found = {name: f for name, f in vars(os).items() if isinstance(f, BuiltinFunctionType)}
    originals = {name: f for name, f in found.items() if name not in _INNER}
    try:
        for name, function in originals.items():
            real = function if flushing or name != "fsync" else lambda _: None
            setattr(os, name, watch(name, real))
        with _flushing_by_fsync():
            yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


@contextmanager
def _flushing_by_fsync() -> Iterator[None]:
    """Let macOS refuse `F_FULLFSYNC`, a call of `fcntl`: then the package calls `os.fsync`."""
    if sys.platform != "darwin":
        yield
        return
    import fcntl

    control = fcntl.fcntl

    def refuse(descriptor: Any, command: int, *arguments: Any) -> Any:
        if command == fcntl.F_FULLFSYNC:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return control(descriptor, command, *arguments)

    with mock.patch.object(fcntl, "fcntl", refuse):
        yield


class Fault(NamedTuple):
    """What happens in place of a call, or after it."""

    name: str
    error: Callable[[], BaseException]
    after: bool = False  # the call has had its effect before

    def strike(self, call: Call) -> Any:
        # A descriptor is gone when closing it fails.
        if self.after or call.name == "close":
            with suppress(OSError):
                result = call.run()
                if call.name == "open" and os.name == "nt":
                    os.close(result)  # or nothing could remove the file
        error = self.error()
        if isinstance(error, OSError) and call.args and isinstance(call.args[0], str):
            error.filename = call.args[0]  # as the system's own errors have it
        raise error


def failing(code: int, after: bool = False) -> Fault:
    name = errno.errorcode[code] + (" afterwards" if after else "")
    return Fault(name, lambda: OSError(code, os.strerror(code)), after)


FAULTS = [
    *map(failing, (errno.ENOSPC, errno.EIO, errno.EINTR)),
    failing(errno.EIO, after=True),
    Fault("interrupt", KeyboardInterrupt),
    # A signal's handler runs when the call that it came in has returned, and its result is lost.
    Fault("interrupt afterwards", KeyboardInterrupt, after=True),
]


class Told(NamedTuple):
    """A call in words: its name, and the last part of each path, or the kind of file."""

    name: str
    about: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.name, *self.about])


class Recorder:
    """Records the calls, and lets one of them fail."""

    def __init__(self, fail_at: int = -1, fault: Fault = FAULTS[0]) -> None:
        self.calls: list[Told] = []
        self.fail_at, self.fault = fail_at, fault
        self.descriptors: dict[int, str] = {}

    def __call__(self, call: Call) -> Any:
        files = [*call.args[:1], *(path for path in call.args[1:] if isinstance(path, str))]
        self.calls.append(Told(call.name, tuple(map(self.describe, files))))
        if call.number == self.fail_at:
            return self.fault.strike(call)
        result = call.run()
        if call.name == "open":
            self.descriptors[result] = self.describe(call.args[0])
        return result

    def describe(self, argument: Any) -> str:
        if isinstance(argument, int):
            return self.descriptors.get(argument, "?")
        path = Path(argument)
        if path.is_dir():
            return "folder"
        return "temporary" if path.suffix == ".tmp" else path.name

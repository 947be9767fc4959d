"""Several files of one folder, which change together.

Specification: *Sharded folders*.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

from pytree2safetensors._storage.atomic_file import (
    creating_file,
    discard,
    flush_folder,
    locked,
    temporary_in,
    temporary_name,
    write_chunks,
)
from pytree2safetensors._storage.progress import Progress
from pytree2safetensors._types import Chunk


class Part(NamedTuple):
    """A file to be: its name in the folder, its size, and its bytes."""

    name: str
    size: int
    chunks: Iterable[Chunk]


def replace_together(
    folder: str,
    parts: list[Part],
    stale: Callable[[Iterable[str]], list[str]],
    *,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write files that mean something once the last of them is there; then remove what is stale.

    Args:
        folder: Where the files are to be; made where it is missing.
        parts: The files.
        stale: Which of the names in the folder go afterwards, in order.
        durable: Whether the files have reached the disk when this returns.
        progress: What to call with bytes written, and bytes altogether.

    Raises:
        OSError: Nothing changed; or everything did, and a flush or a removal failed after that; or
            it could not be changed back, and the last file is missing.
    """
    temporaries = {part.name: temporary_name() for part in parts}
    with replacing_together(folder, temporaries, stale, durable=durable) as creating:
        total, before = sum(part.size for part in parts), 0
        for name, size, chunks in parts:
            shifted = None if progress is None else _shifted(progress, before, total)
            with creating(name) as descriptor:
                write_chunks(descriptor, chunks, size, shifted)
            before += size


@contextmanager
def replacing_together(
    folder: str,
    temporaries: Mapping[str, str],
    stale: Callable[[Iterable[str]], list[str]],
    *,
    durable: bool,
) -> Iterator[Callable[[str], AbstractContextManager[int]]]:
    """Give a function that creates one of the files; all take their places when all went well.

    Until then the files have the given temporary names, by which other processes can open them.
    """
    with ExitStack() as undo:
        missing = _missing(folder)
        undo.callback(_remove_empty, missing)
        for above in reversed(missing):
            with suppress(FileExistsError):  # another saver was faster
                os.mkdir(above)
        paths = {name: os.path.join(folder, temporaries[name]) for name in temporaries}
        for path in paths.values():
            undo.callback(discard, path)

        def creating(name: str) -> AbstractContextManager[int]:
            like = _status(os.path.join(folder, name))
            return creating_file(paths[name], like, durable=durable)

        yield creating
        with locked(folder):
            for name in stale(os.listdir(folder)):
                _status(os.path.join(folder, name))  # what cannot be removed is an error by now
            _commit(folder, paths, durable)
            if durable:
                for made in missing:
                    flush_folder(_above(made))
            for name in stale(os.listdir(folder)):
                os.unlink(os.path.join(folder, name))


def _missing(folder: str) -> list[str]:
    """The folders to make, the deepest first."""
    found = []
    while not _exists(folder, os.stat):
        found.append(folder)
        folder = _above(folder)
    return found


def _exists(path: str, look: Callable[[str], os.stat_result]) -> bool:
    """Whether there is such a file. What cannot be known is an error, unlike in `os.path`."""
    try:
        look(path)
    except FileNotFoundError:
        return False
    return True


def _above(path: str) -> str:
    return os.path.dirname(path) or os.curdir


def _remove_empty(folders: Iterable[str]) -> None:
    for folder in folders:
        with suppress(OSError):  # something is in it
            os.rmdir(folder)


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _status(path: str) -> os.stat_result | None:
    """The status of a file that another is to replace; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EEXIST
        raise OSError(code, os.strerror(code), path)
    return status


def _commit(folder: str, temporaries: dict[str, str], durable: bool) -> None:
    """Give the files their names, the last one last.

    Where other names are taken, the last of the older files goes first: nobody finds some files of
    each. The older files live on under temporary names until all is done.
    """
    *others, last = temporaries
    paths = {name: os.path.join(folder, name) for name in temporaries}
    taken = [name for name in others if _exists(paths[name], os.lstat)]
    aside = {name: temporary_in(folder) for name in [last, *taken]} if taken else {}
    settle = partial(_settle, paths, temporaries, aside)
    with ExitStack() as undo:
        undo.callback(settle)  # once more, should an interrupt come into the first time
        undo.callback(settle)
        if taken:
            _set_aside(paths[last], aside[last])
            if durable:
                flush_folder(folder)
        for name in others:
            if name in aside:
                _set_aside(paths[name], aside[name])
            os.replace(temporaries[name], paths[name])
        if others and durable:
            flush_folder(folder)
        os.replace(temporaries[last], paths[last])
        if durable:
            flush_folder(folder)


def _set_aside(path: str, aside: str) -> None:
    with suppress(FileNotFoundError):
        os.replace(path, aside)


def _settle(paths: dict[str, str], temporaries: dict[str, str], aside: dict[str, str]) -> None:
    """Remove the older files where the newer ones have their names, else put them back.

    The disk says which, as an interrupt may come between a change and the next line.
    """
    *_, last = paths
    if not _exists(temporaries[last], os.lstat):
        for older in aside.values():
            discard(older)
        return
    for name, path in paths.items():  # the last one last, and only when all others are there
        if name in aside:
            if _exists(aside[name], os.lstat):
                os.replace(aside[name], path)
        elif not _exists(temporaries[name], os.lstat):
            discard(path)

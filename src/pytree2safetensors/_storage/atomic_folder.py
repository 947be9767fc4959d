"""Several files of one folder, which change together.

Specification: *Sharded folders*.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import NamedTuple

from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.descriptor import Held, flush, write_chunks
from pytree2safetensors._storage.folder import Folder, absolute, explaining_flush
from pytree2safetensors._storage.naming import temporary_name
from pytree2safetensors._storage.progress import Progress, progress_of_part
from pytree2safetensors._storage.threads import undisturbed
from pytree2safetensors._types import Chunk


class NewFile(NamedTuple):
    """A file to write: its name in the folder, its size, and its bytes."""

    name: str
    size: int
    chunks: Iterable[Chunk]


class Older(NamedTuple):
    """What an older save may have left in the folder of a new one.

    Attributes:
        rival: The name of a file that the last new file replaces, removed before that appears.
        stale: Returns those of the names in the folder to remove afterwards, in order.
    """

    rival: str
    stale: Callable[[Iterable[str]], list[str]]


def replace_together(
    path: str,
    files: list[NewFile],
    older: Older,
    *,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write files that become valid with the last of them, then remove stale files.

    Args:
        path: The folder of the files; made if it is missing.
        files: The files.
        older: What an older save may have left there.
        durable: Whether to flush the files to disk before this returns.
        progress: Called with the bytes written and the bytes in total.

    Raises:
        OSError: Nothing was changed. Or everything was changed, and a flush or a removal failed
            afterwards. Or a change could not be undone, and the last file is missing.
    """
    temporaries = {file.name: temporary_name(files[-1].name) for file in files}
    with replacing_together(path, temporaries, older, durable=durable) as creating:
        total, before = sum(file.size for file in files), 0
        for name, size, chunks in files:
            with creating(name, durable) as descriptor:
                write_chunks(descriptor, chunks, size, progress_of_part(progress, before, total))
            before += size


@contextmanager
def replacing_together(
    path: str,
    temporaries: Mapping[str, str],
    older: Older,
    *,
    durable: bool,
) -> Iterator[Callable[[str, bool], AbstractContextManager[int]]]:
    """Yield a function that creates one of the files, and flushes it if asked.

    All files get their names if no error occurs. Until then, they have the given temporary names, by
    which other processes can open them. A file with a new name gets the permissions of one of those
    that are replaced: an index those of an index, and another file those of another one, if there is one.
    """
    path = absolute(path or os.curdir)
    with ExitStack() as undo:
        parents = _make_missing(path, undo, durable=durable)
        folder = undo.enter_context(Folder(path, listed=True))
        for temporary in temporaries.values():
            undo.callback(folder.discard, temporary)
        there = set(folder.names())
        replaced = [name for name in (*temporaries, older.rival) if name in there]
        replaced += older.stale(there)
        others, indexes = (sorted(replaced, key=_is_index, reverse=last) for last in (False, True))
        alike = {False: others, True: indexes}  # by whether a new file is an index

        @contextmanager
        def creating(name: str, flushed: bool) -> Iterator[int]:
            model, old = _first_replaced(folder, name, alike[_is_index(name)])
            with Held() as held:
                descriptor = folder.create(held, temporaries[name], model, old)
                yield descriptor
                if flushed:
                    flush(descriptor)
                held.close()

        def commit() -> None:
            with folder.locked():
                _commit_all(folder, temporaries, older, parents, durable)

        yield creating
        # A save in a signal handler would wait for the lock of the save that it interrupts.
        undisturbed(commit)


def _make_missing(path: str, undo: ExitStack, *, durable: bool) -> list[Folder]:
    """Make the folders of a path that are missing; return those above them if they are to be flushed."""
    missing, parents = _missing(path), list[Folder]()
    undo.callback(_remove_empty, missing)
    for made in reversed(missing):
        if durable:
            above = os.path.dirname(made)
            with explaining_flush(above):
                parents.append(undo.enter_context(Folder(above, listed=True)))
        with suppress(FileExistsError):  # made by another save
            os.mkdir(made)
    return parents


def _commit_all(
    folder: Folder,
    temporaries: Mapping[str, str],
    older: Older,
    parents: list[Folder],
    durable: bool,
) -> None:
    """Check that nothing is in the way, give the files their names, and remove older files."""
    for name in (older.rival, *older.stale(folder.names())):
        _replaced(folder, name)  # raise an error now if it cannot be removed
    for temporary in temporaries.values():
        _check_there(folder, temporary)
    _commit(folder, temporaries, older.rival, durable)
    for parent in reversed(parents):
        parent.flush()
    for name in older.stale(folder.names()):
        _remove_stale(folder, name)
    *_, last = temporaries
    for name in (last, older.rival):
        folder.remove_abandoned(name)


def _is_index(name: str) -> bool:
    return name.endswith(".json")


def _missing(path: str) -> list[str]:
    """Return the folders to make, the deepest first."""
    found: list[str] = []
    while not _is_there(path) and path not in found:  # a drive may be missing
        found.append(path)
        path = os.path.dirname(path) or os.curdir
    return found


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _remove_empty(folders: Iterable[str]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty
            os.rmdir(folder)


def _replaced(folder: Folder, name: str) -> os.stat_result | None:
    """Return the status of a file that will be replaced; None if it does not exist."""
    status = folder.status(name)
    if status is not None and not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EEXIST
        text = f"{os.strerror(code)} (the save would replace or remove {shorten(name)})"
        raise OSError(code, text, name)
    return status


def _first_replaced(
    folder: Folder, name: str, others: Iterable[str]
) -> tuple[str, os.stat_result | None]:
    """Return the first of the files that exists, and its status."""
    for found in chain([name], others):
        status = _replaced(folder, found)
        if status is not None:
            return found, status
    return name, None


def _check_there(folder: Folder, temporary: str) -> None:
    if not folder.has(temporary):
        text = "another program has removed an unfinished file of this save; save again"
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)} ({text})", temporary)


def _remove_stale(folder: Folder, name: str) -> None:
    try:
        with suppress(FileNotFoundError):  # another program has removed it
            folder.unlink(name)
    except OSError as error:
        text = f"the new checkpoint is complete, but {shorten(name)} of the older one cannot be removed"
        raise OSError(error.errno, f"{error.strerror} ({text})", name) from None


def _commit(folder: Folder, temporaries: Mapping[str, str], rival: str, durable: bool) -> None:
    """Rename the files to their final names, the last one last.

    If other names are in use, the last of the older files is moved away first, and the rival just
    before the last file appears. So a reader never finds files of both saves, or two files to choose
    from. The older files keep temporary names until everything is done.
    """
    *others, last = temporaries
    taken = [name for name in others if folder.has(name)]
    gone = [rival] if folder.has(rival) else []
    aside = {name: temporary_name(last) for name in [*gone, *taken, *([last] if taken else [])]}
    committed: list[bool] = []
    settle = partial(_settle, folder, temporaries, aside, committed)

    def set_aside(name: str) -> None:
        with suppress(FileNotFoundError):
            folder.replace(name, aside[name])

    def settled() -> None:
        if durable:
            folder.flush()

    with ExitStack() as undo:
        undo.callback(settle)  # again, in case an interrupt stops the first call
        undo.callback(settle)
        if taken:
            set_aside(last)
            settled()
        for name in others:
            if name in aside:
                set_aside(name)
            folder.replace(temporaries[name], name)
        if others:
            settled()
        if gone:
            set_aside(rival)
            settled()
        folder.replace(temporaries[last], last)
        committed.append(True)
        settled()


def _settle(
    folder: Folder, temporaries: Mapping[str, str], aside: dict[str, str], committed: list[bool]
) -> None:
    """Remove the older files if the newer ones have their names, or else restore them.

    Look at the disk, because an interrupt may come between a change and the next line.
    """
    *_, last = temporaries
    # If another program has removed the new file, it has neither of its names. It may also do so, as a
    # save without a lock does, after the new file got its name.
    if not folder.has(temporaries[last]) and (committed or folder.has(last)):
        for older in aside.values():
            folder.discard(older)
        return
    # The last file last, and only if all others exist.
    for name in [*aside.keys() - temporaries.keys(), *temporaries]:
        if name in aside:
            if folder.has(aside[name]):
                folder.replace(aside[name], name)
        elif not folder.has(temporaries[name]):
            folder.discard(name)

"""Files that appear whole or not at all.

Specification: *Saving*.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.descriptor import Held, flush, write_chunks
from pytree2safetensors._storage.folder import Folder, explaining_flush
from pytree2safetensors._storage.locations import LocalPath
from pytree2safetensors._storage.naming import naming, temporary_name
from pytree2safetensors._storage.progress import Progress
from pytree2safetensors._types import Chunk

_REMEDY: Final = " (max_shard_size= saves to a folder)"
_LINKS: Final = 40  # symbolic links to follow, as many as Linux does


def write_file(
    path: LocalPath,
    chunks: Iterable[Chunk],
    size: int,
    *,
    durable: bool,
    progress: Progress | None,
) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path, durable=durable) as descriptor:
        write_chunks(descriptor, chunks, size, progress)


@contextmanager
def replacing(path: LocalPath, *, durable: bool, name: str | None = None) -> Iterator[int]:
    """Yield a descriptor of a new file, which replaces the old file if no error occurs.

    Until then, the new file has the given name, in the folder of the old one, by which other processes
    can open it.
    """
    given = os.fsdecode(path)
    with naming(path), ExitStack() as stack:
        if is_special(given):
            held = stack.enter_context(Held())
            yield _opened(held, given)
            held.close()
            return
        parent, target = _split(given)
        folder = Folder(parent, listed=durable)
        with _explaining(parent), explaining_flush(parent):
            stack.enter_context(folder)
        old = folder.status(target)
        temporary = name or temporary_name(target)
        with ExitStack() as undo:
            undo.callback(folder.discard, temporary)
            held = undo.enter_context(Held())
            descriptor = folder.create(held, temporary, target, old, shared=name is not None)
            yield descriptor
            if durable:
                flush(descriptor)
            held.close()
            folder.replace(temporary, target)
            undo.pop_all()
        if durable:
            folder.flush()
        folder.remove_abandoned(target)
        folder.close()


@contextmanager
def joining(path: LocalPath, name: str) -> Iterator[int]:
    """Yield a descriptor of the unfinished file of another process's `replacing`."""
    with naming(path), Held() as held:
        parent, _ = _split(os.fsdecode(path))
        with Folder(parent, listed=False) as folder:
            descriptor = folder.join(held, name)
        yield descriptor
        held.close()


def _split(path: str) -> tuple[str, str]:
    """Return the folder and the name of the file that a path leads to."""
    parent, target = os.path.split(followed(path))
    if not target:
        remedy = _REMEDY if path else ""
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT) + remedy, path)
    return parent, target


def _opened(held: Held, path: str) -> int:
    """Open something that cannot be replaced."""
    try:
        return held.open(path, os.O_WRONLY | os.O_TRUNC)
    except (IsADirectoryError, PermissionError):
        if not os.path.isdir(path):  # for which Windows gives no permission
            raise  # pragma: no cover - the superuser has all permissions
        text = os.strerror(errno.EISDIR) + _REMEDY
        raise IsADirectoryError(errno.EISDIR, text, path) from None


@contextmanager
def _explaining(parent: str) -> Iterator[None]:
    """Add to an error what to do if a folder is missing."""
    try:
        yield
    except FileNotFoundError as error:
        text = f"{error.strerror} (the folder {shorten(parent)} is missing; make it first)"
        raise FileNotFoundError(error.errno, text, parent) from None


def is_special(path: LocalPath) -> bool:
    """Return whether a path leads to something that cannot be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):  # a device, a pipe, a folder
        return True
    target = followed(os.fsdecode(path))
    # Linux shows a file without a name like this, for links such as /dev/fd/3. macOS has no such links.
    is_unnamed = target.endswith(" (deleted)") and not os.path.lexists(target)
    return is_unnamed or os.path.dirname(target) == "/dev/fd"


def followed(path: str) -> str:
    """Follow symbolic links, even to a file that does not exist: links stay, their target is replaced."""
    for _ in range(_LINKS):
        try:
            link = os.readlink(path)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOENT}:  # not a link, or nothing
                return path
            raise
        except ValueError:  # on Windows: another kind of reparse point
            return path  # pragma: no cover - Windows
        path = os.path.join(os.path.dirname(path), link)
    # Before, `os.stat` raises the same, unless the links change.
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)  # pragma: no cover - as above

"""An open folder: its names, its lock, and the files that killed processes left there.

Specification: *Saving*.
"""

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.descriptor import Held, flush
from pytree2safetensors._storage.naming import temporary_prefix
from pytree2safetensors._storage.permissions import keep_permissions

if sys.platform != "win32":
    import fcntl

_PATIENCE: Final = 30.0  # seconds to wait for a lock, which a save holds during a few renames
# How file systems say that they cannot flush folders.
_CANNOT_FLUSH: Final = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS})
_DAY: Final = 86_400.0  # seconds that an unfinished file is kept
_LOCKS: Final[dict[str, threading.Lock]] = {}  # of folders that the system cannot lock
# How file systems say that they have no locks.
_HAS_NO_LOCKS: Final = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
)


class Folder:
    """An open folder, which stays the same if the process changes its working directory.

    Where the system can, names are looked up in the folder itself: a path may be as long, and lead
    through such folders, as `open` allows.
    """

    def __init__(self, path: str, *, listed: bool) -> None:
        """Remember the path; a folder that is not `listed` or flushed need not be readable."""
        self.path, self._listed = path or os.curdir, listed
        self._held = Held()
        self._descriptor: int | None = None

    def __enter__(self) -> "Folder":
        if not hasattr(os, "O_DIRECTORY"):  # Windows
            self.path = absolute(self.path)
            os.stat(self.path)  # which says that it is missing
            return self
        try:
            self._descriptor = self._held.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:
            if self._listed:
                raise
            looked_up = getattr(os, "O_PATH", None)  # on Linux: only to look up names
            if looked_up is not None:
                self._descriptor = self._held.open(self.path, looked_up | os.O_DIRECTORY)
            else:
                self.path = absolute(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.__exit__()

    def close(self) -> None:
        """Close the folder, and raise the error if that fails."""
        self._held.close()

    def _at(self, name: str) -> str:
        return name if self._descriptor is not None else os.path.join(self.path, name)

    def _from_root(self, name: str) -> str:
        """Return a path for the calls that cannot look up a name in an open folder."""
        folder = self.path if self._descriptor is None else f"/proc/self/fd/{self._descriptor}"
        return os.path.join(folder, name)

    def open(self, held: Held, name: str, flags: int, mode: int = 0o777) -> int:
        """Open a file."""
        return held.open(self._at(name), flags, mode, self._descriptor)

    def create(
        self,
        held: Held,
        name: str,
        model: str,
        old: os.stat_result | None,
        *,
        shared: bool = False,
    ) -> int:
        """Create a file with the permissions that `open` gives, or those of an old file.

        A file is `shared` if others open it to write parts of it, before this descriptor is closed.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        # Nobody else may open it before it has its permissions.
        descriptor = self.open(held, name, flags, 0o666 if old is None else 0o600)
        _mark(descriptor, shared)
        if old is not None:
            keep_permissions(descriptor, old, self._from_root(model))
        return descriptor

    def join(self, held: Held, name: str) -> int:
        """Open a file that another process has created, to read and write parts of it."""
        descriptor = self.open(held, name, os.O_RDWR)
        _mark(descriptor, shared=True)
        return descriptor

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of the file with a name, or None if it does not exist."""
        try:
            return os.stat(self._at(name), dir_fd=self._descriptor)
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Return whether a name exists. Unlike `os.path`, raise an error if that is unknown."""
        try:
            os.lstat(self._at(name), dir_fd=self._descriptor)
        except FileNotFoundError:
            return False
        return True

    def replace(self, name: str, target: str) -> None:
        """Rename a file, and replace the one that has the new name."""
        os.replace(
            self._at(name),
            self._at(target),
            src_dir_fd=self._descriptor,
            dst_dir_fd=self._descriptor,
        )

    def unlink(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._at(name), dir_fd=self._descriptor)

    def discard(self, name: str) -> None:
        """Remove a file if possible."""
        with suppress(OSError):
            self.unlink(name)

    def names(self) -> list[str]:
        """Return all names in the folder."""
        return os.listdir(self.path if self._descriptor is None else self._descriptor)

    def flush(self) -> None:
        """Flush renames to the disk if the system can."""
        if self._descriptor is not None:
            try:
                flush(self._descriptor)
            except OSError as error:
                if error.errno not in _CANNOT_FLUSH:
                    raise

    @contextmanager
    def locked(self, *, for_load: bool = False) -> Iterator[None]:
        """Lock out saves if the system has locks; loads do not lock out each other.

        Raises:
            TimeoutError: Another program keeps the lock.
        """
        if self._descriptor is None:  # Windows
            with _locked_here(self.path, for_load):
                yield
            return
        _lock(self._descriptor, self.path, for_load)
        try:
            yield
        finally:  # closing is not enough: a process forked in between has it open, too
            _unlock(self._descriptor)

    def remove_abandoned(self, target: str) -> None:
        """Remove unfinished files of a target if they are a day old and their save has ended."""
        names: list[str] = []
        with suppress(OSError):  # files that stay do no harm
            names += self.names()
        unfinished = temporary_prefix(target)
        for name in names:
            if name.startswith(unfinished):
                with suppress(OSError):
                    self._remove_if_abandoned(name)

    def _remove_if_abandoned(self, name: str) -> None:
        status = self.status(name)
        if status is None or time.time() - max(status.st_mtime, status.st_ctime) < _DAY:
            return
        with Held() as held:
            no_wait = getattr(os, "O_NONBLOCK", 0)
            try:
                descriptor = self.open(held, name, os.O_RDWR | no_wait)
            except PermissionError:  # it is to replace a file that is only read
                descriptor = self.open(held, name, os.O_RDONLY | no_wait)
            if sys.platform != "win32":
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):  # a save has it
                    return
                except OSError as error:
                    if error.errno not in _HAS_NO_LOCKS:
                        return
        self.unlink(name)


@contextmanager
def explaining_flush(path: str) -> Iterator[None]:
    """Add to an error what to do if a folder can be changed, but not opened to flush it."""
    try:
        yield
    except PermissionError as error:
        folder = path or os.curdir
        if not os.access(folder, os.W_OK | os.X_OK):
            raise
        text = (
            f"the folder {shorten(folder)} cannot be read, which is needed to flush it; "
            "durable=False saves without"
        )
        raise PermissionError(error.errno, f"{error.strerror} ({text})", path) from None


@contextmanager
def without_saves(path: str) -> Iterator[None]:
    """Wait until no save renames files in a folder, and lock out others. Go on if that fails."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder = stack.enter_context(Folder(path, listed=True))
            stack.enter_context(folder.locked(for_load=True))
        yield


@contextmanager
def _locked_here(path: str, for_load: bool) -> Iterator[None]:
    """Lock out other threads of this process. A load only waits for them."""
    lock = _LOCKS.setdefault(os.path.normcase(path), threading.Lock())
    if not lock.acquire(timeout=_PATIENCE):
        raise _locked_by(path)
    if for_load:
        lock.release()
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _lock(descriptor: int, path: str, shared: bool) -> None:
    if sys.platform != "win32":
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        end, pause = time.monotonic() + _PATIENCE, 0.001
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise _locked_by(path) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            except OSError:  # the file system has no locks
                return
            else:
                return


def _locked_by(path: str) -> TimeoutError:
    text = (
        f"another program has locked the folder {shorten(path)} for more than {_PATIENCE:.0f} s (a save "
        "that hangs, or one that runs under flock); save again when it has ended"
    )
    return TimeoutError(errno.ETIMEDOUT, text, path)


def _mark(descriptor: int, shared: bool) -> None:
    """Show that the save of an unfinished file has not ended.

    A file that has a shared lock is also safe to write in parts: NFS then sends no whole pages, which
    could replace what other hosts wrote beside this part. But SMB lets nobody write to it.
    """
    if sys.platform != "win32":
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)


def _unlock(descriptor: int) -> None:
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def absolute(path: str) -> str:
    """Return the path from the root, unless only the relative one leads there.

    A path that ends in "/" still ends in "/". An empty path stays empty, because no file has it.
    """
    if not path or os.path.isabs(path):
        return path
    try:
        current = os.getcwd()
        found = os.path.join(current, path)
        with suppress(FileNotFoundError):  # the rest of the path may be missing
            os.lstat(found)
        leads_there = os.path.samestat(os.stat(current), os.stat(os.curdir))
    except OSError:  # a folder above is gone or not accessible, or the path is too long
        return path
    return found if leads_there else path

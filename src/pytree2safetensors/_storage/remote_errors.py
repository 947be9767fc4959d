"""Errors of stores: each with its URL, and of the class that says what is wrong."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from pytree2safetensors._errors import FileFormatError, unread
from pytree2safetensors._storage.remote_path import (
    RemotePath,
    hide_credentials,
    raise_with_url,
    shown_url,
)

_LOCK: Final = "_lock_of_pytree2safetensors"
# Errors of aiohttp, asyncio and ftplib that say nothing about a file.
_OUTAGES: Final = {
    "ClientConnectionError": errno.ECONNABORTED,
    "TimeoutError": errno.ETIMEDOUT,
    "error_temp": errno.EIO,
}
_READ_ONLY = "cannot be written to: its store is read-only"


def turn_of(fs: Any) -> AbstractContextManager[Any]:
    """Return a lock if a file system can only do one thing at a time, as with one connection."""
    if fs.async_impl or "hf" in fs.protocol:
        return nullcontext()
    # Kept in the instance, because other instances may be equal to it. A caching file system returns
    # the `__dict__` of its class.
    attributes = object.__getattribute__(fs, "__dict__")
    lock: AbstractContextManager[Any] = attributes.setdefault(_LOCK, threading.RLock())
    return lock


@contextmanager
def naming_url(path: RemotePath, missing: str = _READ_ONLY) -> Iterator[None]:
    """Put the URL into the errors of a store, without its credentials.

    `missing` is what the error says if the store lacks what is asked for.
    """
    try:
        with turn_of(path.fs):
            yield
    except FileFormatError:
        raise
    except FileNotFoundError as error:
        raise _not_given(path, error.__cause__) from None
    except IsADirectoryError:  # which may have no text
        raise IsADirectoryError(
            errno.EISDIR, os.strerror(errno.EISDIR), shown_url(path.url)
        ) from None
    except NotImplementedError:
        raise ValueError(f"{path.label} {missing}") from None
    except Exception as error:  # noqa: BLE001 - it is raised
        if _says_changed(error):
            raise changed(path) from None
        if isinstance(error, ValueError) and "range requests" in str(error):
            raise without_ranges(path) from None
        raise_with_url(error, path.url)


def _not_given(path: RemotePath, cause: BaseException | None) -> OSError:
    """Return the error for a file that a store does not give: fsspec calls all such files missing."""
    status = getattr(cause, "status", None)
    code = _code(cause, status, path.is_web)
    said = hide_credentials(str(cause), path.url) or type(cause).__name__
    if status:
        said = f"the server answers {status}"
    if code == errno.ENOENT:
        is_plain = cause is None or isinstance(cause, FileNotFoundError) or status == 404
        said = os.strerror(code) + ("" if is_plain else f" ({said})")
    return OSError(code, said, shown_url(path.url))  # of the class for the code


def _code(cause: BaseException | None, status: int | None, is_web: bool) -> int:
    """Return the code of the error: a file is missing only if the server says so."""
    if cause is None or isinstance(cause, FileNotFoundError) or status in {404, 410}:
        return errno.ENOENT
    if status in {401, 403}:
        return errno.EACCES
    for kind in type(cause).__mro__:
        if kind.__name__ in _OUTAGES:
            return _OUTAGES[kind.__name__]
    return errno.EIO if is_web or status else errno.ENOENT


def _says_changed(error: Exception) -> bool:
    """Return whether a request failed because the object was replaced."""
    return getattr(error, "status", None) == 412 or type(error).__name__ == "FileExpired"


def changed(path: RemotePath) -> FileFormatError:
    """Return the error for a file that was replaced during a load."""
    return unread(f"{path.label} was replaced while it was read; load it again")


def without_ranges(path: RemotePath) -> FileFormatError:
    """Return the error for a file whose server gives no parts of it."""
    return unread(
        f"the server of {path.label} does not support ranges; copy the file, and load the copy"
    )

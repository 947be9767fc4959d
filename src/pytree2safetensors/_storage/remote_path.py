"""Where a path leads: to a local file, or through fsspec to a store.

A store is what a URL names: an object store, a model hub, a web server.
"""

import errno
import os
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import PathLike, StorePath

T = TypeVar("T")

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:::|://)")
_COLLAPSED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)[/\\][^/\\]")
# Stores that give a file its name when it is complete; docs/guides/object-stores.md says how. Caches
# in front of them do not wait for that, and `sshfs` does not have these schemes.
_WHOLE: Final = frozenset(
    ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "sftp", "ftp", "smb", "webhdfs", "file"]
)
_USER: Final = re.compile(r"((?:https?|ftps?|sftp|ssh|webdavs?|smb|git|github)://)[^/@\s'\"]*@")
_QUERY: Final = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")


class RemotePath(NamedTuple):
    """A path in a store.

    Attributes:
        fs: The file system of fsspec.
        path: The path in it.
        url: The URL that the caller passed, which may contain credentials.
    """

    fs: Any
    path: str
    url: str

    @property
    def label(self) -> str:
        """Return the URL for messages, shortened and without credentials."""
        return shorten(hide_credentials(self.url))

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        path = self.path.partition("?")[0] if self.is_web else self.path
        return path.rpartition("/")[2]

    @property
    def is_web(self) -> bool:
        """Return whether it is on a web server, which lists no folders."""
        return "http" in self.protocols

    @property
    def protocols(self) -> frozenset[str]:
        """Return the schemes of its file system."""
        found = self.fs.protocol
        return frozenset([found] if isinstance(found, str) else found)

    @property
    def appears_whole(self) -> bool:
        """Return whether the store surely keeps an old file until the new one is complete."""
        return bool(self.protocols & _WHOLE)

    def joined(self, name: str) -> "RemotePath":
        """Return the path of a file in this folder."""
        return self._changed(lambda path: f"{path.rstrip('/')}/{name}")

    def beside(self, name: str) -> "RemotePath":
        """Return the path of another file in the folder of this one."""
        return self._changed(lambda path: f"{path.rpartition('/')[0]}/{name}")

    def parent(self) -> "RemotePath":
        """Return the folder of this file."""
        return self._changed(lambda path: path.rpartition("/")[0])

    def _changed(self, change: Callable[[str], str]) -> "RemotePath":
        """Change the path, without a query that follows it."""
        path, mark, query = self.path.partition("?") if self.is_web else (self.path, "", "")
        first, link, rest = self.url.partition("::")
        url, url_mark, url_query = first.partition("?")
        if rest:  # a chain: its last part names the file
            url, url_mark, url_query = rest, "", ""
        changed = change(url) + url_mark + url_query
        return RemotePath(
            self.fs, change(path) + mark + query, first + link + changed if rest else changed
        )


def resolve(path: PathLike | T) -> str | RemotePath | T:
    """Return the local path, or the path in a store, that a caller means. Return file objects as they are.

    Raises:
        ValueError: It is a URL that cannot be opened here, or a path that is probably a mistake.
    """
    if isinstance(path, str | os.PathLike):  # asked first, as some paths have a method `write`
        return _resolved(os.fsdecode(path))
    if isinstance(path, StorePath):
        return RemotePath(path.fs, path.path, str(path))
    return path


def _resolved(text: str) -> str | RemotePath:
    scheme = _URL.match(text)
    if scheme is None:
        return _local(text)
    if text.startswith(("file://", "local://")):
        parts = urlsplit(text)
        if parts.netloc not in {"", "localhost"}:
            raise ValueError(f"{shorten(text)} is on another machine; mount its file system")
        return unquote(parts.path)
    return _remote(text)


def _local(path: str) -> str:
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ValueError(f"{shorten(path)} has a character that no path can have; remove it")
    collapsed = _COLLAPSED.match(path)
    if collapsed is not None and not os.path.lexists(collapsed[1]):
        raise ValueError(
            f"{shorten(path)} looks like a URL whose slashes pathlib has joined; pass the URL as a "
            "str, or as a path of universal_pathlib"
        )
    return path


def check_home(path: str) -> None:
    """Raise an error for a path below a missing folder called `~`, which only a shell replaces."""
    first = _first_folder(path)
    if first != path and first.startswith("~") and not os.path.lexists(first):
        text = f"{os.strerror(errno.ENOENT)} (only a shell replaces '~'; call os.path.expanduser)"
        raise FileNotFoundError(errno.ENOENT, text, path)


def check_created(folder: str) -> None:
    """Raise an error for a new folder called `~` or like a scheme, which is probably a mistake."""
    first = _first_folder(os.path.splitdrive(folder)[1])
    if os.path.lexists(first):
        return
    if first.startswith("~"):
        raise ValueError(
            f"{shorten(folder)} begins with '~', which only a shell replaces; call "
            "os.path.expanduser, or make the folder first"
        )
    if first.endswith(":"):
        raise ValueError(
            f"{shorten(folder)} begins with {shorten(first)}, which looks like a part of a URL; correct "
            "the URL, or make the folder first"
        )


def _first_folder(path: str) -> str:
    return path.replace(os.altsep or os.sep, os.sep).partition(os.sep)[0]


def _remote(url: str) -> RemotePath:
    label = shorten(hide_credentials(url))
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f"{label} is a URL, which is opened with fsspec; install fsspec and its package for this "
            "store"
        ) from None
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError, AttributeError) as error:  # no package, or an unknown scheme
        reason = hide_credentials(str(error))
        raise ValueError(f"{label} cannot be opened with fsspec: {reason}") from None
    except Exception as error:  # noqa: BLE001 - of a server, which some connect to now; it is raised
        raise_with_url(error, url)
    return RemotePath(fs, path, url)


def raise_with_url(error: Exception, url: str) -> NoReturn:
    """Raise the error of a store with the URL in it, without credentials."""
    text, shown = str(error), hide_credentials(str(error))
    if text == shown and url in text:
        raise error
    is_os_error = isinstance(error, OSError)
    kind = type(error) if is_os_error and type(error).__module__ == "builtins" else OSError
    message = f"{shorten(hide_credentials(url))}: {type(error).__name__}: {shown}"
    safe = error if text == shown and hide_credentials(url) == url else None
    raise kind(message) from safe


def hide_credentials(text: str) -> str:
    """Remove user names, passwords and queries from the URLs in a text."""
    return _QUERY.sub(r"\1?...", _USER.sub(r"\1...@", text))

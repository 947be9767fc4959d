"""Paths in stores, which fsspec opens.

A store is what a URL names: an object store, a model hub, a web server.
"""

import os
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

from pytree2safetensors._messages import shorten

# Stores that give a file its name when it is complete; docs/guides/object-stores.md says how. Caches
# in front of them do not wait for that, and `sshfs` does not have these schemes.
_WHOLE: Final = frozenset(
    [
        "s3",
        "s3a",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "hf",
        "sftp",
        "ftp",
        "smb",
        "webhdfs",
        "file",
        "memory",
    ]
)
URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:::|://)")  # how URLs begin
_JOINED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)[/\\][^/\\]")
# In these stores, what is before an "@" names a container, a model or a file, unless it has a colon.
_NO_USERS: Final = "abfss?|adl|az|hf|memory|oci|tar|wasbs?|zip"
# A scheme may have one slash only, as pathlib joins them. These patterns read a text once, however often
# it has the beginning of what they look for.
_USER: Final = re.compile(
    rf"((?<![A-Za-z0-9+.-])[0-9+.-]*(?!(?:{_NO_USERS}):/[^:@]*@)[A-Za-z][A-Za-z0-9+.-]+://?)[^/]*@"
)
_QUERY_IN_TEXT: Final = re.compile(r"(:/[^?]*)(\?\S+)?")
_ENDS: Final = "'\")]>,:;"  # may follow a URL in a text


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
        return shorten(shown_url(self.url))

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


def path_of_url(url: str) -> RemotePath:
    """Return the path in a store that a URL names.

    Raises:
        ValueError: fsspec cannot open it here.
        OSError: Some stores are connected to now, and this one cannot be.
    """
    label = shorten(shown_url(url))
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f"{label} is a URL, which is opened with fsspec; install fsspec (the extra "
            "pytree2safetensors[remote]) and its package for this store"
        ) from None
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError, AttributeError) as error:  # no package, or an unknown scheme
        reason = hide_credentials(str(error), url)
        raise ValueError(f"{label} cannot be opened with fsspec: {reason}") from None
    except Exception as error:  # noqa: BLE001 - of a server, which some connect to now; it is raised
        raise_with_url(error, url)
    return RemotePath(fs, path, url)


def raise_with_url(error: Exception, url: str) -> NoReturn:
    """Raise the error of a store with the URL in it, without credentials."""
    text, shown = str(error), hide_credentials(str(error), url)
    if text == shown and url in text:
        raise error
    is_os_error = isinstance(error, OSError)
    kind = type(error) if is_os_error and type(error).__module__ == "builtins" else OSError
    parts = [shorten(shown_url(url)), type(error).__name__, shown]
    message = ": ".join(filter(None, parts))
    safe = error if text == shown and shown_url(url) == url else None
    raise kind(message) from safe


def is_joined_url(path: str) -> bool:
    """Return whether a path looks like a URL whose slashes pathlib has joined."""
    found = _JOINED.match(path)
    return found is not None and not os.path.lexists(found[1])


def shown_url(url: str) -> str:
    """Return a URL without user names, passwords and queries. Return a local path as it is."""
    if not URL.match(url) and not is_joined_url(url):
        return url
    shown = _USER.sub(r"\1...@", url)
    scheme, colon, rest = shown.partition(":/")
    path, _, query = rest.partition("?")
    return f"{scheme}{colon}{path}?..." if query else shown


def hide_credentials(text: str, url: str) -> str:
    """Remove user names, passwords and queries from a URL in a text, and from others that it may have."""
    text = text.replace(url, shown_url(url))
    return _QUERY_IN_TEXT.sub(_without_query, _USER.sub(r"\1...@", text))


def _without_query(found: re.Match[str]) -> str:
    address, query = found.groups("")
    end = max(2, len(query.rstrip(_ENDS)))  # a query has a character at least
    return f"{address}?...{query[end:]}" if query else address

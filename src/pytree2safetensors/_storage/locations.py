"""What a caller may pass: a path, which leads to a local file or through fsspec to a store, or a file object."""

import errno
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable
from urllib.parse import unquote, unquote_to_bytes

from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.remote_path import (
    URL,
    RemotePath,
    is_joined_url,
    path_of_url,
    shown_url,
)

T = TypeVar("T")

_BYTES: Final = re.compile(r"(?:%[89A-Fa-f][0-9A-Fa-f])+")  # in a URL, those that are not ASCII


class HasMethod(type):
    """The type of a class whose instances are all objects with a method, even a delegated one.

    A protocol only looks at classes since Python 3.12, but the files of `tempfile` delegate.
    """

    method: str

    def __instancecheck__(cls, instance: object) -> bool:
        return callable(getattr(instance, cls.method, None))


if TYPE_CHECKING:

    class Readable(Protocol):
        """A binary file object, open for reading."""

        def read(self, size: int = -1, /) -> bytes:
            """Read bytes."""
            ...

    class Writable(Protocol):
        """A binary file object, open for writing."""

        def write(self, data: bytes, /) -> Any:
            """Write bytes."""
            ...

    @runtime_checkable
    class StorePath(Protocol):
        """A path of universal_pathlib."""

        @property
        def fs(self) -> Any:
            """Return the file system of fsspec."""
            ...

        @property
        def path(self) -> str:
            """Return the path in the file system."""
            ...
else:
    Readable = HasMethod("Readable", (), {"method": "read"})
    Writable = HasMethod("Writable", (), {"method": "write"})
    StorePath = HasMethod("StorePath", (), {"method": "joinuri"})


LocalPath: TypeAlias = str | os.PathLike[str]
PathLike: TypeAlias = LocalPath | StorePath


def resolve(path: PathLike | T) -> str | RemotePath | T:
    """Return the local path, or the path in a store, that a caller means. Return file objects as they are.

    Raises:
        ValueError: It is a URL that cannot be opened here, or a path that is probably a mistake.
    """
    if isinstance(path, str | os.PathLike):  # asked first, as some paths have a method `write`
        return _older_path(path) or _resolved(os.fsdecode(path))
    if isinstance(path, StorePath):
        return RemotePath(path.fs, path.path, str(path))
    return path


def _older_path(path: Any) -> RemotePath | None:
    """Return the path of a `UPath`. Before universal_pathlib 0.3, it also looks like a local path."""
    if getattr(path, "protocol", "") in ("", "file", "local") or not hasattr(path, "fs"):
        return None
    return RemotePath(path.fs, path.path, str(path))


def _resolved(text: str) -> str | RemotePath:
    scheme = URL.match(text)
    if scheme is None:
        return _local(text)
    text = scheme[0].lower() + text[scheme.end() :]
    if text.startswith(("file://", "local://")):
        host, slash, path = text.partition("://")[2].partition("/")
        if host not in {"", "localhost"}:
            raise ValueError(
                f"{shorten(shown_url(text))} is on another machine; mount its file system"
            )
        if not {"?", "#"}.isdisjoint(path):
            raise ValueError(
                f"{shorten(shown_url(text))} has '?' or '#', after which the path of a URL has ended; pass "
                "the path itself, or the URL that pathlib.Path.as_uri returns"
            )
        try:
            path = _BYTES.sub(lambda found: os.fsdecode(unquote_to_bytes(found[0])), path)
        except UnicodeDecodeError:  # on Windows
            raise _not_a_name(text) from None
        if sys.platform == "win32":
            from urllib.request import url2pathname  # a drive is after the first "/"

            return _local(url2pathname(slash + path))
        return _local(unquote(slash + path))
    return path_of_url(text)


def _local(path: str) -> str:
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise _not_a_name(path)
    if is_joined_url(path):
        raise ValueError(
            f"{shorten(shown_url(path))} looks like a URL whose slashes pathlib has joined; pass the URL as a "
            "str, or as a path of universal_pathlib"
        )
    return path


def _not_a_name(path: str) -> ValueError:
    return ValueError(f"{shorten(path)} has a character that no path can have; remove it")


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
    scheme, colon, _ = first.partition(":")
    if first.endswith(":") or (colon and _is_scheme(scheme)):
        raise ValueError(
            f"{shorten(folder)} begins with {shorten(first)}, which looks like a part of a URL; correct "
            "the URL, or make the folder first"
        )


def _is_scheme(text: str) -> bool:
    """Return whether fsspec, if it is installed, knows a scheme."""
    try:
        from fsspec import available_protocols
    except ImportError:
        return False
    return text.lower() in available_protocols()


def _first_folder(path: str) -> str:
    return path.replace(os.altsep or os.sep, os.sep).partition(os.sep)[0]

"""The permissions of a file that replaces another one.

Specification: *Saving*.
"""

import errno
import os
import stat
import sys
from contextlib import suppress
from typing import Final

_ACCESS_LIST: Final = "system.posix_acl_access"  # of Linux: permissions of further users and groups


def keep_permissions(descriptor: int, old: os.stat_result, path: str) -> None:
    """Give a new file the group, permissions and owner of the old one, as far as the system allows.

    If its group or its access list would differ, the group may do only what everybody may.

    Args:
        descriptor: The new file.
        old: The status of the old file.
        path: The old file.
    """
    if sys.platform == "win32":
        return
    new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode)
    try:
        if new.st_gid != old.st_gid:
            os.fchown(descriptor, -1, old.st_gid)
        _copy_access_list(descriptor, path)
    except OSError:  # this user is not in the group, or the file system knows no such thing
        mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    with suppress(OSError):  # some mounts refuse it; only its owner can open the new file then
        os.fchmod(descriptor, mode)
    if new.st_uid != old.st_uid:  # last, because only the owner can change the rest
        with suppress(OSError):  # only the superuser can, and not in every container
            os.fchown(descriptor, old.st_uid, -1)


def _copy_access_list(descriptor: int, path: str) -> None:
    if sys.platform == "linux":  # pragma: no branch - coverage is measured on Linux
        found = _access_list(path)
        if found is not None:
            os.setxattr(descriptor, _ACCESS_LIST, found)
        elif _access_list(descriptor) is not None:  # new files in this folder get one
            os.removexattr(descriptor, _ACCESS_LIST)


def _access_list(file: int | str) -> bytes | None:
    if sys.platform == "linux":  # pragma: no branch - as above
        try:
            return os.getxattr(file, _ACCESS_LIST)
        except OSError as error:
            # No list, a file system without lists, or no file or /proc to ask.
            if error.errno not in {errno.ENODATA, errno.ENOTSUP, errno.ENOENT}:
                raise
    return None

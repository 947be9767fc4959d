"""Links, permissions, devices, and what belongs to the caller."""

import errno
import io
import os
import stat
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pytree2safetensors._storage.descriptor
import pytree2safetensors._storage.progress
from oracle import assert_loaded
from pytree2safetensors import FileFormatError, load_metadata, load_pytree, save_pytree
from versions import assert_holds, litter, posix, version

# --- links, permissions, and what is no file --------------------------------------------------


@posix
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    target = tmp_path / "far" / "away" / "model"
    save_pytree(version(1), target)
    (tmp_path / "far" / "link").symlink_to("away/model")
    (tmp_path / "near").symlink_to("far")
    link = tmp_path / "link"
    link.symlink_to("near/link")
    save_pytree(version(2), link)
    assert link.is_symlink()
    assert (tmp_path / "far" / "link").is_symlink()
    assert not target.is_symlink()
    assert_holds(target, 2)
    assert list(target.parent.iterdir()) == [target]


@posix
def test_a_link_that_leads_to_nothing_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "model")
    save_pytree(version(1), tmp_path / "first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert not (tmp_path / "model").is_symlink()
    assert_holds(tmp_path / "model", 1)


@posix
def test_a_link_into_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere/model")
    with pytest.raises(FileNotFoundError) as caught:
        save_pytree(version(1), link)
    assert caught.value.filename == str(link)
    assert link.is_symlink()


@posix
def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    with pytest.raises(OSError, match="symbolic links") as caught:
        save_pytree(version(1), tmp_path / "first")
    assert caught.value.errno == errno.ELOOP
    assert caught.value.filename == str(tmp_path / "first")
    assert (tmp_path / "first").is_symlink()


@posix
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000], ids=oct)
def test_a_new_file_has_the_permissions_that_open_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_pytree(version(1), tmp_path / "model")
        (tmp_path / "other").open("wb").close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "other")]
    assert modes == [0o666 & ~umask] * 2


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o444, 0o755, 0o640], ids=oct)
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(mode)
    others: list[int] = []

    def look(*_: int) -> None:
        others.extend(stat.S_IMODE(found.stat().st_mode) for found in litter(tmp_path))

    save_pytree(version(2), path, progress=look)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert others == [mode]
    assert_holds(path, 2)


FILE, NAMED, INDEX = "model.safetensors", "n.safetensors", "model.safetensors.index.json"


@posix
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("", 100), ("", 300)),
        (("", 100), (FILE, None)),
        (("", 100), ("", "1GB")),
        ((NAMED, 100), (NAMED, None)),
        ((NAMED, None), (NAMED, 100)),
        (("", "1GB"), ("", 100)),
    ],
)
@pytest.mark.parametrize("mode", [0o600, 0o664], ids=oct)
def test_a_replaced_checkpoint_keeps_its_permissions(
    tmp_path: Path, before: tuple[str, Any], after: tuple[str, Any], mode: int
) -> None:
    tree = {name: np.zeros(20, np.float32) for name in "abcdef"}
    umask = os.umask(0o022)
    try:
        name, limit = before
        save_pytree(tree, tmp_path / name, max_shard_size=limit)
        files = set(tmp_path.iterdir())
        for path in files:
            path.chmod(mode)
        name, limit = after
        save_pytree(tree, tmp_path / name, max_shard_size=limit)
    finally:
        os.umask(umask)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found.keys() - files
    assert set(found.values()) == {mode}


@posix
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_new_shards_get_the_permissions_of_the_file_or_a_shard_or_the_index(
    tmp_path: Path, gone: int
) -> None:
    tree = {name: np.zeros(20, np.float32) for name in "abcd"}
    save_pytree(tree, tmp_path / FILE)
    (tmp_path / FILE).rename(tmp_path / "moved")
    save_pytree(tree, tmp_path, max_shard_size=100)
    (tmp_path / "moved").rename(tmp_path / FILE)
    for pattern, mode in ((INDEX, 0o640), (FILE, 0o604), ("*-of-*", 0o600)):
        for path in tmp_path.glob(pattern):
            path.chmod(mode)
    for pattern in (FILE, "*-of-*")[:gone]:
        for path in tmp_path.glob(pattern):
            path.unlink()
    save_pytree(tree, tmp_path, max_shard_size=200)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*-of-00002.*")}
    assert modes == {(0o604, 0o600, 0o640)[gone]}
    assert stat.S_IMODE((tmp_path / INDEX).stat().st_mode) == 0o640
    # A new index gets those of the shards, which keep their names.
    (tmp_path / INDEX).unlink()
    save_pytree(tree, tmp_path, max_shard_size=200)
    modes |= {stat.S_IMODE((tmp_path / INDEX).stat().st_mode)}
    assert len(modes) == 1


@posix
def test_private_shards_with_a_public_index_stay_private(tmp_path: Path) -> None:
    tree = {name: np.zeros(20, np.float32) for name in "abcd"}
    save_pytree(tree, tmp_path, max_shard_size=100)
    for path in tmp_path.glob("*.safetensors"):
        path.chmod(0o600)
    save_pytree(tree, tmp_path, max_shard_size=200)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*-of-*")} == {0o600}
    save_pytree(tree, tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@posix
def test_what_replaces_a_private_file_is_private_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(0o600)
    modes: list[int] = []
    create = os.open

    def opened(name: str, flags: int, **options: Any) -> int:
        descriptor = create(name, flags, **options)
        if flags & os.O_CREAT:
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    save_pytree(version(2), path)
    assert modes == [0o600]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="giving files away is for the superuser"
)
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    save_pytree(version(2), path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o640)


@posix
@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL], ids=["not allowed", "in a container"])
@pytest.mark.parametrize("in_group", [True, False])
def test_a_file_whose_owner_cannot_be_kept_keeps_its_group_or_is_closed_to_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, in_group: bool
) -> None:
    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(0o664)
    status, changed = os.stat, list[tuple[int, int]]()

    def of_another(*args: Any, **options: Any) -> os.stat_result:
        found = list(status(*args, **options))
        found[4:6] = 12345, 54321  # the owner and the group
        return os.stat_result(found)

    def change(_: int, owner: int, group: int) -> None:
        if owner != -1 or not in_group:
            raise OSError(code, os.strerror(code))
        changed.append((owner, group))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", of_another)
        patch.setattr(os, "fchown", change)
        save_pytree(version(2), path)
    assert_holds(path, 2)
    assert changed == [(-1, 54321)] * in_group
    assert stat.S_IMODE(path.stat().st_mode) == (0o664 if in_group else 0o644)


# For the owner and a further user, but not for the group.
_ENTRIES = [(1, 6, -1), (2, 6, 12345), (4, 0, -1), (16, 6, -1), (32, 0, -1)]
FOR_ANOTHER = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in _ENTRIES)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep access lists elsewhere")
def test_a_replaced_file_keeps_its_access_list(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for limit in (None, "1GB"):
        save_pytree(version(1), path)
        try:
            os.setxattr(path, "system.posix_acl_access", FOR_ANOTHER)
        except OSError:
            pytest.skip("the file system has no access lists")
        save_pytree(version(2), path, max_shard_size=limit)
        assert os.getxattr(path, "system.posix_acl_access") == FOR_ANOTHER
        assert_holds(path, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep access lists elsewhere")
@pytest.mark.parametrize("limit", [None, "1GB"])
def test_a_replaced_file_does_not_get_the_access_list_of_new_files(
    tmp_path: Path, limit: str | None
) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    save_pytree(version(1), path)
    path.chmod(0o640)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", FOR_ANOTHER)
    except OSError:
        pytest.skip("the file system has no access lists")
    save_pytree(version(2), path, max_shard_size=limit)
    save_pytree(version(2), other)
    assert "system.posix_acl_access" not in os.listxattr(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert "system.posix_acl_access" in os.listxattr(other)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep access lists elsewhere")
def test_a_file_whose_access_list_cannot_be_kept_is_closed_to_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "model"
    save_pytree(version(1), path)
    path.chmod(0o664)
    monkeypatch.setattr(os, "getxattr", fail)
    save_pytree(version(2), path)
    assert_holds(path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@posix
@pytest.mark.parametrize("limit", [None, 100])
def test_a_system_may_refuse_to_change_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Nobody else may open the new file then."""

    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    path = tmp_path / "model.safetensors"
    save_pytree(version(1), path, max_shard_size=limit)
    monkeypatch.setattr(os, "fchmod", refuse)
    save_pytree(version(2), path, max_shard_size=limit)
    assert_holds(path if limit is None else tmp_path, 2)
    assert {stat.S_IMODE(found.stat().st_mode) for found in tmp_path.iterdir()} == {0o600}


@posix
def test_hard_links_part_ways(tmp_path: Path) -> None:
    path, other = tmp_path / "model", tmp_path / "other"
    save_pytree(version(1), path)
    os.link(path, other)
    with suppress(AttributeError, OSError):  # other systems have no extended attributes
        os.setxattr(path, "user.note", b"old")
    before = attributes_of(path)
    save_pytree(version(2), path)
    assert_holds(path, 2)
    assert_holds(other, 1)
    assert (attributes_of(path), attributes_of(other)) == ([], before)


def attributes_of(path: Path) -> list[str]:
    found = os.listxattr(path) if hasattr(os, "listxattr") else []
    return [name for name in found if name.startswith("user.")]


@posix
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append(path.read_bytes()))
    reader.start()
    save_pytree(version(1, 100_000), path)
    reader.join()
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert_loaded(load_pytree(io.BytesIO(content[0])), version(1, 100_000))
    assert not litter(tmp_path)


@posix
@pytest.mark.parametrize("checksum", [False, True])
def test_a_pipe_without_a_name_is_written_to(checksum: bool) -> None:
    reader, writer = os.pipe()
    path = f"/dev/fd/{writer}"
    save_pytree(
        version(1), path, checksum=checksum
    )  # as /dev/stdout is, or >(a command) of a shell
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert_loaded(load_pytree(file), version(1))


@posix
@pytest.mark.parametrize("is_link", [True, False], ids=["linux", "macos"])
def test_a_file_without_a_name_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    if not is_link:

        def readlink(path: str) -> str:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)

        monkeypatch.setattr(os, "readlink", readlink)
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"longer than what takes its place" * 1000)
        file.flush()
        (tmp_path / "file").unlink()
        if sys.platform == "darwin":  # which opens it at its position, and never cuts it
            file.seek(0)
            file.truncate()
        save_pytree(version(1), f"/dev/fd/{file.fileno()}")
        file.seek(0)
        assert_loaded(load_pytree(file), version(1))
    assert not [*tmp_path.iterdir()]


@posix
def test_a_pipe_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    save_pytree(version(1, 100_000), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    assert_holds(path, 1)
    writer.join()


@posix
def test_a_device_is_written_to() -> None:
    save_pytree(version(1), os.devnull)
    save_pytree(version(1, 3 << 20), os.devnull)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_that_is_full_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        save_pytree(version(1), "/dev/full")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


# --- what belongs to the caller ---------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
def test_the_tree_of_the_caller_is_untouched(tmp_path: Path, checksum: bool) -> None:
    inner = {"z": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "a": [jnp.ones(3), 1.5]}
    tree = {"second": inner, "first": (inner, None), "empty": {}}
    metadata = {"z": "1", "a": "2"}
    before = jax.tree_util.tree_map(lambda leaf: (id(leaf), np.array(leaf).tobytes()), tree)
    save_pytree(tree, tmp_path / "model", metadata=metadata, checksum=checksum)
    after = jax.tree_util.tree_map(lambda leaf: (id(leaf), np.array(leaf).tobytes()), tree)
    assert before == after
    assert list(tree) == ["second", "first", "empty"]
    assert list(inner) == ["z", "a"]
    assert list(metadata.items()) == [("z", "1"), ("a", "2")]
    assert load_metadata(tmp_path / "model") == metadata


@pytest.mark.parametrize("checksum", [False, True])
def test_an_array_that_changes_its_size_during_the_save_is_an_error(
    tmp_path: Path, checksum: bool
) -> None:
    save_pytree(version(1), tmp_path / "model")
    shrunk = np.ones(1 << 20, np.uint16)
    tree = {"a": np.zeros(40 << 20, np.uint8), "b": shrunk}

    def shrink(*_: int) -> None:
        shrunk.resize(1000, refcheck=False)

    with pytest.raises(FileFormatError) as caught:
        save_pytree(tree, tmp_path / "model", progress=shrink, checksum=checksum)
    assert str(caught.value) == (
        "an array changed its size while it was saved; save a copy of it, or use "
        "save_pytree_async, which copies the tree"
    )
    assert_holds(tmp_path / "model", 1)
    assert not litter(tmp_path)


def test_skipping_leaves_changes_nothing_of_the_callers(tmp_path: Path) -> None:
    tree = {"b": [print, 1], "a": print}
    save_pytree(tree, tmp_path / "model", unsupported="skip")
    assert tree == {"b": [print, 1], "a": print}
    assert load_pytree(tmp_path / "model") == {"b": [None, 1]}


def test_saving_and_loading_need_no_means_that_windows_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytree2safetensors._storage.descriptor, "_PREALLOCATED", 0)
    monkeypatch.setattr(sys, "platform", "win32")
    for name in (
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "fchmod", "fchown", "getegid", "geteuid",
        "posix_fallocate", "pread", "preadv", "pwrite", "readv", "writev",
    ):  # fmt: skip
        monkeypatch.delattr(os, name, raising=False)
    for checksum in (False, True):
        for number in (1, 2):
            save_pytree(version(number), tmp_path / "file", checksum=checksum)
            save_pytree(version(number), tmp_path / "folder", max_shard_size=700)
            assert_holds(tmp_path / "file", number)
            assert_holds(tmp_path / "folder", number)


@posix
@pytest.mark.parametrize("limit", [None, "1GB"])
def test_only_a_save_to_a_folder_replaces_a_symbolic_link(
    tmp_path: Path, limit: str | None
) -> None:
    target, link = tmp_path / "target", tmp_path / "folder" / "model.safetensors"
    save_pytree({"a": 1}, target)
    link.parent.mkdir()
    link.symlink_to(target)
    save_pytree({"a": 2}, link, max_shard_size=limit)
    assert load_pytree(link) == {"a": 2}
    assert link.is_symlink() == (limit is None)
    assert load_pytree(target) == {"a": 2 if limit is None else 1}

"""Several processes that fail, end, or do not save the same."""

import errno
import io
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pytree2safetensors as p2s
from pytree2safetensors._leaves.jax_versions import has_empty_arrays
from pytree2safetensors._save import calls, coordination, share, work
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.plan import SavePlan
from pytree2safetensors._storage import descriptor as _file
from together import (
    Group,
    arrays_of,
    checkpoint,
    contents_of,
    devices_of,
    first,
    group_of,
    large,
    mesh_in_order_of,
    number_in,
    raw,
    save_large,
    spread,
    values_of,
)

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # JAX gives its constructor no types
THOROUGH = (settings.default or settings()).max_examples >= 10_000

OLD = {"old": np.arange(3, dtype=np.float32)}


@pytest.fixture
def pair() -> Group:
    """Two processes of two devices each."""
    return group_of(2, 2)


# --- failures ---------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file alone in its folder, which a failed save must not change."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    p2s.save_pytree(OLD, folder / "file")
    before = (folder / "file").read_bytes()
    yield folder
    assert (folder / "file").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["file"]


def save_with(folder: str, what: str, where: int) -> None:
    """Save, and let one process fail in some way."""
    here = jax.process_index() == where
    tree: dict[str, Any] = large()
    options: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if what == "unsupported" and here:
            tree["function"] = print
        elif what == "key path" and here:
            tree["bad"] = {float("nan"): 1}  # this key has no spelling
        elif what == "unsortable" and here:
            tree = {"tree": [tree], "keys": {1: 1, "one": 1}}  # JAX cannot flatten this
        elif what == "metadata" and here:
            options["metadata"] = {"pytree2safetensors": "mine"}
        elif what == "disk full" and here:

            def write_at(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(work, "write_at", write_at)
        elif what == "hash" and here:
            patch.setattr(work, "read_at", lambda *_: 1 / 0)
        elif what == "bug" and here:
            patch.setattr(share, "chunks_of", lambda *_: 1 / 0)
        elif what == "interrupt" and here:

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(work, "write_at", interrupt)
        elif what == "rules":
            options["rename"] = [p2s.Rule("a", "b") if here else p2s.Rule("{=}", "{=}")]
        elif what == "deleted" and here:
            tree["rows"].delete()
        elif what == "commit" and here:

            def replace(*_: Any, **__: Any) -> None:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

            patch.setattr(os, "replace", replace)
        elif what == "progress" and here:
            options["progress"] = lambda *_: 1 / 0
        try:
            p2s.save_pytree(tree, f"{folder}/file", checksum=what == "hash", **options)
        except KeyboardInterrupt:
            raise RuntimeError("interrupted") from None


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("unsupported", "pytree2safetensors.UnsupportedLeafError", "'@function'"),
        ("key path", "pytree2safetensors.KeyPathError", "nan"),
        ("rules", "pytree2safetensors.WeightsMismatchError", "no rule has this path"),
        ("unsortable", "pytree2safetensors.TreeStructureError", "sort"),
        ("metadata", "pytree2safetensors.FileFormatError", "'pytree2safetensors'"),
        ("disk full", "builtins.OSError", os.strerror(errno.ENOSPC)),
        ("deleted", None, "deleted"),
        ("bug", None, "division by zero"),
        ("hash", None, "division by zero"),
        ("progress", None, "division by zero"),
        ("interrupt", None, "nterrupt"),
    ],
)
def test_an_error_on_one_is_raised_on_all(
    pair: Group, old: Path, what: str, where: int, kind: str | None, message: str
) -> None:
    found = pair.fail(save_with, old, what, where)
    for error, text in found:
        assert message in text
        assert kind is None or error == kind
    assert f"process {where} could not save: " in found[1 - where][1]
    assert f"process {where} could not save: " not in found[where][1]


def test_a_commit_that_fails_is_an_error_on_all(pair: Group, old: Path) -> None:
    for error, text in pair.fail(save_with, old, "commit", 0):
        assert error == "builtins.PermissionError"
        assert os.strerror(errno.EPERM) in text


def fail_in_the_end(path: str, what: str, number: int, options: dict[str, Any]) -> None:
    """Save, and let process 0 fail after all have written: in the header, the index, or the commit."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def complete(self: work.Work, hashes: bytes) -> None:
            if what == "write":
                patch.setattr(work, "write_at", fail)
            elif what == "flush":
                patch.setattr(os, "fsync", fail)
            elif what == "bug":
                patch.setattr(SavePlan, "sealed", lambda *_: 1 / 0)
            else:
                patch.setattr(os, "replace", replacing)
            original(self, hashes)

        def replacing(*arguments: Any, **options: Any) -> None:
            calls.append(None)
            if len(calls) == number:
                fail()
            replace(*arguments, **options)

        calls: list[None] = []
        original, replace = work.Work._complete, os.replace
        if first():
            patch.setattr(work.Work, "_complete", complete)
        p2s.save_pytree(checkpoint(2), path, **options)


@pytest.mark.parametrize("shards", [None, "700kB"])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize(
    ("what", "number"),
    [("write", 0), ("flush", 0), ("bug", 0), *(("replace", number) for number in range(1, 7))],
)
def test_a_failure_of_process_0_in_the_end_leaves_the_old_checkpoint(
    pair: Group, tmp_path: Path, shards: str | None, checksum: bool, what: str, number: int
) -> None:
    if shards is None and (not checksum or number > 1):
        pytest.skip("nothing is written, or renamed, then")
    options = {"checksum": checksum, "max_shard_size": shards, "durable": True}
    p2s.save_pytree(arrays_of(1), tmp_path / "a", **options)  # type: ignore[arg-type] # of a union
    before = contents_of(tmp_path / "a")
    assert (len(before) > 1) == (shards is not None)
    found = pair.fail(fail_in_the_end, tmp_path / "a", what, number, options)
    text = "ZeroDivisionError" if what == "bug" else os.strerror(errno.ENOSPC)
    assert "process 0 could not save: " in found[1][1]
    assert text in found[1][1]
    assert contents_of(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_processes_go_on_after_an_error(pair: Group, old: Path, tmp_path: Path) -> None:
    pair.fail(save_with, old, "disk full", 1)
    pair.run(save_large, tmp_path)
    assert set(p2s.load_pytree(tmp_path / "file")) == {"rows", "columns"}


def save_differently(folder: str, what: str) -> None:
    rank = jax.process_index()
    tree: dict[str, Any] = large()
    values = values_of((1024, 300))
    path, options = f"{folder}/file", dict[str, Any]()
    if what == "shape":
        tree["rows"] = spread(values_of((1024, 300 + 4 * rank)), P("x"))
    elif what == "dtype":
        tree["rows"] = spread(values.view([np.float32, np.int32][rank]), P("x"))
    elif what == "sharding":
        tree["rows"] = spread(values, [P("x"), P(None, "x")][rank])
    elif what == "order":
        tree["rows"] = spread(values, P("x"), mesh_in_order_of(rank))
    elif what == "name":
        tree[f"rank {rank}"] = np.zeros(3, np.float32)
    elif what == "structure":
        tree["some"] = [(), []][rank]
    elif what == "kind":
        tree["number"] = [1.5, np.float64(1.5)][rank]
    elif what == "int":
        tree["number"] = 7 + rank
    elif what == "str":
        tree["number"] = f"a {rank}"
    elif what == "global":
        tree["some"] = spread(np.zeros(4, np.float32), P("x")) if rank else np.zeros(4, np.float32)
    elif what == "path":
        path = f"{folder}/{['file', 'other'][rank]}"
    elif what in {"durable", "checksum"}:
        options[what] = bool(rank)
    elif what == "max_shard_size":
        options[what] = [None, "1GB"][rank]
    elif what == "one more in a folder":
        tree |= {"zero": np.zeros(3, np.float32)} if rank else {}
        path, options["max_shard_size"] = folder, "2MB"
    elif what == "rule":
        options["rename"] = [p2s.Rule("rows", "rows", ["i o -> i o", "i o -> o i"][rank])]
        tree = {"rows": spread(values[:300, :], P("x"))}
    p2s.save_pytree(tree, path, **options)


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("shape", "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 304] {} on process 1"),
        ("dtype", "'@rows' is F32[1024, 300] {} on process 0 and I32[1024, 300] {} on process 1"),
        (
            "sharding",
            "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 300] {} on process 1",
        ),
        ("order", "'@rows' is F32[1024, 300] {} on process 0 and F32[1024, 300] {} on process 1"),
        ("name", "'@rank 0' is F32[3] on process 0 and missing on process 1"),
        ("structure", "the node '@some' is tuple on process 0 and list on process 1"),
        ("kind", "'@number' is 1.5 on process 0 and F64[] on process 1"),
        ("int", "'@number' is 7 on process 0 and 8 on process 1"),
        ("str", "'@number' is 'a 0' on process 0 and 'a 1' on process 1"),
        ("global", "'@some' is F32[4] on process 0 and F32[4] {} on process 1"),
        ("path", "the name of the file is 'file' on process 0 and 'other' on process 1"),
        ("durable", "the option durable= is False on process 0 and True on process 1"),
        ("checksum", "the option checksum= is False on process 0 and True on process 1"),
        (
            "max_shard_size",
            "the option max_shard_size= is None on process 0 and 1000000000 on process 1",
        ),
        ("one more in a folder", "'@zero' is missing on process 0 and F32[3] on process 1"),
        (
            "rule",
            "'rows' is F32[300, 300] {} on process 0 and on process 1, but its rule or the shape of its "
            "leaf differs",
        ),
    ],
)
def test_processes_that_differ_save_nothing(
    pair: Group, old: Path, what: str, difference: str
) -> None:
    start, end = "the processes do not save the same: ", "; nothing was written; give all processes"
    pattern = re.escape(f"{start}{difference}{end}").replace(
        r"\{\}", r"in shards of \[\d+(, \d+)?\] \(devices \d+(, \d+){3}\)"
    )
    for error, text in pair.fail(save_differently, old, what):
        assert error == "pytree2safetensors.FileFormatError"
        assert re.match(pattern, text), text


MAKE: Any = jax.make_array_from_callback
ONES = np.ones(4, np.float32)


def save_on_one_device(folder: str, where: int, others: dict[str, int]) -> str:
    """Save an array that only one process holds."""
    mesh = Mesh(np.array(devices_of(where)[:1]), ("x",))
    tree = {"one": MAKE((4,), NamedSharding(mesh, P()), lambda _: ONES, dtype=ONES.dtype)}
    tree |= {name: spread(np.zeros(size, np.float32), P("x")) for name, size in others.items()}
    try:
        p2s.save_pytree(tree, f"{folder}/file")
    except p2s.UnsupportedLeafError as error:
        return str(error)
    return "saved"


@pytest.mark.skipif(not has_empty_arrays(), reason="this JAX makes no arrays elsewhere")
@pytest.mark.parametrize("where", [0, 1])
def test_an_array_that_is_only_on_another_process_cannot_be_saved(
    pair: Group, tmp_path: Path, where: int
) -> None:
    expected = (
        f"the array at '@one' is only on devices of process {where}, so this process cannot save it; "
        "spread or replicate it over several processes, or save it on its own process, in a tree "
        "without arrays of several processes"
    )
    found = pair.run(save_on_one_device, tmp_path, where, {"other": 4})
    assert found[1 - where] == expected
    assert found[where] == f"process {1 - where} could not save: {expected}"
    assert not [*tmp_path.iterdir()]
    found = pair.run(save_on_one_device, tmp_path, where, {})
    assert found[1 - where] == expected
    assert found[where] == "saved"
    pair.run(save_large, tmp_path)  # the processes still count alike


def save_with_sizes(folder: str) -> None:
    for number, sizes in enumerate([(700_000, np.int64(700_000)), ("700kB", 700_000)]):
        size: Any = sizes[jax.process_index()]
        p2s.save_pytree(large(), f"{folder}/{number}", max_shard_size=size)


def test_a_size_may_be_spelled_differently(pair: Group, tmp_path: Path) -> None:
    pair.run(save_with_sizes, tmp_path)
    for name in "01":
        assert set(p2s.load_pytree(tmp_path / name)) == {"rows", "columns"}


def save_elsewhere(folder: str, elsewhere: str) -> None:
    p2s.save_pytree(large(), f"{folder if first() else elsewhere}/file")


@pytest.mark.parametrize("exists", [False, True])
def test_a_process_that_does_not_see_the_folder(
    pair: Group, old: Path, tmp_path: Path, exists: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if exists:
        elsewhere.mkdir()
    found = pair.fail(save_elsewhere, old, elsewhere)
    for error, text in found:
        assert error == "builtins.FileNotFoundError"
        assert (
            "process 1 does not find the file that process 0 has made for this save; all pr" in text
        )
        assert str(elsewhere / "file") in text
    assert "process 1 could not save: " in found[0][1]
    assert not exists or not list(elsewhere.iterdir())


def save_to(path: Any) -> None:
    p2s.save_pytree(large(), io.BytesIO() if path is None else path)


@pytest.mark.parametrize("path", [None, os.devnull])
def test_several_processes_need_a_file_that_all_can_open(pair: Group, path: str | None) -> None:
    for error, text in pair.fail(save_to, path):
        assert error == "pytree2safetensors.FileFormatError"
        assert (
            "several processes can only save together to a regular file, or with max_shard" in text
        )


def test_several_processes_do_not_save_to_a_store(pair: Group) -> None:
    for error, text in pair.fail(save_to, "memory://file"):
        assert error == "pytree2safetensors.FileFormatError"
        assert "several processes cannot save together to 'memory://file', because they" in text


# --- saves that are not the same on all processes ---------------------------------------------


def save_replicated_over_meshes_in_another_order(folder: str) -> None:
    mesh = mesh_in_order_of(jax.process_index())
    tree = {
        "replicated": spread(values_of((1024, 300)), P(), mesh),
        "rows": spread(values_of((1024, 300)), P("x")),
    }
    p2s.save_pytree(tree, f"{folder}/file")


def test_who_owns_a_replica_does_not_follow_the_order_of_the_mesh(
    pair: Group, tmp_path: Path
) -> None:
    pair.run(save_replicated_over_meshes_in_another_order, tmp_path)
    found = p2s.load_pytree(tmp_path / "file")
    assert found.keys() == {"replicated", "rows"}
    for array in found.values():
        assert raw(array) == raw(values_of((1024, 300)))


def save_all(folder: str, names: list[str], at: str, number: int) -> list[str]:
    """Save checkpoints 0, 1, ... to these names; something happens at one of them on one process."""
    found = []
    for place, name in enumerate(names):
        tree, options = checkpoint(place), dict[str, Any]()
        path: Any = f"{folder}/{name}"
        with pytest.MonkeyPatch.context() as patch:
            if place == number:
                if at == "metadata":
                    options["metadata"] = 5
                elif at == "unknown option":
                    options["metdata"] = {}
                elif at == "progress":
                    options["progress"] = 5
                elif at == "path":
                    path = None
                elif at == "silent":  # interrupted before it begins
                    known = calls.current_processes()
                    known.calls += 1
                    found.append("silent")
                    continue
                elif at in {"write", "vote", "outcome", "agree"}:
                    interrupt_in(at, patch)
            try:
                p2s.save_pytree(tree, path, **options)
                found.append("saved")
            except KeyboardInterrupt:
                found.append("interrupted")
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the test looks at its text
                found.append(f"{type(error).__name__}: {error}")
    return found


def interrupt_in(step: str, patch: pytest.MonkeyPatch) -> None:
    """Send this process a Ctrl-C while it writes, or waits in a step."""
    known: list[Interrupt] = []
    original = Interrupt.__init__

    def create(self: Interrupt) -> None:
        original(self)
        known.append(self)

    def interrupting(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if step == "write" or f"/{step}" in str(arguments[1]):
                patch.undo()
                os.kill(os.getpid(), signal.SIGINT)
                while not known[-1].received:  # it reaches the thread of the caller
                    time.sleep(0.01)
            return function(*arguments)

        return call

    patch.setattr(Interrupt, "__init__", create)
    if step == "write":
        patch.setattr(work, "write_at", interrupting(_file.write_at))
    else:
        keys = coordination.CoordinationKeys
        patch.setattr(keys, "wait", interrupting(keys.wait))


def save_on_both(folder: str, orders: list[list[str]], at: str, where: int, number: int) -> Any:
    rank = jax.process_index()
    return save_all(folder, orders[rank], at if rank == where else "nothing", number)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("at", ["metadata", "unknown option", "progress", "path"])
def test_a_wrong_argument_on_one_is_an_error_on_all(
    pair: Group, tmp_path: Path, where: int, at: str
) -> None:
    found = pair.run(save_on_both, tmp_path, [["a", "b", "c"]] * 2, at, where, 1)
    for process, said in enumerate(found):
        assert [word == "saved" for word in said] == [True, False, True]
        assert (f"process {where} could not save: " in said[1]) == (process != where)
    assert [number_in(tmp_path / name) for name in "ac"] == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("where", [0, 1])
def test_a_call_that_only_one_knows_of_fails_on_all(
    pair: Group, tmp_path: Path, where: int
) -> None:
    found = pair.run(save_on_both, tmp_path, [["a", "b", "c"]] * 2, "silent", where, 1)
    assert [said[0] for said in found] == ["saved", "saved"]
    assert found[where][1] == "silent"
    assert "begins save" in found[1 - where][1]
    assert [said[2] for said in found] == ["saved", "saved"]
    assert [number_in(tmp_path / name) for name in "ac"] == [0, 2]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("at", ["write", "agree", "vote", "outcome"])
def test_an_interrupt_on_one(pair: Group, tmp_path: Path, where: int, at: str) -> None:
    if at == ("outcome", "vote")[where]:
        return  # process 0 waits for votes, process 1 for the outcome
    found = pair.run(save_on_both, tmp_path, [["a", "a", "b"]] * 2, at, where, 1)
    assert found[where] == ["saved", "interrupted", "saved"]
    other = found[1 - where]
    assert (other[0], other[2]) == ("saved", "saved")
    if at == "outcome":  # process 1 has voted: this part of the save is done
        assert other[1] == "saved"
    else:
        assert f"process {where} could not save: " in other[1]
    assert number_in(tmp_path / "a") == (at == "outcome")
    assert number_in(tmp_path / "b") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_saves_in_another_order_are_an_error_on_all(pair: Group, tmp_path: Path) -> None:
    orders = [["params", "average", "last"], ["average", "params", "last"]]
    for said in pair.run(save_on_both, tmp_path, orders, "nothing", 0, 0):
        assert "the name of the file is 'params' on process 0 and 'average' on process 1" in said[0]
        assert "the name of the file is 'average' on process 0 and 'params' on process 1" in said[1]
        assert said[2] == "saved"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def save_local_here_and_global_there(folder: str) -> list[str]:
    """Process 0 saves one more tree."""
    found = save_all(folder, ["a"], "nothing", 0)
    if first():
        found += save_all(folder, ["local"], "nothing", 0)
    return [*found, *save_all(folder, ["b"] if first() else ["b", "end"], "nothing", 0)]


def save_late(folder: str, delay: float) -> None:
    if not first():
        time.sleep(delay)
    p2s.save_pytree(checkpoint(1), f"{folder}/a")
    if first():
        time.sleep(delay)
    p2s.save_pytree(checkpoint(2), f"{folder}/b")


def test_a_process_that_is_late_is_waited_for(pair: Group, tmp_path: Path) -> None:
    pair.run(save_late, tmp_path, 20 if THOROUGH else 1)
    assert [number_in(tmp_path / name) for name in "ab"] == [1, 2]


def test_one_save_more_on_one_is_an_error_on_all(pair: Group, tmp_path: Path) -> None:
    zero, one = pair.run(save_local_here_and_global_there, tmp_path)
    assert zero[0] == one[0] == "saved"
    for words in zero[1:] + one[1:]:
        assert words.startswith("FileFormatError: the processes do not save the same: the name of")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

"""Several processes that save in the background, and how often the processes of a save meet."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import pytree2safetensors as p2s
from pytree2safetensors._save import work
from pytree2safetensors._save.coordination import CoordinationKeys
from pytree2safetensors._save.meeting import JointSave
from pytree2safetensors._storage import descriptor
from together import Group, arrays_of, checkpoint, devices_of, first, group_of, number_in, spread

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # JAX gives its constructor no types


@pytest.fixture
def pair() -> Group:
    """Two processes of two devices each."""
    return group_of(2, 2)


def slow_writes(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make the first writes slow."""
    calls: list[None] = []

    def write_at(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) < 4:
            time.sleep(seconds)
        descriptor.write_at(*arguments)

    patch.setattr(work, "write_at", write_at)


def train_meanwhile(folder: str) -> tuple[bool, float]:
    """Save in the background, and continue with steps that donate the arrays and use collectives."""
    update = jax.jit(
        lambda tree: {name: array + 1 for name, array in tree.items()}, donate_argnums=0
    )
    add = jax.jit(lambda array: array + array.sum())
    # One device of each process: old versions of JAX connect larger groups only with luck.
    two = Mesh(np.array([devices_of(process)[0] for process in range(2)]), ("x",))
    total = spread(np.zeros(2, np.float32), P("x"), two)
    specs = {"rows": P("x"), "columns": P(None, "x")}
    tree = update({name: spread(a, specs[name], two) for name, a in arrays_of(1).items()})
    total = add(total).block_until_ready()
    with pytest.MonkeyPatch.context() as patch:
        slow_writes(patch, 0.2)
        future = p2s.save_pytree_async(tree, f"{folder}/file")
        for step in range(21):
            tree, total = update(tree), add(total)
            if step == 0:
                total.block_until_ready()
                meanwhile = not future.done()
        tree["rows"].block_until_ready()
        future.result()
    return meanwhile, float(tree["rows"].addressable_data(0)[0, 0])


def test_training_goes_on_while_processes_save(pair: Group, tmp_path: Path) -> None:
    for meanwhile, number in pair.run(train_meanwhile, tmp_path):
        assert meanwhile
        assert number == 23
    assert number_in(tmp_path / "file") == 2


def save_in_order(folder: str) -> list[bool]:
    with pytest.MonkeyPatch.context() as patch:
        slow_writes(patch, 0.05)
        futures = [
            p2s.save_pytree_async(checkpoint(number), f"{folder}/{name}")
            for number, name in enumerate("aab")
        ]
        p2s.save_pytree(checkpoint(3), f"{folder}/a")
        done = [future.done() for future in futures]
        futures.append(p2s.save_pytree_async(checkpoint(4), f"{folder}/c"))
        p2s.save_pytree({"local": 1}, f"{folder}/local{jax.process_index()}")
        return [*done, futures[-1].done()]


def test_saves_of_several_processes_end_in_the_order_of_their_calls(
    pair: Group, tmp_path: Path
) -> None:
    assert pair.run(save_in_order, tmp_path) == [[True] * 4] * 2
    assert [number_in(tmp_path / name) for name in "abc"] == [3, 2, 4]


def cancel_in_the_queue(folder: str, where: int) -> list[bool]:
    go_on = threading.Event()
    local = f"{folder}/local{jax.process_index()}"
    earlier = p2s.save_pytree_async({"a": 1}, local, progress=lambda *_: go_on.wait(20))
    futures = [p2s.save_pytree_async(checkpoint(n), f"{folder}/file") for n in range(2)]
    cancelled = [jax.process_index() == where and future.cancel() for future in futures]
    go_on.set()
    for future in [earlier, *futures]:
        future.result(60)
    return cancelled


@pytest.mark.parametrize("where", [0, 1])
def test_one_process_cannot_cancel_a_save_that_all_have_agreed_on(
    pair: Group, tmp_path: Path, where: int
) -> None:
    assert pair.run(cancel_in_the_queue, tmp_path, where) == [[False] * 2] * 2
    assert number_in(tmp_path / "file") == 1


def fail_in_the_background(folder: str, where: int) -> list[str]:
    """One save fails on one process, the next succeeds."""
    here = jax.process_index() == where
    found = []
    with pytest.MonkeyPatch.context() as patch:
        written = threading.Event()

        def write_at(*arguments: Any) -> None:
            if here and not written.is_set():
                written.set()
                raise OSError(28, "No space left on device", "a")
            descriptor.write_at(*arguments)

        patch.setattr(work, "write_at", write_at)
        futures = [p2s.save_pytree_async(checkpoint(n), f"{folder}/file") for n in range(2)]
        for future in futures:
            try:
                found.append(str(future.result()))
            except OSError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("where", [0, 1])
def test_what_fails_in_the_background_on_one_is_the_result_on_all(
    pair: Group, tmp_path: Path, where: int
) -> None:
    found = pair.run(fail_in_the_background, tmp_path, where)
    assert [said[1] for said in found] == ["None", "None"]
    assert "No space left on device" in found[where][0]
    assert f"process {where} could not save: No space left on device" in found[1 - where][0]
    assert number_in(tmp_path / "file") == 1


def fail_to_send(folder: str, where: int, step: str) -> list[str]:
    """One process cannot send a message, and then can."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")

    found = []
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == where:
            patch.setattr(JointSave, step, refuse)
        try:
            p2s.save_pytree(checkpoint(1), f"{folder}/file", checksum=True)
        except RuntimeError as error:
            found.append(str(error))
    p2s.save_pytree(checkpoint(2), f"{folder}/file")
    return found


@pytest.mark.parametrize(("where", "step"), [(1, "give"), (1, "vote"), (0, "meet"), (1, "meet")])
def test_no_process_waits_for_one_that_cannot_send_a_message(
    pair: Group, tmp_path: Path, where: int, step: str
) -> None:
    found = pair.run(fail_to_send, tmp_path, where, step)
    assert found[where] == ["UNAVAILABLE: failed to connect to all addresses"]
    assert "could not save" in found[1 - where][0]
    assert number_in(tmp_path / "file") == 2


def interrupt_after_the_call(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        slow_writes(patch, 0.1)
        future = p2s.save_pytree_async(checkpoint(1), f"{folder}/file")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        future.result()


def test_an_interrupt_after_the_call_does_not_end_the_save(pair: Group, tmp_path: Path) -> None:
    pair.run(interrupt_after_the_call, tmp_path)
    assert number_in(tmp_path / "file") == 1


def save_without_threads(folder: str) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", refuse)
        p2s.save_pytree(checkpoint(1), f"{folder}/file", checksum=True)


def test_processes_that_cannot_start_threads_save(pair: Group, tmp_path: Path) -> None:
    pair.run(save_without_threads, tmp_path)
    assert number_in(tmp_path / "file") == 1  # which verifies the digests


def save_here_and_there(folder: str) -> None:
    if first():
        p2s.save_pytree(checkpoint(1), f"{folder}/file")
    else:
        p2s.save_pytree_async(checkpoint(1), f"{folder}/file")


def test_all_processes_call_the_same_function(pair: Group, tmp_path: Path) -> None:
    for error, text in pair.fail(save_here_and_there, tmp_path):
        assert error == "pytree2safetensors.FileFormatError"
        assert "the function is save_pytree on process 0 and save_pytree_async on process 1" in text


def raise_in_the_call(folder: str) -> list[str]:
    found = []
    for options in {"max_shard_size": "5 apples"}, {"checksum": 3}, {"metadata": {"a": first()}}:
        try:
            p2s.save_pytree_async(checkpoint(1), f"{folder}/file", **options)
        except Exception as error:  # noqa: BLE001 - the test looks at its text
            found.append(str(error))
    p2s.save_pytree_async(checkpoint(2), f"{folder}/file").result()
    return found


def test_the_call_raises_what_it_can_check_on_all(pair: Group, tmp_path: Path) -> None:
    for size, checksum, metadata in pair.run(raise_in_the_call, tmp_path):
        assert "is not a size" in size
        assert "checksum" in checksum
        assert "metadata" in metadata
    assert number_in(tmp_path / "file") == 2


def save_in_a_callback(folder: str) -> list[str]:
    found: list[str] = []

    def progress(*_: int) -> None:
        if not found:
            with pytest.raises(RuntimeError) as caught:
                p2s.save_pytree(checkpoint(2), f"{folder}/other")
            found.append(str(caught.value))

    p2s.save_pytree(checkpoint(1), f"{folder}/file", progress=progress)
    return found


def test_a_callback_cannot_save_arrays_of_several_processes(pair: Group, tmp_path: Path) -> None:
    for said in pair.run(save_in_a_callback, tmp_path):
        assert said == [
            "a callback of a save cannot save an array of several processes, because that save "
            "would wait for the current one; save it after the current save"
        ]
    assert number_in(tmp_path / "file") == 1


# --- how often they meet ----------------------------------------------------------------------


def count_meetings(folder: str, options: dict[str, Any], background: bool) -> dict[str, list[str]]:
    """The steps in which this process sets a key, and those in which it waits for one."""
    found: dict[str, list[str]] = {"set": [], "wait": []}

    def noting(name: str) -> Any:
        original = getattr(CoordinationKeys, name)

        def call(keys: CoordinationKeys, key: str, value: Any) -> Any:
            found[name].append(key.split("/", 1)[1])
            return original(keys, key, value)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in found:
            patch.setattr(CoordinationKeys, name, noting(name))
        save = p2s.save_pytree_async if background else p2s.save_pytree
        future = save(checkpoint(1), f"{folder}/file", **options)
        if background:
            future.result()  # type: ignore[union-attr] # which the other function does not return
    return {name: sorted(set(keys)) for name, keys in found.items()}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shards", [None, "100kB"])
@pytest.mark.parametrize("checksum", [False, True])
def test_processes_meet_three_times_or_with_digests_four(
    pair: Group, tmp_path: Path, background: bool, shards: str | None, checksum: bool
) -> None:
    options = {"checksum": checksum, "max_shard_size": shards}
    zero, one = pair.run(count_meetings, tmp_path, options, background)
    written = ["written/1"] * checksum
    written_by_all = ["written/all"] * checksum
    data = ["data/1/0"] * checksum
    assert one["set"] == sorted(["agree/1", *written, *data, "vote/1"])
    assert one["wait"] == sorted(["agree/all", *written_by_all, "outcome"])
    assert zero["set"] == sorted(["agree/0", "agree/all", *written_by_all, "outcome"])
    assert zero["wait"] == sorted(["agree/1", *written, *data, "vote/1"])


def save_blocks(folder: str) -> None:
    values = np.arange(10 << 20, dtype=np.int32).reshape(1024, -1)  # 40 MiB: three blocks
    tree = {"rows": spread(values, P("x")), "columns": spread(values, P(None, "x")), "a": 1.5}
    p2s.save_pytree(tree, f"{folder}/together", checksum=True, durable=False)
    if first():
        alone = {"rows": jnp.asarray(values), "columns": jnp.asarray(values), "a": 1.5}
        p2s.save_pytree(alone, f"{folder}/alone", checksum=True, durable=False)


def test_digests_of_tensors_of_several_blocks(pair: Group, tmp_path: Path) -> None:
    pair.run(save_blocks, tmp_path)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "alone").read_bytes()

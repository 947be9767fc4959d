"""Meetings of processes, here threads that share keys in memory."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pytree2safetensors import FileFormatError, KeyPathError
from pytree2safetensors._save import meeting
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.meeting import JointSave, Processes
from pytree2safetensors._save.words import LEFT

TERMS = {"the name of the file": "'file'", "'@w'": "F32[4]"}


class Keys:
    """Keys in memory, as the coordination service keeps them."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            assert self.values.setdefault(key, value) == value, f"{key} was set before"
            self.changed.notify_all()

    def wait(self, key: str, seconds: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, seconds)
            return self.values.get(key)

    def find(self, folder: str) -> dict[str, str]:
        with self.changed:
            return {
                key.rpartition("/")[2]: value
                for key, value in self.values.items()
                if key.startswith(folder + "/")
            }

    def delete(self, folder: str) -> None:
        with self.changed:
            for key in [key for key in self.values if key.startswith(folder + "/")]:
                del self.values[key]


class Group:
    """Processes that meet, one thread each."""

    def __init__(self, count: int) -> None:
        self.keys = Keys()
        self.processes = [Processes(self.keys, process, count) for process in range(count)]
        self.interrupts = [Interrupt() for _ in range(count)]

    def run(self, *works: Callable[[Processes], Any]) -> list[Any]:
        """Run a function on each process, the last one on all others; return the results."""
        with ThreadPoolExecutor(len(self.processes)) as pool:
            futures = [
                pool.submit(works[min(number, len(works) - 1)], process)
                for number, process in enumerate(self.processes)
            ]
            return [future.exception(20) or future.result(20) for future in futures]

    def agree(self, processes: Processes, terms: dict[str, str] = TERMS) -> JointSave:
        processes.calls += 1
        interrupt = self.interrupts[processes.process]
        return processes.agree(
            terms, interrupt, token=f"token {processes.process}", start=processes.process
        )

    def interrupt(self, process: int) -> None:
        self.interrupts[process].received.append(KeyboardInterrupt())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SLICE", 0.02)


# --- the first meeting ------------------------------------------------------------------------


def test_processes_agree_on_what_process_0_says() -> None:
    group = Group(3)
    for number in range(3):
        saves = group.run(group.agree)
        assert [save.number for save in saves] == [number] * 3
        assert {(save.token, save.start) for save in saves} == {("token 0", 0)}


def test_processes_that_differ_all_hear_in_what() -> None:
    group = Group(3)
    other = {**TERMS, "'@w'": "F32[5]"}
    errors = group.run(group.agree, group.agree, lambda process: group.agree(process, other))
    assert {(type(error), str(error)) for error in errors} == {
        (
            FileFormatError,
            "the processes do not save the same: '@w' is F32[4] on process 0 and F32[5] on process "
            "2; nothing was written; give all processes the same tree, path and options",
        )
    }
    assert all(isinstance(save, JointSave) for save in group.run(group.agree))


def test_terms_too_long_for_a_key_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_LARGEST", 10)
    group = Group(2)
    errors = group.run(group.agree, lambda process: group.agree(process, {"a": "b"}))
    assert "the same: process 1 differs from process 0; nothing" in str(errors[0])
    assert str(errors[0]) == str(errors[1])


def refuse(group: Group, processes: Processes) -> None:
    processes.calls += 1
    processes.refuse(KeyPathError("no"), group.interrupts[processes.process])


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_before_the_meeting_is_raised_on_all(where: int) -> None:
    group = Group(2)

    def work(processes: Processes) -> None:
        if processes.process == where:
            refuse(group, processes)
        group.agree(processes)

    errors = group.run(work)
    text = f"process {where} could not save: no"
    assert [(type(error), str(error)) for error in errors] == [(KeyPathError, text)] * 2
    assert all(isinstance(save, JointSave) for save in group.run(group.agree))


@pytest.mark.parametrize("where", [0, 1])
def test_a_call_without_a_message_fails_on_all_and_the_next_one_succeeds(where: int) -> None:
    group = Group(2)
    group.processes[where].calls += 1  # and raised something

    def save(processes: Processes) -> list[Any]:
        found: list[Any] = []
        for _ in range(2 - (processes.process == where)):
            try:
                found.append(group.agree(processes))
            except FileFormatError as error:
                found.append(str(error))
        return found

    one, other = group.run(save)[:: 1 - 2 * where]
    assert [save.number for save in one] == [1]
    assert "begins save number 1 of" in other[0]
    assert other[1].number == 1


@pytest.mark.parametrize("where", [0, 1])
def test_an_interrupt_while_a_process_waits_ends_the_save_on_all(where: int) -> None:
    group = Group(2)
    group.interrupt(where)

    def agree(processes: Processes) -> JointSave:
        if processes.process != where:
            time.sleep(0.1)  # after this the other one has left
        return group.agree(processes)

    errors = group.run(agree)
    assert isinstance(errors[where], KeyboardInterrupt)
    assert str(errors[1 - where]) == f"process {where} could not save: {LEFT.text}"
    assert all(isinstance(save, JointSave) for save in group.run(group.agree))


def test_no_process_waits_forever_for_the_others_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_PATIENCE", 0.1)
    for process in range(2):
        group = Group(2)
        with pytest.raises(TimeoutError) as caught:
            group.agree(group.processes[process])
        assert str(caught.value) == (
            "another process did not begin this save within 0 seconds; call save_pytree on all "
            "processes"
        )


# --- later meetings ---------------------------------------------------------------------------


def error_of(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - interrupts among them
        return error
    return None


def save_with(
    group: Group, processes: Processes, failing: dict[str, int], steps: tuple[Any, ...]
) -> None:
    """Save as the code does, and have one process fail in a step."""
    save = group.agree(processes)

    def work(step: str) -> BaseException | None:
        return OSError(5, step, "f") if failing.get(step) == processes.process else None

    for step in steps:
        save.meet(step, work(step))
    if processes.process:
        error = work("vote")
        save.vote(error)
        save.hear_outcome(error)
        return
    error = None
    try:
        save.vote(work("vote"))
        if failing.get("commit") == 0:
            raise OSError(5, "commit", "f")
    except OSError as failed:
        error = failed
        raise
    finally:
        save.report_outcome(error)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("steps", [(), ("written",)])
def test_a_save_that_succeeds(count: int, steps: tuple[str, ...]) -> None:
    group = Group(count)
    for _ in range(3):
        assert group.run(lambda p: save_with(group, p, {}, steps)) == [None] * count


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("step", ["written", "vote", "commit"])
def test_an_error_in_a_step_is_raised_on_all(where: int, step: str) -> None:
    if step == "commit" and where:
        return
    group = Group(3)
    errors = group.run(lambda p: save_with(group, p, {step: where}, ("written",)))
    for process, error in enumerate(errors):
        told = f"[Errno 5] process {where} could not save: {step}: 'f'"
        assert str(error) == (f"[Errno 5] {step}: 'f'" if process == where else told)
    assert group.run(lambda p: save_with(group, p, {}, ())) == [None] * 3


def test_an_interrupt_after_the_vote_waits_for_the_outcome() -> None:
    group = Group(2)
    saves = group.run(group.agree)
    group.interrupt(1)
    saves[1].vote(None)
    ended = threading.Event()

    def follow() -> None:
        saves[1].hear_outcome(None)
        ended.set()

    follower = threading.Thread(target=follow)
    follower.start()
    assert not ended.wait(0.1)
    saves[0].vote(None)
    saves[0].report_outcome(None)
    assert ended.wait(20)
    follower.join()
    with pytest.raises(KeyboardInterrupt):  # the caller's thread raises it now
        group.interrupts[1].check()


def test_the_second_interrupt_after_the_vote_is_raised() -> None:
    group = Group(3)
    saves = group.run(group.agree)
    saves[1].vote(None)
    group.interrupt(1)
    group.interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        saves[1].hear_outcome(None)
    saves[2].vote(None)
    saves[0].vote(None)  # process 1 had voted before it left
    saves[0].report_outcome(None)
    saves[2].hear_outcome(None)


@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_leaves_a_step_is_an_error_on_the_others(where: int) -> None:
    group = Group(2)
    saves = group.run(group.agree)
    group.interrupt(where)
    with pytest.raises(KeyboardInterrupt):
        saves[where].meet("written", None)
    errors = [error_of(lambda: saves[1 - where].meet("written", None))]
    if where:  # what it said before it left counts, and it does not vote
        assert errors == [None]
        errors = [error_of(lambda: saves[0].vote(None))]
    assert str(errors[0]) == f"process {where} could not save: {LEFT.text}"


def test_old_keys_are_deleted() -> None:
    group = Group(3)
    sizes = set()
    for _ in range(10):
        group.run(lambda p: save_with(group, p, {}, ("written",)))
        sizes.add(len(group.keys.values))
    assert max(sizes) < 25


def test_a_meeting_of_many_is_quick() -> None:
    group = Group(64)
    start = time.monotonic()
    group.run(group.agree)
    assert time.monotonic() - start < 10


def left_by_process_0() -> Group:
    """Two processes: 0 has left its first save, 1 has not begun one."""
    group = Group(2)
    group.interrupt(0)
    with pytest.raises(KeyboardInterrupt):
        group.agree(group.processes[0])
    group.processes[1].calls += 1  # a call that failed before it was announced
    return group


def test_a_process_that_is_ahead_meets_again_where_process_0_left_an_earlier_save() -> None:
    group = left_by_process_0()
    found = group.run(group.agree)
    assert [save.token for save in found] == ["token 0", "token 0"]
    assert [save.call for save in found] == [2, 2]


def test_a_process_that_is_ahead_refuses_alone_where_process_0_left_an_earlier_save() -> None:
    group = left_by_process_0()
    ahead = group.processes[1]
    ahead.calls += 1
    ahead.refuse(ZeroDivisionError("division"), group.interrupts[1])
    assert (ahead.announced, ahead.rounds) == (2, 1)

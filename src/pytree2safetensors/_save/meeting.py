"""Meetings: processes that save together agree on a save, and learn what failed on one of them.

Every message is a key that is set once: `<round>/<step>/<process>`. In a meeting, each process
posts its words. Process 0 collects them and posts one verdict, and all processes act on it. A save
has three meetings: agree, vote and outcome. With checksums, there is a fourth, written, before the
vote.

Specification: *Saving*.
"""

import base64
import json
import math
import time
from contextlib import suppress
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.words import (
    LEFT,
    Failure,
    Terms,
    Verdict,
    Words,
    decide,
    difference,
    digest_of,
    error_of,
    failure_of,
    judge,
    read_failed,
    read_failure,
    read_verdict,
    read_words,
)

Step: TypeAlias = Literal["written", "vote"]

_SLICE: Final = 0.5  # seconds between checks for interrupts and for processes that have left
_PATIENCE: Final = 600.0  # seconds that a process waits until the others begin the same save
_LARGEST: Final = 1 << 20  # characters of terms that one key holds
_PIECE: Final = 3 << 18  # bytes of data that one key holds: a third more in characters


@runtime_checkable
class KeyStore(Protocol):
    """Keys that all processes see."""

    def set(self, key: str, value: str) -> None:
        """Set a key that nobody else sets; setting it again to the same value changes nothing."""
        ...

    def wait(self, key: str, seconds: float) -> str | None:
        """Return the value of a key, or None if nobody sets it in time."""
        ...

    def find(self, folder: str) -> dict[str, str]:
        """Return the keys that are in a folder now, by their last parts."""
        ...

    def delete(self, folder: str) -> None:
        """Delete a folder of keys."""
        ...


class Processes:
    """The processes that save together, as one of them sees them.

    Attributes:
        calls: How many saves of global arrays this process has begun.
        announced: The last of them that the others know about.
        rounds: How many times this process has announced a save.
    """

    def __init__(self, store: KeyStore, process: int, count: int, client: object = None) -> None:
        self.store, self.process, self.count, self.client = store, process, count, client
        self.calls = self.announced = self.rounds = 0
        self._deleted = 0  # rounds below this one have no keys any more

    def agree(
        self, terms: Terms, interrupt: Interrupt, *, token: str = "", start: int = 0
    ) -> "JointSave":
        """Meet the others, until all have begun the same save.

        Raises:
            FileFormatError: The processes save different things, or not equally often.
            TimeoutError: Another process did not begin a save within ten minutes.
            Exception: An error like the one on another process.
        """
        words = Words(self.calls, digest_of(terms), token=token, start=start)
        while True:
            save = self._begin(words, interrupt)
            verdict = save.hear(words)
            answer = "again" if verdict is None else judge(verdict, words.call)
            if verdict is not None and answer == "go":
                save.token, save.start = verdict.token, verdict.start
                return save
            if verdict is not None and verdict.differs is not None and answer == "explain":
                raise FileFormatError(save.explain(verdict.differs, terms))

    def refuse(self, error: BaseException, interrupt: Interrupt) -> None:
        """Send an error to the others if this process cannot begin its save, so that they raise it, too.

        Raises:
            Exception: An error like the one on the first process that failed.
        """
        words = Words(self.calls, "", failure_of(error))
        verdict = self._begin(words, interrupt).hear(words)
        if verdict is not None:
            judge(verdict, words.call)

    def _begin(self, words: Words, interrupt: Interrupt) -> "JointSave":
        number, self.rounds, self.announced = self.rounds, self.rounds + 1, words.call
        return JointSave(self, number, words.call, interrupt)

    def delete_before(self, number: int) -> None:
        """Delete the keys of earlier rounds, which nobody reads any more."""
        for earlier in range(self._deleted, number):
            self.store.delete(str(earlier))
        self._deleted = max(self._deleted, number)


class JointSave:
    """A save of several processes, under the number of the round in which they agreed on it."""

    def __init__(self, processes: Processes, number: int, call: int, interrupt: Interrupt) -> None:
        self.store, self.process, self.count = processes.store, processes.process, processes.count
        self.processes, self.number, self.call, self.interrupt = processes, number, call, interrupt
        self.token, self.start = "", 0
        self.failed: tuple[int, Failure] | None = None  # on another process

    # --- the first meeting ---

    def hear(self, words: Words) -> Verdict | None:
        """Post the first words, and return the verdict; None if process 0 left an earlier save."""
        deadline = time.monotonic() + _PATIENCE
        self._set(f"agree/{self.process}", json.dumps(words))
        if self.process == 0:
            return self._decide(words, deadline)
        text = self._wait("agree/all", 0, deadline=deadline)
        if text is not None:
            return read_verdict(text)
        if self._left()[0] < self.call:
            return None
        raise error_of(0, LEFT)

    def _decide(self, words: Words, deadline: float) -> Verdict:
        said = [words]
        for process in range(1, self.count):
            text = self._wait(f"agree/{process}", process, deadline=deadline)
            said.append(words if text is None else read_words(text))
        for process, call in self._left().items():
            said[process] = Words(call, "", LEFT)
        verdict = decide(said)
        self._set("agree/all", json.dumps(verdict))
        return verdict

    def explain(self, differs: int, terms: Terms) -> str:
        """Return the text of an error that says how a process differs from process 0."""
        if self.process == 0:
            text = json.dumps(terms)
            self._set("terms", text if len(text) < _LARGEST else "{}")
        if self.process == differs:
            first = json.loads(self._wait("terms", 0) or "{}")
            self._set("difference", difference(first, terms, differs) if first else "")
        found = self._wait("difference", differs) or f"process {differs} differs from process 0"
        return (
            f"the processes do not save the same: {found}; nothing was written; give all processes "
            "the same tree, path and options"
        )

    # --- later meetings ---

    def meet(self, step: Step, error: BaseException | None) -> None:
        """Report the result of a step on this process, and raise an error if it failed on any."""
        if self.process:
            self._post(step, error)
            text = self._wait(f"{step}/all", 0)
            self._check((0, LEFT) if text is None else read_failed(text), error)
        else:
            failed = self._collect(step, error)
            self._set(f"{step}/all", json.dumps(failed))
            self._check(failed, error)

    def vote(self, error: BaseException | None) -> None:
        """Report the result of the last step. Process 0 collects all, and raises if any failed."""
        if self.process:
            self._post("vote", error)
            return
        failed = self._collect("vote", error)
        self.processes.delete_before(self.number)
        self._check(failed, error)
        self.interrupt.check()  # for the last time before the commit

    def report_outcome(self, error: BaseException | None) -> None:
        """Report to the other processes how the save ended. Only process 0 does this."""
        failed = self.failed or (None if error is None else (0, failure_of(error)))
        self._set("outcome", json.dumps(failed))

    def hear_outcome(self, error: BaseException | None) -> None:
        """Wait until process 0 reports how the save ended, and raise an error if it failed."""
        text = self._wait("outcome", 0, hold=error is None)
        self._check((0, LEFT) if text is None else read_failed(text), error)

    def _collect(self, step: Step, error: BaseException | None) -> tuple[int, Failure] | None:
        """Return the first process on which a step failed, and how."""
        failed = None if error is None else (0, failure_of(error))
        for process in range(1, self.count):
            text = self._wait(f"{step}/{process}", process)
            failure = LEFT if text is None else read_failure(text)
            if failed is None and failure is not None:
                failed = process, failure
        return failed

    def _check(self, failed: tuple[int, Failure] | None, error: BaseException | None) -> None:
        if error is not None:
            raise error
        if failed is not None:
            self.failed = failed
            raise error_of(*failed)

    def leave(self) -> None:
        """Let nobody wait for messages that this process has not sent."""
        with suppress(Exception):  # this process raises the error that makes it leave
            self._set(f"left/{self.process}", str(self.call))

    # --- data for process 0 ---

    def give(self, data: bytes) -> None:
        """Send bytes to process 0, before the result of their step is reported."""
        for number, start in enumerate(range(0, len(data), _PIECE)):
            text = base64.b64encode(data[start : start + _PIECE]).decode("ascii")
            self._set(f"data/{self.process}/{number}", text)

    def given(self, process: int, size: int) -> bytes:
        """Return the bytes that a process has sent."""
        texts = [
            self._wait(f"data/{process}/{number}", process) or ""
            for number in range(-(-size // _PIECE))
        ]
        return b"".join(map(base64.b64decode, texts))

    # --- keys ---

    def _post(self, step: Step, error: BaseException | None) -> None:
        failure = None if error is None else failure_of(error)
        self._set(f"{step}/{self.process}", json.dumps(failure))

    def _set(self, key: str, value: str) -> None:
        self.store.set(f"{self.number}/{key}", value)

    def _left(self) -> dict[int, int]:
        """Return the processes that have left this save without an answer, and their calls."""
        found = self.store.find(f"{self.number}/left")
        return {int(process): int(call) for process, call in found.items()}

    def _wait(
        self, key: str, process: int, *, deadline: float = math.inf, hold: bool = False
    ) -> str | None:
        """Return the message of a process, or None if it has left.

        An interrupt makes this process leave the save. With `hold`, only a second interrupt does.
        """
        key = f"{self.number}/{key}"
        while True:
            text = self.store.wait(key, _SLICE)
            if text is not None:
                return text
            if process in self._left():
                return self.store.wait(key, 0.0)  # its message from before it left
            try:
                if not hold or len(self.interrupt.received) > 1:
                    self.interrupt.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process did not begin this save within {_PATIENCE:.0f} seconds; "
                        "call save_pytree on all processes"
                    )
            except BaseException:
                self.leave()
                raise

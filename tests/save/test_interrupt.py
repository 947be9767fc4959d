"""Interrupts of the thread that waits for a save of several processes."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pytree2safetensors._save.interrupt import Interrupt


def starting(patch: pytest.MonkeyPatch, start: Callable[[threading.Thread], None]) -> None:
    """Replace the start of the working thread, but not of other threads."""
    real = threading.Thread.start

    def replaced(thread: threading.Thread) -> None:
        (start if thread.name == "pytree2safetensors-agree" else real)(thread)

    patch.setattr(threading.Thread, "start", replaced)


def test_an_interrupt_before_the_work_began_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[threading.Thread] = []
    steps: list[str] = []
    interrupt = Interrupt()

    def start(thread: threading.Thread) -> None:
        prepared.append(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        starting(patch, start)
        with pytest.raises(KeyboardInterrupt):
            interrupt.run(lambda: steps.append("done"))
    prepared[0].start()  # if the system has started it anyway
    prepared[0].join()
    assert not steps
    assert not interrupt.received


def test_an_interrupt_after_the_work_began_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    real, began = threading.Thread.start, threading.Event()
    interrupt = Interrupt()

    def start(thread: threading.Thread) -> None:
        real(thread)
        assert began.wait(20)
        raise KeyboardInterrupt

    def work() -> str:
        began.set()
        return "done"

    starting(monkeypatch, start)
    assert interrupt.run(work) == "done"
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
    interrupt.check()  # it is raised once


def test_an_interrupt_before_the_waiting_began_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt, going_on = Interrupt(), threading.Event()
    real: Any = interrupt.wait_for
    calls: list[Any] = []

    def wait_for(end: Any) -> Any:
        calls.append(end)
        if len(calls) == 1:
            raise KeyboardInterrupt
        going_on.set()
        return real(end)

    def work() -> str:
        assert going_on.wait(20)
        return "done"

    monkeypatch.setattr(interrupt, "wait_for", wait_for)
    assert interrupt.run(work) == "done"
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()

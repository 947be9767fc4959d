"""Interrupts of the thread that waits for a save of several processes."""

import threading
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._storage import threads


def test_an_interrupt_before_the_work_began_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Callable[[], object]] = []
    steps: list[str] = []
    interrupt = Interrupt()

    def start(begin: Callable[..., object], args: tuple[Any, ...]) -> None:
        prepared.append(partial(begin, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "start_new_thread", start)
    with pytest.raises(KeyboardInterrupt):
        interrupt.run(lambda: steps.append("done"))
    late = threading.Thread(target=prepared[0])  # if the system has started it anyway
    late.start()
    late.join()
    assert not steps
    assert not interrupt.received


def test_an_interrupt_after_the_work_began_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    interrupt = Interrupt()

    def start(*args: Any) -> None:
        start_new_thread(*args)
        assert began.wait(20)
        raise KeyboardInterrupt

    def work() -> str:
        began.set()
        return "done"

    monkeypatch.setattr(threads, "start_new_thread", start)
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

"""The garbage collector is restored, whatever threads, forks and signals do in the meantime."""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pytree2safetensors._collector import collector_paused


@pytest.fixture(autouse=True)
def _on_before_and_after() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


@contextmanager
def paused_by_another_thread() -> Iterator[None]:
    """A pause that another thread begins before the block, and ends after it."""
    begun, ending = threading.Event(), threading.Event()

    def pause() -> None:
        with collector_paused():
            begun.set()
            assert ending.wait(30)

    thread = threading.Thread(target=pause)
    thread.start()
    assert begun.wait(30)
    try:
        yield
    finally:
        ending.set()
        thread.join()


def test_the_collector_is_on_again_after_the_outermost_pause() -> None:
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_is_on_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), collector_paused():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused(), paused_by_another_thread():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_pauses_of_two_threads_may_overlap_in_any_order() -> None:
    with paused_by_another_thread():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the other thread is not done
    assert gc.isenabled()
    pause = collector_paused()
    with paused_by_another_thread():
        pause.__enter__()  # finds the collector off
    assert not gc.isenabled()
    pause.__exit__(None, None, None)
    assert gc.isenabled()


def test_many_threads_leave_the_collector_on() -> None:
    def pause() -> None:
        for _ in range(2000):
            with collector_paused():
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=pause) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.parametrize("own", [False, True])
def test_a_child_forgets_the_pauses_of_threads_that_it_does_not_have(own: bool) -> None:
    pause = collector_paused()
    if own:
        pause.__enter__()
    with paused_by_another_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python: the child does nothing that could hang
        child = os.fork()
        if not child:
            paused = not gc.isenabled()
            if own:
                pause.__exit__(None, None, None)
            os._exit(0 if paused is own and gc.isenabled() else 1)
        _, status = os.waitpid(child, 0)
    if own:
        pause.__exit__(None, None, None)
    assert status == 0
    assert gc.isenabled()

"""Signal handlers for a while, and one that raises."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handling(number: int, act: Callable[[], object]) -> Iterator[None]:
    def handle(_: int, __: FrameType | None) -> None:
        act()

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


class Interrupted(Exception):
    pass


def interrupt() -> None:
    raise Interrupted

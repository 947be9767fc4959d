"""Showing how far long work is."""

from collections.abc import Callable
from typing import TypeAlias

import jax

from pytree2safetensors._file import Progress

ProgressOption: TypeAlias = bool | Callable[[int, int], object]


def reporter(progress: ProgressOption, what: str) -> Progress | None:
    """What to call with (done_bytes, total_bytes); None for silence."""
    if isinstance(progress, bool):
        return _bar(what) if progress else None
    return progress


def _bar(what: str) -> Progress | None:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress=True shows its bar with tqdm, which is not installed; "
            "install pytree2safetensors[progress], or pass a function"
        ) from None
    if jax.process_index() != 0:
        return None
    bar = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=what)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """What a part of the work calls, which begins when `before` of all bytes are done."""
    if progress is None:
        return None

    def show(done: int, _: int) -> None:
        progress(before + done, total)

    return show

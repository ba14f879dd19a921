"""How kernels are started: at once, or only compiled, for a rehearsal of what will be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from triton import AsyncCompileMode

from chandra.memory.host import usable_cores

_rehearsed: ContextVar[bool] = ContextVar("rehearsed", default=False)


def launch(kernel: Any, *grid: int) -> Callable[..., object]:
    """What starts a Triton kernel on a grid, or in a rehearsal only has it compiled; called with its arguments."""
    start: Callable[..., object] = partial(kernel.warmup, grid=grid) if _rehearsed.get() else kernel[grid]
    return start


@contextmanager
def rehearsal(told: Callable[[int, int], None]) -> Iterator[None]:
    """Inside, kernels are compiled, or found in Triton's cache (`TRITON_CACHE_DIR`), in many threads, and none is
    started. `told` is told the kernels done and in all. Raises what compiling raises."""
    with ThreadPoolExecutor(usable_cores()) as pool, AsyncCompileMode(pool) as mode:
        token = _rehearsed.set(True)
        try:
            yield
        finally:
            _rehearsed.reset(token)
        for done, _ in enumerate(as_completed(mode.raw_futures), 1):
            told(done, len(mode.raw_futures))

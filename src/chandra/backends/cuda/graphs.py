"""Recorded steps (CUDA graphs): what a decode step launches is recorded once, and then repeated by one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from chandra.backends.cuda.accelerator import Accelerator, Ops


class Graphs:
    """Recordings by key, in at most `budget` bytes of the device; the one unused longest makes room.

    A key must name the calls with everything they depend on: their buffers, grids and host values. The first time the
    calls are just made (kernels are compiled then), the second time they are recorded.
    """

    def __init__(self, accelerator: Accelerator, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._accelerator = accelerator
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, tuple[Callable[[Ops], None], int]] = OrderedDict()

    def run(self, key: Hashable, ops: Ops) -> None:
        """Make the calls of `ops`, or repeat their recording."""
        if key in self._recorded:
            self._recorded.move_to_end(key)
        elif self.budget and key in self._seen:
            self._record(key, ops)
        else:
            self._seen.add(key)
            ops()
            return
        self._recorded[key][0](ops)

    def _record(self, key: Hashable, ops: Ops) -> None:
        self._accelerator.settle()
        before = self._accelerator.taken()
        repeat = self._accelerator.record(ops)
        nbytes = max(0, self._accelerator.taken() - before)
        self._recorded[key] = repeat, nbytes
        self.used += nbytes
        while self.used > self.budget and len(self._recorded) > 1:
            _, (_, freed) = self._recorded.popitem(last=False)
            self.used -= freed

    def clear(self) -> None:
        """Forget everything: memory that recordings point to has gone."""
        self._recorded.clear()
        self._seen.clear()
        self.used = 0

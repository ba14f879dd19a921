"""Micro-batches: parts of a step that follow each other through the devices, so that all of them work at once.

Every device takes the parts in order, so a chunk of a prompt that is cut finds the keys and values of what is before
it. A row's result does not depend on its company, so cutting changes no result (GPipe: Huang et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import numpy as np

from chandra.ops.contracts import ForwardBatch, KVLayer, KVTables, KVView

MOST = 16  # parts of a step: by then nearly all of the time is shared
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Rows from `start` on of a batch, as a batch of their own that wants no logits, and their view of the cache."""

    batch: ForwardBatch
    start: int
    sequences: slice
    kv: KVView
    _tables: dict[int, KVTables] = field(default_factory=dict)

    def layer(self, index: int) -> KVLayer:
        return self.kv.layer(index)

    def tables(self, index: int) -> KVTables:
        whole = self.kv.tables(index)
        if id(whole) not in self._tables:  # one object for a group of layers, as in the whole
            rows = slice(self.start, self.start + len(self.batch.token_ids))
            self._tables[id(whole)] = KVTables(whole.block_table[self.sequences], whole.slots[rows])
        return self._tables[id(whole)]


def split(batch: ForwardBatch, kv: KVView, least: int) -> list[MicroBatch]:
    """The batch in parts of about equal size and at least `least` rows. A sequence may be cut."""
    rows = len(batch.token_ids)
    count = min(MOST, rows // least)
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return [_cut(batch, kv, start, stop) for start, stop in pairwise(edges)]


def _cut(batch: ForwardBatch, kv: KVView, start: int, stop: int) -> MicroBatch:
    first = int(np.searchsorted(batch.query_start, start, side="right")) - 1
    last = int(np.searchsorted(batch.query_start, stop, side="left"))
    contexts = batch.context_lens[first:last].copy()
    contexts[-1] = batch.positions[stop - 1] + 1
    starts = np.clip(batch.query_start[first : last + 1], start, stop) - np.int32(start)
    rows = slice(start, stop)
    part = ForwardBatch(batch.token_ids[rows], batch.positions[rows], starts, contexts, batch.logit_rows[:0])
    return MicroBatch(part, start, slice(first, last), kv)


def wavefront(stages: Sequence[Callable[[MicroBatch, T | None], T | None]], parts: Sequence[MicroBatch]) -> None:
    """Take every part through all stages, in order: a stage gets a part and what the stage before made of it. Each has
    a thread, the first one this one. Raises the first error of a stage, when all have stopped."""
    gates: list[SimpleQueue[T | None]] = [SimpleQueue() for _ in stages]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        for part in parts:
            try:
                before = gates[index].get() if index else None
                made = None if errors else stages[index](part, before)
            except BaseException as error:
                errors.append(error)
                made = None
            if index + 1 < len(stages):
                gates[index + 1].put(made)

    others = [Thread(target=work, args=(index,)) for index in range(1, len(stages))]
    for other in others:
        other.start()
    work(0)
    for other in others:
        other.join()
    if errors:
        raise errors[0]

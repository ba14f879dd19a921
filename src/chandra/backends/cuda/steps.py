"""The integers of a step on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.attention import Extent
from chandra.backends.cuda.sizes import context_bucket
from chandra.lazy import torch
from chandra.ops.contracts import Copied, Copy, ForwardBatch, IntArray, KVTables

RECORDED = 32  # sequences of a step that is recorded, at most
_ALIGNMENT = 4  # integers


@dataclass(frozen=True)
class DeviceBatch:
    """A `ForwardBatch` in device memory (int32), and of its sizes what launches depend on."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    logit_rows: torch.Tensor
    extent: Extent

    @property
    def repeats(self) -> bool:
        """Whether a step like it is worth recording: one row of each of a few sequences."""
        return not self.extent.prefills and self.extent.sequences <= RECORDED

    @property
    def shape(self) -> tuple[int, ...]:
        """What the calls of a step depend on, besides the contents of arrays."""
        extent = self.extent
        sizes = extent.sequences, extent.prefills, extent.prefill_rows, extent.max_context
        return (*sizes, len(self.token_ids), len(self.logit_rows))


@dataclass(frozen=True)
class DeviceTables:
    """`KVTables` in device memory (int32)."""

    block_table: torch.Tensor
    slots: torch.Tensor


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class StepArrays:
    """Uploads what describes a step in one copy, to memory that stays where it is: arrays of equal sizes have equal
    addresses in every step, so that recorded calls can be repeated.

    `grow(n)` gives memory for n int32 values on the device, when a step needs more than any before.
    """

    def __init__(self, accelerator: Accelerator, capacity: int, grow: Callable[[int], torch.Tensor]) -> None:
        self._accelerator, self._grow = accelerator, grow
        self._batch: ForwardBatch | None = None
        self._on_device: DeviceBatch | None = None
        self._tables: list[tuple[KVTables, DeviceTables]] = []
        self._copied: Copy = Copied()
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self._device = self._grow(capacity)
        self._host = self._accelerator.host_buffer(4 * capacity).view(np.int32)

    def begin(self, batch: ForwardBatch, tables: Sequence[KVTables]) -> None:
        """Upload a step, unless that has been done."""
        if batch is self._batch and all(any(t is known for known, _ in self._tables) for t in tables):
            return
        arrays: list[IntArray] = [
            *(batch.token_ids, batch.positions, batch.query_start, batch.context_lens, batch.logit_rows),
            *(array for table in tables for array in (table.block_table, table.slots)),
        ]
        total = sum(_padded(array.size) for array in arrays)
        if total > len(self._host):
            self._allocate(2 * total)
        self._copied.done()  # the last step's integers came out of the same host memory
        views, start = [], 0
        for array in arrays:
            self._host[start : start + array.size] = array.reshape(-1)
            views.append(self._device[start : start + array.size].view(array.shape))
            start += _padded(array.size)
        self._copied = self._accelerator.copy(torch.from_numpy(self._host[:total]), self._device[:total])
        longest = int(batch.context_lens.max(initial=1))
        extent = Extent.of(np.diff(batch.query_start).tolist(), context_bucket(longest))
        tokens, positions, starts, contexts, rows = views[:5]
        self._batch = batch
        self._on_device = DeviceBatch(tokens, positions, starts, contexts, rows, extent)
        self._tables = [(table, DeviceTables(views[5 + 2 * i], views[6 + 2 * i])) for i, table in enumerate(tables)]

    def batch(self, batch: ForwardBatch) -> DeviceBatch:
        """The batch on the device."""
        self.begin(batch, ())
        assert self._on_device is not None
        return self._on_device

    def tables(self, batch: ForwardBatch, tables: KVTables) -> DeviceTables:
        """Tables of the batch on the device."""
        self.begin(batch, (tables,))
        return next(device for known, device in self._tables if known is tables)

    def rows(self, rows: IntArray) -> torch.Tensor:
        """Logit rows on the device: those of the batch, or others."""
        if self._batch is None or rows is not self._batch.logit_rows:
            none = rows[:0]
            self.begin(ForwardBatch(none, none, np.zeros(1, np.int32), none, rows), ())
        assert self._on_device is not None
        return self._on_device.logit_rows

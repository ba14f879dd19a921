"""Swap space: host memory for the blocks of preempted sequences, with a budget of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from chandra.kvcache.allocator import BlockAllocator
from chandra.kvcache.layout import LayerGroup
from chandra.kvcache.pool import KVPool
from chandra.memory.ledger import Kind, Ledger
from chandra.ops.contracts import Array, Backend, Copy, KVLayer


def swap_slots(
    groups: Sequence[LayerGroup], num_blocks: Sequence[int], kv_type: str, block_size: int, nbytes: int
) -> tuple[int, ...]:
    """Slots of each group in `nbytes` of swap space: as many for each block of the cache in every group."""
    total = sum(n * block_size * g.token_bytes(kv_type) for g, n in zip(groups, num_blocks, strict=True))
    return tuple(n * nbytes // total for n in num_blocks)


class _Mirror(KVPool):
    """The cache's layers in host memory, each from which copies to its device are fast."""

    def __init__(self, pool: KVPool, slots: Sequence[int], backends: Mapping[str, Backend], ledger: Ledger) -> None:
        self._owners = {g.layers: backends[g.device] for g in pool.groups}
        host = [LayerGroup(g.layers, g.num_kv_heads, g.head_dim, g.window) for g in pool.groups]
        super().__init__(host, slots, pool.block_size, pool.kv_type, backends, ledger, Kind.SWAP)

    def _empty(self, group: LayerGroup, shape: tuple[int, ...], dtype: str) -> Array:
        kind = np.dtype(dtype)
        buffer = self._owners[group.layers].host_buffer(math.prod(shape) * kind.itemsize)
        return buffer.view(kind).reshape(shape)

    def _trim(self, group: LayerGroup, layer: KVLayer, blocks: int) -> bool:
        on_host = self._owners[group.layers].device.kind == "cpu"  # another device may have the pages pinned
        return on_host and super()._trim(group, layer, blocks)


class SwapSpace:
    """A mirror of the cache in host memory. Group i has `slots[i]` blocks; a slot holds what a block of all the
    group's layers holds.

    A slot that is let go of keeps its contents under their hash until it is needed, so that what has not changed is
    not copied twice. Copies run beside computation: what stood in a block may still be leaving it when the block is
    taken anew (`reuse`). `backends` maps device names. Raises BudgetExceeded.
    """

    def __init__(self, pool: KVPool, slots: Sequence[int], backends: Mapping[str, Backend], ledger: Ledger) -> None:
        self._cache, self._backends = pool, backends
        self.pool = _Mirror(pool, slots, backends, ledger)
        self.allocators = [BlockAllocator(n) for n in slots]
        self._leaving: list[dict[int, Copy]] = [{} for _ in slots]  # by group and block: what copies it out
        self._last: dict[str, Copy] = {}  # by device: a device's copies are done in order
        self.out_blocks = self.out_bytes = self.in_blocks = self.in_bytes = 0

    def save(self, group: int, blocks: Sequence[int], keys: Sequence[bytes | None]) -> list[int]:
        """Slots that will hold what these blocks hold; `keys` are the hashes of those that are full. There must be
        room."""
        allocator = self.allocators[group]
        slots, new = allocator.claim(keys)
        for block, slot, count in _runs([blocks[i] for i in new], [slots[i] for i in new]):
            copy = self._copy(group, block, slot, count, out=True)
            self._leaving[group].update((block + i, copy) for i in range(count))
        for index in new:
            if (key := keys[index]) is not None:
                allocator.register(slots[index], key)
        self.out_blocks += len(new)
        self.out_bytes += len(new) * self._cache.block_bytes[group]
        return slots

    def restore(self, group: int, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Fill blocks with what slots hold, before ops that are issued from now on."""
        for block, slot, count in _runs(blocks, slots):
            self._copy(group, block, slot, count, out=False).wait()
        self.in_blocks += len(slots)
        self.in_bytes += len(slots) * self._cache.block_bytes[group]

    def reuse(self, group: int, blocks: Sequence[int]) -> None:
        """Ops that are issued from now on may write to these blocks."""
        for block in blocks:
            if (copy := self._leaving[group].pop(block, None)) is not None:
                copy.wait()

    def settle(self) -> None:
        """Return when all copies are over: the memory of blocks and slots may change or move."""
        for copy in self._last.values():
            copy.done()
        self._last.clear()
        for leaving in self._leaving:
            leaving.clear()

    def _copy(self, group: int, block: int, slot: int, count: int, out: bool) -> Copy:
        """Begin to copy so many blocks; the last of the copies that takes."""
        name = self._cache.groups[group].device
        for layer in self._cache.groups[group].layers:
            cache, mirror = self._cache.layer(layer), self.pool.layer(layer)
            for side, other in ((cache.k, mirror.k), (cache.v, mirror.v)):
                device, host = side[block : block + count], other[slot : slot + count]
                backend = self._backends[name]
                self._last[name] = backend.store(device, host) if out else backend.fetch(host, device)
        return self._last[name]

    def close(self) -> None:
        """Give the memory back."""
        self.settle()
        self.pool.close()


def _runs(blocks: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first block, first slot, count) where both go on by one."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or (blocks[end], slots[end]) != (blocks[end - 1] + 1, slots[end - 1] + 1):
            yield blocks[start], slots[start], end - start
            start = end

"""Swap space: host memory for the blocks of preempted sequences, with a budget of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chandra.kvcache.allocator import BlockAllocator
from chandra.kvcache.layout import LayerGroup
from chandra.kvcache.pool import KVPool
from chandra.memory.ledger import Kind, Ledger
from chandra.ops.contracts import Backend


def swap_slots(
    groups: Sequence[LayerGroup], num_blocks: Sequence[int], kv_type: str, block_size: int, nbytes: int
) -> tuple[int, ...]:
    """Slots of each group in `nbytes` of swap space: as many for each block of the cache in every group."""
    total = sum(n * block_size * g.token_bytes(kv_type) for g, n in zip(groups, num_blocks, strict=True))
    return tuple(n * nbytes // total for n in num_blocks)


class SwapSpace:
    """A mirror of the cache in host memory. Group i has `slots[i]` blocks; a slot holds what a block of all the
    group's layers holds.

    A slot that is let go of keeps its contents under their hash until it is needed, so that what has not changed is
    not copied twice. `backends` maps device names. Raises BudgetExceeded.
    """

    def __init__(self, pool: KVPool, slots: Sequence[int], backends: Mapping[str, Backend], ledger: Ledger) -> None:
        host = [LayerGroup(g.layers, g.num_kv_heads, g.head_dim, g.window) for g in pool.groups]
        self._cache = pool
        self.pool = KVPool(host, slots, pool.block_size, pool.kv_type, backends, ledger, Kind.SWAP)
        self._backends = backends
        self.allocators = [BlockAllocator(n) for n in slots]
        self.out_blocks = self.out_bytes = self.in_blocks = self.in_bytes = 0

    def save(self, group: int, blocks: Sequence[int], keys: Sequence[bytes | None]) -> list[int]:
        """Slots that hold what these blocks hold; `keys` are the hashes of those that are full. There must be room."""
        allocator = self.allocators[group]
        slots, new = allocator.claim(keys)
        self._copy(group, [blocks[i] for i in new], [slots[i] for i in new], out=True)
        for index in new:
            if (key := keys[index]) is not None:
                allocator.register(slots[index], key)
        self.out_blocks += len(new)
        self.out_bytes += len(new) * self._cache.block_bytes[group]
        return slots

    def restore(self, group: int, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Fill blocks with what slots hold."""
        self._copy(group, blocks, slots, out=False)
        self.in_blocks += len(slots)
        self.in_bytes += len(slots) * self._cache.block_bytes[group]

    def _copy(self, group: int, blocks: Sequence[int], slots: Sequence[int], out: bool) -> None:
        backend = self._backends[self._cache.groups[group].device]
        for block, slot, count in _runs(blocks, slots):
            for layer in self._cache.groups[group].layers:
                cache, mirror = self._cache.layer(layer), self.pool.layer(layer)
                for device, host in ((cache.k, mirror.k), (cache.v, mirror.v)):
                    if out:
                        host[slot : slot + count] = backend.download(device[block : block + count])
                    else:
                        backend.write(host[slot : slot + count], device[block : block + count])

    def close(self) -> None:
        """Give the memory back."""
        self.pool.close()


def _runs(blocks: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first block, first slot, count) where both go on by one."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or (blocks[end], slots[end]) != (blocks[end - 1] + 1, slots[end - 1] + 1):
            yield blocks[start], slots[start], end - start
            start = end

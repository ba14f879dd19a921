"""The blocks of one layer group: reference counts, free blocks, and the index of cached ones.

Slots of swap space are blocks too.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence


class BlockAllocator:
    """Hands out blocks. A block that is let go of stays cached under its hash, if it has one, until it is needed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.limit = num_blocks  # blocks from here on must not be used
        self.refs = array("i", bytes(4 * num_blocks))
        self.fresh = 0  # blocks from here on have no memory behind them yet
        self.free: list[int] = []  # used before, worth nothing
        self.cached: OrderedDict[int, None] = OrderedDict()  # unreferenced but hashed, the next to evict first
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return self.limit - self.fresh + len(self.free) + len(self.cached)

    @property
    def in_use(self) -> int:
        """Blocks that somebody holds."""
        return self.limit - self.available

    def take(self) -> int:
        """A block of one's own. The least recently used cached block is evicted when no other is left."""
        if self.free:
            block = self.free.pop()
        elif self.fresh < self.limit:
            block = self.fresh
            self.fresh += 1
        else:
            block, _ = self.cached.popitem(last=False)
            self._forget(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that is in use or cached."""
        if self.refs[block] == 0:
            del self.cached[block]
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if block in self.hash_of:
                self.cached[block] = None
            else:
                self.free.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Make a full block findable by its hash, unless another block with the same contents already is."""
        if key not in self.block_of and block not in self.hash_of:
            self.block_of[key] = block
            self.hash_of[block] = key

    def claim(self, keys: Sequence[bytes | None]) -> tuple[list[int], list[int]]:
        """A block for each of these contents, shared where one exists. There must be as many blocks available.

        Returns the blocks, and the positions of those that are new and not filled yet.
        """
        blocks = [-1 if key is None else self.block_of.get(key, -1) for key in keys]
        for block in blocks:
            if block >= 0:
                self.share(block)
        new = [index for index, block in enumerate(blocks) if block < 0]
        for index in new:
            blocks[index] = self.take()
        return blocks, new

    def set_limit(self, limit: int) -> dict[int, int]:
        """Use the first `limit` blocks only, which must be at least as many as are in use.

        Returns the moves that takes, from block to block: their contents must be copied before anything is written.
        """
        assert self.in_use <= limit <= self.num_blocks
        held = [block for block in range(limit, self.fresh) if self.refs[block]]
        for block in [block for block in self.cached if block >= limit]:
            del self.cached[block]
            self._forget(block)
        self.free = [block for block in self.free if block < limit]
        self.limit, self.fresh = limit, min(self.fresh, limit)
        moves = {}
        for block in held:
            moves[block] = target = self.take()
            self.refs[target], self.refs[block] = self.refs[block], 0
            if key := self.hash_of.pop(block, None):
                self.hash_of[target], self.block_of[key] = key, target
        return moves

    def _forget(self, block: int) -> None:
        del self.block_of[self.hash_of.pop(block)]

    def check(self, expected: Mapping[int, int]) -> None:
        """Raise AssertionError unless every block is either referenced as `expected` or in exactly one free place."""
        unused = Counter([*self.free, *self.cached, *range(self.fresh, self.limit)])
        assert not any(self.refs[self.limit :]), "a block over the limit is held"
        for block in range(self.limit):
            refs, wanted = self.refs[block], expected.get(block, 0)
            assert refs == wanted, f"block {block} has {refs} references, {wanted} are held"
            assert unused[block] == (refs == 0), f"block {block} ({refs} references) is in {unused[block]} free places"
        assert set(expected) <= set(range(self.limit)), "a block that does not exist is held"
        assert {key: block for block, key in self.hash_of.items()} == self.block_of, "the hash index is inconsistent"
        assert all(block in self.hash_of for block in self.cached), "a cached block has no hash"
        assert not any(block in self.hash_of for block in self.free), "a free block still has a hash"

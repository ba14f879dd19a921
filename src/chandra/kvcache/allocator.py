"""The blocks of one layer group: reference counts, free blocks, and the index of cached ones."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping


class BlockAllocator:
    """Hands out blocks. A block that is let go of stays cached under its hash, if it has one, until it is needed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = array("i", bytes(4 * num_blocks))
        self.fresh = 0  # blocks from here on were never used
        self.free: list[int] = []  # used before, worth nothing
        self.cached: OrderedDict[int, None] = OrderedDict()  # unreferenced but hashed, the next to evict first
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return self.num_blocks - self.fresh + len(self.free) + len(self.cached)

    def take(self) -> int:
        """A block of one's own. The least recently used cached block is evicted when no other is left."""
        if self.free:
            block = self.free.pop()
        elif self.fresh < self.num_blocks:
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

    def drop_cached(self) -> int:
        """Forget the contents of all unreferenced blocks; how many there were."""
        dropped = list(self.cached)
        self.cached.clear()
        for block in dropped:
            self._forget(block)
        self.free += dropped
        return len(dropped)

    def _forget(self, block: int) -> None:
        del self.block_of[self.hash_of.pop(block)]

    def check(self, expected: Mapping[int, int]) -> None:
        """Raise AssertionError unless every block is either referenced as `expected` or in exactly one free place."""
        unused = Counter([*self.free, *self.cached, *range(self.fresh, self.num_blocks)])
        for block in range(self.num_blocks):
            refs, wanted = self.refs[block], expected.get(block, 0)
            assert refs == wanted, f"block {block} has {refs} references, {wanted} are held"
            assert unused[block] == (refs == 0), f"block {block} ({refs} references) is in {unused[block]} free places"
        assert set(expected) <= set(range(self.num_blocks)), "a block that does not exist is held"
        assert {key: block for block, key in self.hash_of.items()} == self.block_of, "the hash index is inconsistent"
        assert all(block in self.hash_of for block in self.cached), "a cached block has no hash"
        assert not any(block in self.hash_of for block in self.free), "a free block still has a hash"

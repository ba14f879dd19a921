"""Block tables of the sequences, and the prefix cache.

Blocks are shared only when full, and full blocks are never written again, so nothing is ever copied. The prefix cache
finds a full block by the hash of its tokens and all before them (as in vLLM and SGLang's radix cache). A preempted
sequence's table can wait in swap space: its rows then name slots there.
"""

from __future__ import annotations

from _blake2 import blake2b  # hashlib would load OpenSSL: 4 MB
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from chandra.kvcache.allocator import BlockAllocator
from chandra.kvcache.layout import LayerGroup
from chandra.kvcache.pool import KVPool
from chandra.kvcache.swap import SwapSpace
from chandra.ops.contracts import IntArray


class BlockTable:
    """Where one sequence's tokens live. `rows` `(groups, max_blocks)`: entries before `held[g]` were released (-1),
    entries from `num_blocks` on are not there yet (-1)."""

    def __init__(self, groups: int, max_blocks: int, root: bytes) -> None:
        self.rows: IntArray = np.full((groups, max_blocks), -1, dtype=np.int32)
        self.num_blocks = 0
        self.held = [0] * groups
        self.version = 0  # counts changes of `rows`
        self.root = root  # hash of what is before the first block: the salt
        self.hashes: list[bytes] = []  # of full blocks, as far as known
        self.registered = 0  # full blocks that have been offered to the prefix cache
        self.num_tokens = 0  # tokens whose keys and values are in the cache


class BlockManager:
    """Gives sequences their blocks in every layer group. All groups have blocks of the same number of tokens.

    `max_blocks` bounds the table of one sequence (blocks of the context length).
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_blocks: Sequence[int],
        block_size: int,
        max_blocks: int,
        prefix_caching: bool = True,
        swap: SwapSpace | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.prefix_caching = prefix_caching
        self.allocators = [BlockAllocator(n) for n in num_blocks]
        self.swap = swap
        self.tables: dict[int, BlockTable] = {}
        self.swapped: dict[int, BlockTable] = {}
        self.queries = 0  # prompt tokens looked up in the prefix cache
        self.hits = 0  # of these, found

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, in the fullest group."""
        return max(a.in_use / a.limit for a in self.allocators)

    def allocate(self, seq_id: int, token_ids: IntArray, salt: bytes = b"", reuse: bool = True) -> int:
        """Start a sequence's table. Returns how many leading tokens are already in the cache (never all of them).

        `salt` names whatever else keys and values depend on (an adapter). `reuse`: look in the prefix cache.
        """
        assert seq_id not in self.tables, f"sequence {seq_id} already has a table"
        table = BlockTable(len(self.groups), self.max_blocks, blake2b(salt, digest_size=16).digest())
        self.tables[seq_id] = table
        if self.prefix_caching and reuse:
            full = self._longest_prefix(table, token_ids)
            first = [self._first_visible(group, full * self.block_size) for group in self.groups]
            found = [
                [allocator.block_of[key] for key in table.hashes[start:full]]
                for allocator, start in zip(self.allocators, first, strict=True)
            ]
            self._adopt(table, full, found)
            self.queries += len(token_ids)
            self.hits += table.num_tokens
        return table.num_tokens

    def append(self, seq_id: int, num_tokens: int) -> bool:
        """Make room for `num_tokens` in all, releasing blocks that left the window of the next token to be written.

        False, with nothing taken, if there are too few blocks.
        """
        table = self.tables[seq_id]
        wanted = -(-num_tokens // self.block_size)
        if wanted <= table.num_blocks:
            return True
        self._leave_window(table)
        missing = wanted - table.num_blocks
        if any(allocator.available < missing for allocator in self.allocators):
            for other in self.tables.values():  # those that have long had room for their next token
                self._leave_window(other)
        if any(allocator.available < missing for allocator in self.allocators):
            return False
        for group, (allocator, row) in enumerate(zip(self.allocators, table.rows, strict=True)):
            row[table.num_blocks : wanted] = taken = [allocator.take() for _ in range(missing)]
            if self.swap is not None:
                self.swap.reuse(group, taken)
        table.num_blocks = wanted
        table.version += 1
        return True

    def has_room(self, seq_id: int, num_tokens: int, chunk: int, spare: int) -> bool:
        """Whether the sequence could grow to `num_tokens`, in chunks, and leave `spare` blocks in every group."""
        table = self.tables.get(seq_id)
        return all(
            group.max_blocks(num_tokens, chunk, self.block_size) - (table.num_blocks - table.held[i] if table else 0)
            <= allocator.available - spare
            for i, (group, allocator) in enumerate(zip(self.groups, self.allocators, strict=True))
        )

    def commit(self, seq_id: int, token_ids: IntArray, num_tokens: int) -> None:
        """Note that the first `num_tokens` of `token_ids` are in the cache; blocks that became full can be shared."""
        table = self.tables[seq_id]
        table.num_tokens = num_tokens
        full = num_tokens // self.block_size
        if full == table.registered or not self.prefix_caching:
            return
        self._hash(table, token_ids, full)
        for group, allocator in enumerate(self.allocators):
            first = max(table.registered, table.held[group])
            for block, key in zip(table.rows[group, first:full].tolist(), table.hashes[first:full], strict=True):
                allocator.register(block, key)
        table.registered = full

    def fork(self, parent: int, child: int, num_tokens: int) -> int:
        """Start `child`'s table with the full blocks among the parent's first `num_tokens`, less the last token.

        Returns how many tokens they hold: 0 where the parent no longer has a block inside the window.
        """
        source = self.tables[parent]
        full = min((num_tokens - 1) // self.block_size, source.num_tokens // self.block_size)
        table = BlockTable(len(self.groups), self.max_blocks, source.root)
        table.hashes = source.hashes[:full]
        self.tables[child] = table
        first = [self._first_visible(group, full * self.block_size) for group in self.groups]
        if full > 0 and all(held <= start for held, start in zip(source.held, first, strict=True)):
            self._adopt(table, full, [row[i:full].tolist() for row, i in zip(source.rows, first, strict=True)])
        return table.num_tokens

    def free(self, seq_id: int) -> None:
        """End a sequence's table, if it has one. Its last blocks are evicted first, so that shorter prefixes live
        longer."""
        if table := self.tables.pop(seq_id, None):
            self._release(table, self.allocators)
        elif self.swap is not None and (table := self.swapped.pop(seq_id, None)):
            self._release(table, self.swap.allocators)

    def swap_out(self, seq_id: int, token_ids: IntArray) -> bool:
        """Move a sequence's table to swap space. False, with nothing moved, if that has no room or nothing is computed.

        What the table holds beyond the tokens that are in the cache is dropped.
        """
        table = self.tables[seq_id]
        full, used = table.num_tokens // self.block_size, -(-table.num_tokens // self.block_size)
        if self.swap is None or not used:
            return False
        if any(s.available < used - held for s, held in zip(self.swap.allocators, table.held, strict=True)):
            return False
        self._hash(table, token_ids, full)
        rows = np.full_like(table.rows, -1)
        for group, start in enumerate(table.held):
            keys = [*table.hashes[start:full], *([None] if used > max(start, full) else [])]
            rows[group, start:used] = self.swap.save(group, table.rows[group, start:used].tolist(), keys)
        self._release(table, self.allocators)
        table.rows, table.num_blocks = rows, used
        self.swapped[seq_id] = self.tables.pop(seq_id)
        return True

    def swap_in(self, seq_id: int) -> bool:
        """Bring a table back from swap space. False, with nothing moved, if there are too few blocks."""
        table, swap = self.swapped[seq_id], self.swap
        assert swap is not None
        if any(a.available < table.num_blocks - held for a, held in zip(self.allocators, table.held, strict=True)):
            return False
        rows, full = np.full_like(table.rows, -1), table.num_tokens // self.block_size
        for group, (allocator, start) in enumerate(zip(self.allocators, table.held, strict=True)):
            slots = table.rows[group, start : table.num_blocks].tolist()
            keys = [*table.hashes[start:full], *([None] if table.num_blocks > max(start, full) else [])]
            blocks, new = allocator.claim(keys)
            swap.restore(group, [slots[i] for i in new], [blocks[i] for i in new])
            for block, key in zip(blocks, keys, strict=True):
                if key is not None and self.prefix_caching:
                    allocator.register(block, key)
            rows[group, start : table.num_blocks] = blocks
        self._release(table, swap.allocators)
        table.rows, table.version = rows, table.version + 1
        self.tables[seq_id] = self.swapped.pop(seq_id)
        return True

    def set_limit(self, pool: KVPool, group: int, limit: int) -> None:
        """Use only the first `limit` blocks of a group, at least as many as are in use, and give the memory of the
        others back; or use more again. `pool`: the cache's memory, or that of the swap space.

        Raises BudgetExceeded, and changes nothing, if the device has no room for more.
        """
        swap = self.swap if self.swap is not None and pool is self.swap.pool else None
        tables, allocators = (self.swapped, swap.allocators) if swap else (self.tables, self.allocators)
        if self.swap is not None:
            self.swap.settle()
        if limit > allocators[group].limit:
            pool.resize(group, limit)
        moves = allocators[group].set_limit(limit)
        if limit < pool.num_blocks[group]:
            pool.resize(group, limit, moves)
        for table in tables.values() if moves else ():
            row = table.rows[group]
            for index in np.flatnonzero(row >= limit):
                row[index] = moves[int(row[index])]
            table.version += 1

    def check_integrity(self) -> None:
        """Recompute who holds what. Raises AssertionError where the books are wrong."""
        self._check(self.tables, self.allocators)
        if self.swap is not None:
            self._check(self.swapped, self.swap.allocators)

    def _check(self, tables: Mapping[int, BlockTable], allocators: Sequence[BlockAllocator]) -> None:
        for group, allocator in enumerate(allocators):
            held: Counter[int] = Counter()
            for seq_id, table in tables.items():
                row, start, full = table.rows[group], table.held[group], table.num_tokens // self.block_size
                blocks = row[start : table.num_blocks].tolist()
                assert {-1}.issuperset([*row[:start].tolist(), *row[table.num_blocks :].tolist()]), f"{seq_id}: stray"
                assert len(set(blocks)) == len(blocks), f"sequence {seq_id} holds a block twice"
                held.update(blocks)
                for index, block in enumerate(blocks, start):
                    shared = allocator.refs[block] > 1 or block in allocator.hash_of
                    assert not shared or index < full, f"sequence {seq_id} shares block {block}, which is not full"
                    key = allocator.hash_of.get(block)
                    assert key is None or key == table.hashes[index], f"block {block} is cached under a wrong hash"
            allocator.check(held)

    def _release(self, table: BlockTable, allocators: Sequence[BlockAllocator]) -> None:
        for row, held, allocator in zip(table.rows, table.held, allocators, strict=True):
            for block in reversed(row[held : table.num_blocks].tolist()):
                allocator.release(block)

    def _first_visible(self, group: LayerGroup, position: int) -> int:
        """The first block that the token at `position` sees."""
        return 0 if group.window is None else max(0, (position - group.window + 1) // self.block_size)

    def _leave_window(self, table: BlockTable) -> None:
        for index, (group, allocator) in enumerate(zip(self.groups, self.allocators, strict=True)):
            start, stop = table.held[index], self._first_visible(group, table.num_tokens)
            if start < stop:
                for block in table.rows[index, start:stop].tolist():
                    allocator.release(block)
                table.rows[index, start:stop] = -1
                table.held[index] = stop
                table.version += 1

    def _adopt(self, table: BlockTable, full: int, blocks: Sequence[Sequence[int]]) -> None:
        """Let an empty table begin with `full` blocks that exist; `blocks[g]` are those its group g still sees."""
        for index, (allocator, adopted) in enumerate(zip(self.allocators, blocks, strict=True)):
            for block in adopted:
                allocator.share(block)
            table.held[index] = full - len(adopted)
            table.rows[index, table.held[index] : full] = adopted
        table.num_blocks = table.registered = full
        table.num_tokens = full * self.block_size
        table.version += 1

    def _longest_prefix(self, table: BlockTable, token_ids: IntArray) -> int:
        """Full blocks that `token_ids` begin with and that are cached wherever the token after them still sees them."""
        windows = [
            (allocator.block_of, group.window_blocks(self.block_size))
            for group, allocator in zip(self.groups, self.allocators, strict=True)
            if group.window is not None
        ]
        everywhere = [a.block_of for g, a in zip(self.groups, self.allocators, strict=True) if g.window is None]
        runs = [0] * len(windows)  # cached blocks in a row, up to here
        best = 0
        for full in range(1, (len(token_ids) - 1) // self.block_size + 1):
            self._hash(table, token_ids, full)
            key = table.hashes[-1]
            if not all(key in block_of for block_of in everywhere):
                break
            runs = [run + 1 if key in block_of else 0 for run, (block_of, _) in zip(runs, windows, strict=True)]
            if all(run >= min(full, visible) for run, (_, visible) in zip(runs, windows, strict=True)):
                best = full
        return best

    def _hash(self, table: BlockTable, token_ids: IntArray, full: int) -> None:
        """Extend the table's hashes to `full` blocks."""
        size = self.block_size
        for index in range(len(table.hashes), full):
            parent = table.hashes[-1] if table.hashes else table.root
            tokens = token_ids[index * size : (index + 1) * size].tobytes()
            table.hashes.append(blake2b(parent + tokens, digest_size=16).digest())

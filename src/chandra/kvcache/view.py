"""What the decoder sees of the cache during one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chandra.kvcache.block_manager import BlockTable
from chandra.kvcache.pool import KVPool
from chandra.ops.contracts import IntArray, KVLayer, KVTables


def index_bytes(groups: int, sequences: int, context: int, block_size: int, rows: int, logit_rows: int) -> int:
    """Bytes of the int32 arrays that describe steps of up to `rows` tokens of `sequences` running sequences: tokens,
    positions and slots of rows, block tables (a sequence's own and the step's copy), the sequences' tokens."""
    blocks = -(-context // block_size)
    of_rows = rows * (groups + 10) + max(context, rows) + logit_rows  # 8 of them for a moment, in `prepare`
    return 4 * (of_rows + sequences * (2 * groups * blocks + context + 64 + 2))


class BatchView:
    """A `KVView` whose tables are rewritten for every step, in arrays that stay where they are.

    A row of a table is copied only when another sequence or a changed table comes to stand there.
    """

    def __init__(self, pool: KVPool, max_num_seqs: int, max_blocks: int, max_rows: int) -> None:
        self._pool = pool
        groups = len(pool.groups)
        self._tables: IntArray = np.full((groups, max_num_seqs, max_blocks), -1, dtype=np.int32)
        self._slots: IntArray = np.empty((groups, max_rows), dtype=np.int32)
        self._standing: list[tuple[BlockTable, int] | None] = [None] * max_num_seqs
        self._current: list[KVTables] = []

    def prepare(self, tables: Sequence[BlockTable], positions: IntArray, query_start: IntArray) -> None:
        """Point the view at a batch: `tables[i]` and rows `query_start[i]:query_start[i+1]` are sequence i's."""
        for index, table in enumerate(tables):
            standing = self._standing[index]
            if standing is None or standing[0] is not table or standing[1] != table.version:
                self._tables[:, index] = table.rows
                self._standing[index] = (table, table.version)
        size, rows, sequences = self._pool.block_size, len(positions), len(tables)
        blocks, offsets = np.divmod(positions, size)
        owners = np.repeat(np.arange(sequences), np.diff(query_start)) if rows > sequences else np.arange(sequences)
        self._current = []
        for table_rows, slots in zip(self._tables, self._slots, strict=True):
            np.multiply(table_rows[owners, blocks], size, out=slots[:rows])
            slots[:rows] += offsets
            self._current.append(KVTables(table_rows[:sequences], slots[:rows]))

    def layer(self, index: int) -> KVLayer:
        return self._pool.layer(index)

    def tables(self, index: int) -> KVTables:
        return self._current[self._pool.group_of[index]]

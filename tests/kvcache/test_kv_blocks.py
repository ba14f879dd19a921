"""The block manager: directed cases, and random operations against a model of what every block holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from chandra.kvcache import BlockManager, LayerGroup

SIZE = 4
FULL, WINDOW = LayerGroup((0,), 1, 8), LayerGroup((1,), 1, 8, window=9)


def tokens(*ids: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(ids, dtype=np.int32)


def fill(manager: BlockManager, seq_id: int, ids: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    """Allocate and compute a whole sequence; how much of it was cached."""
    cached = manager.allocate(seq_id, ids)
    assert manager.append(seq_id, len(ids))
    manager.commit(seq_id, ids, len(ids))
    manager.check_integrity()
    return cached


def test_a_prefix_is_found_again_but_never_all_of_a_prompt() -> None:
    manager = BlockManager([FULL], [8], SIZE, 8)
    assert fill(manager, 0, tokens(*range(12))) == 0
    assert fill(manager, 1, tokens(*range(12))) == 8  # the last token must be computed
    assert fill(manager, 2, tokens(*range(8), 99, 98)) == 8
    assert manager.tables[0].rows[0, :2].tolist() == manager.tables[2].rows[0, :2].tolist()
    assert (manager.queries, manager.hits) == (34, 16)


def test_a_salt_keeps_prefixes_apart() -> None:
    manager = BlockManager([FULL], [8], SIZE, 8)
    fill(manager, 0, tokens(*range(8)))
    assert manager.allocate(1, tokens(*range(8)), salt=b"adapter") == 0
    assert manager.allocate(2, tokens(*range(8)), reuse=False) == 0
    assert manager.allocate(3, tokens(*range(8))) == 4


def test_the_tail_of_the_least_recently_used_prefix_is_evicted_first() -> None:
    manager = BlockManager([FULL], [6], SIZE, 6)
    fill(manager, 0, tokens(*range(12)))
    manager.free(0)
    fill(manager, 1, tokens(*range(100, 112)))
    manager.free(1)
    fill(manager, 2, tokens(200, 201, 202, 203, 204))  # evicts two blocks of sequence 0
    assert manager.allocate(3, tokens(*range(12), 0)) == 4
    assert manager.allocate(4, tokens(*range(100, 112), 0)) == 12
    manager.check_integrity()


def test_append_takes_nothing_when_one_group_is_short() -> None:
    manager = BlockManager([FULL, WINDOW], [8, 2], SIZE, 8)
    manager.allocate(0, tokens(*range(20)))
    assert not manager.append(0, 12)
    assert manager.append(0, 8)
    manager.check_integrity()


@pytest.mark.parametrize("chunk", [8, 16, 32])
def test_sequences_after_one_another_never_run_out_of_what_is_planned(chunk: int) -> None:
    """One that has had its chunk may hold more than its window for as long as it needs no new block."""
    context, sequences = 64, 4
    counts = [group.max_blocks(context, chunk, SIZE, sequences) for group in (FULL, WINDOW)]
    manager = BlockManager([FULL, WINDOW], counts, SIZE, context // SIZE)
    for seq_id in range(sequences):
        ids = np.arange(context, dtype=np.int32) + 1000 * seq_id
        manager.allocate(seq_id, ids)
        for end in range(chunk, context + 1, chunk):
            assert manager.append(seq_id, end)
            manager.commit(seq_id, ids, end)
            manager.check_integrity()


def test_window_groups_hold_only_the_window_and_a_chunk() -> None:
    manager = BlockManager([FULL, WINDOW], [100, 3], SIZE, 100)
    ids = np.arange(400, dtype=np.int32)
    manager.allocate(0, ids)
    for end in [*range(4, 200, 4), *range(197, 400)]:  # chunks of a block, then decodes
        assert manager.append(0, end)
        manager.commit(0, ids, end)
        manager.check_integrity()
    row = manager.tables[0].rows[1]
    assert (row[:97] == -1).all()
    assert (row[97:] >= 0).all()
    assert WINDOW.max_blocks(400, 4, SIZE) == 3


def test_a_prefix_hit_needs_the_window_before_it() -> None:
    manager = BlockManager([FULL, WINDOW], [100, 4], SIZE, 100)
    ids = np.arange(40, dtype=np.int32)
    manager.allocate(0, ids)
    for end in range(4, 41, 4):
        assert manager.append(0, end)
        manager.commit(0, ids, end)
    manager.free(0)
    assert manager.allocate(1, tokens(*range(40), 0)) == 40
    assert manager.tables[1].rows[1, :8].tolist() == [-1] * 8
    manager.check_integrity()
    manager.free(1)
    assert manager.allocate(2, tokens(*range(12), 0)) == 0  # its window blocks are gone, though the full ones are not
    manager.check_integrity()


@pytest.mark.parametrize("caching", [True, False])
def test_a_fork_shares_the_full_blocks_of_the_prompt(caching: bool) -> None:
    manager = BlockManager([FULL, WINDOW], [20, 20], SIZE, 20, prefix_caching=caching)
    fill(manager, 0, tokens(*range(14)))
    assert manager.fork(0, 1, 14) == 12
    assert manager.tables[1].rows[:, :3].tolist() == [[0, 1, 2], [-1, 1, 2]]
    assert manager.append(1, 14)
    manager.check_integrity()
    manager.free(0)
    manager.check_integrity()
    assert manager.append(1, 40)
    manager.commit(1, tokens(*range(40)), 40)
    assert manager.append(1, 41)
    assert manager.fork(1, 2, 14) == 0  # the window has moved on
    manager.check_integrity()


def test_integrity_check_notices_wrong_books() -> None:
    manager = BlockManager([FULL], [8], SIZE, 8)
    fill(manager, 0, tokens(*range(8)))
    fill(manager, 1, tokens(*range(50, 58)))
    manager.tables[1].rows[0, 1] = manager.tables[0].rows[0, 1]
    with pytest.raises(AssertionError):
        manager.check_integrity()


class Operations(RuleBasedStateMachine):
    """Random operations. `memory` is what the blocks would hold: at each slot, the tokens its key depends on."""

    sequences: Bundle[int] = Bundle("sequences")

    @initialize(blocks=st.integers(4, 14), window_blocks=st.integers(4, 14), caching=st.booleans())
    def setup(self, blocks: int, window_blocks: int, caching: bool) -> None:
        self.manager = BlockManager([FULL, WINDOW], [blocks, window_blocks], SIZE, 16, caching)
        self.memory: list[dict[int, tuple[int, ...]]] = [{}, {}]
        self.texts: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(target=sequences, ids=st.lists(st.integers(0, 1), min_size=1, max_size=30), salt=st.sampled_from([b"", b"x"]))
    def allocate(self, ids: list[int], salt: bytes) -> int:
        self.next_id += 1
        cached = self.manager.allocate(self.next_id, tokens(*ids), salt)
        assert cached < len(ids)
        assert cached % SIZE == 0
        self.texts[self.next_id] = [len(salt), *ids]
        return self.next_id

    @rule(seq=sequences, count=st.integers(1, 12), ids=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def compute(self, seq: int, count: int, ids: list[int]) -> None:
        table, text = self.manager.tables[seq], self.texts[seq]
        start = table.num_tokens
        end = min(start + count, 16 * SIZE)
        before = [allocator.available for allocator in self.manager.allocators]
        if not self.manager.append(seq, end):
            after = [allocator.available for allocator in self.manager.allocators]
            assert all(a >= b for a, b in zip(after, before, strict=True))  # only the window's blocks were let go
            return
        text += ids[: max(0, end + 1 - len(text))]
        for row, memory in zip(table.rows, self.memory, strict=True):
            for position in range(start, end):
                memory[int(row[position // SIZE]) * SIZE + position % SIZE] = tuple(text[: position + 2])
        self.manager.commit(seq, tokens(*text[1:]), end)

    @rule(target=sequences, parent=sequences, data=st.data())
    def fork(self, parent: int, data: st.DataObject) -> int:
        text = self.texts[parent]
        length = data.draw(st.integers(1, len(text) - 1))
        self.next_id += 1
        assert self.manager.fork(parent, self.next_id, length) < length
        self.texts[self.next_id] = text[: length + 1]
        return self.next_id

    @rule(seq=consumes(sequences))
    def free(self, seq: int) -> None:
        self.manager.free(seq)
        del self.texts[seq]

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check_integrity()

    @invariant()
    def every_visible_token_is_where_the_table_says(self) -> None:
        for seq, text in self.texts.items():
            table = self.manager.tables[seq]
            for group, row, memory in zip((FULL, WINDOW), table.rows, self.memory, strict=True):
                start = 0 if group.window is None else max(0, table.num_tokens - group.window + 1)
                for position in range(start, table.num_tokens):
                    slot = int(row[position // SIZE]) * SIZE + position % SIZE
                    assert memory[slot] == tuple(text[: position + 2])


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)

"""Swap space and a pool that shrinks: random operations against what every token's key must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from chandra.backends import make_backend
from chandra.errors import BudgetExceeded
from chandra.kvcache import BlockManager, KVPool, LayerGroup, SwapSpace, swap_slots
from chandra.memory.device import Device
from chandra.memory.host import resident_bytes
from chandra.memory.ledger import Kind, Ledger

SIZE, MIB = 4, 1 << 20
DEVICES = [Device("cpu", "cpu", 64 * MIB), Device("virtual:0", "virtual", 64 * MIB)]
Ids = np.ndarray[Any, np.dtype[np.int32]]


class Cache:
    """A pool, its swap space and its books. Layers 0 and 2 see everything, layer 1 a window."""

    def __init__(self, blocks: tuple[int, int], slots: tuple[int, int], device: str, caching: bool = True) -> None:
        self.groups = [LayerGroup((0, 2), 1, 2, None, device), LayerGroup((1,), 1, 2, 9, device)]
        self.ledger = Ledger(DEVICES)
        self.backends = {d.name: make_backend(d) for d in DEVICES}
        self.pool = KVPool(self.groups, blocks, SIZE, "f32", self.backends, self.ledger)
        self.swap = SwapSpace(self.pool, slots, self.backends, self.ledger)
        self.manager = BlockManager(self.groups, blocks, SIZE, 16, caching, self.swap)

    def write(self, seq: int, position: int, value: float) -> None:
        for group, layers in ((0, (0, 2)), (1, (1,))):
            block = int(self.manager.tables[seq].rows[group, position // SIZE])
            for layer in layers:
                cache = self.pool.layer(layer)
                cache.k[block, 0, position % SIZE] = value + layer
                cache.v[block, 0, position % SIZE] = -value - layer

    def holds(self, seq: int, position: int, value: float) -> bool:
        table = self.manager.tables[seq]
        for group, layers in ((0, (0, 2)), (1, (1,))):
            if group == 1 and position <= table.num_tokens - 9:
                continue
            block = int(table.rows[group, position // SIZE])
            for layer in layers:
                cache = self.pool.layer(layer)
                k, v = cache.k[block, 0, position % SIZE], cache.v[block, 0, position % SIZE]
                if not ((k == value + layer).all() and (v == -value - layer).all()):
                    return False
        return True

    def scribble(self) -> None:
        """Spoil what stands in blocks and slots that nobody holds or could find again."""
        self.swap.settle()
        books = ((self.pool, self.manager.allocators), (self.swap.pool, self.swap.allocators))
        for pool, allocators in books:
            for group, allocator in enumerate(allocators):
                unused = [*allocator.free, *range(allocator.fresh, pool.num_blocks[group])]
                for layer in pool.groups[group].layers:
                    pool.layer(layer).k[unused] = np.nan
                    pool.layer(layer).v[unused] = np.nan

    def set_limits(self, limits: tuple[int, int]) -> None:
        for group, limit in enumerate(limits):
            self.manager.set_limit(self.pool, group, limit)

    def fill(self, seq: int, ids: Ids) -> None:
        start = self.manager.allocate(seq, ids)
        assert self.manager.append(seq, len(ids))
        for position in range(start, len(ids)):
            self.write(seq, position, float(position + 1000 * seq))
        self.manager.commit(seq, ids, len(ids))


def ids(count: int, first: int = 0) -> Ids:
    return np.arange(first, first + count, dtype=np.int32)


@pytest.mark.parametrize("device", ["cpu", "virtual:0"])
def test_a_shared_prefix_is_copied_once_and_found_again(device: str) -> None:
    cache = Cache((8, 8), (8, 8), device)
    manager, swap = cache.manager, cache.swap
    for seq in (0, 1):
        cache.fill(seq, ids(10))
    assert manager.swap_out(0, ids(10))
    assert manager.swap_out(1, ids(10))
    manager.check_integrity()
    assert swap.out_blocks == 2 * (2 + 2)  # two shared full blocks, and the last one of each, in both groups
    assert swap.out_bytes == 4 * SIZE * (cache.groups[0].token_bytes("f32") + cache.groups[1].token_bytes("f32"))
    assert manager.swap_in(0)
    assert swap.in_blocks == 2  # the full blocks still stand in the cache under their hashes
    assert manager.swap_in(1)
    manager.check_integrity()
    assert manager.tables[0].rows[0, :2].tolist() == manager.tables[1].rows[0, :2].tolist()
    assert all(cache.holds(1, p, p) for p in range(8))
    assert all(cache.holds(1, p, p + 1000) for p in (8, 9))
    before = swap.out_blocks
    assert manager.swap_out(0, ids(10))
    assert swap.out_blocks == before + 2  # full ones were still there


def test_what_comes_back_can_be_shared_again() -> None:
    cache = Cache((6, 6), (8, 8), "cpu")
    cache.fill(0, ids(12))
    assert cache.manager.swap_out(0, ids(12))
    cache.fill(1, ids(24, 100))  # evicts all of it
    cache.manager.free(1)
    cache.scribble()
    assert cache.manager.swap_in(0)
    assert cache.swap.in_blocks == 6
    assert all(cache.holds(0, p, p) for p in range(12))
    assert cache.manager.allocate(2, ids(13)) == 12
    cache.manager.check_integrity()


def test_shared_and_cached_blocks_are_moved_as_such() -> None:
    cache = Cache((12, 12), (0, 0), "cpu")
    cache.fill(0, ids(20))
    cache.fill(1, ids(12, 100))
    assert cache.manager.fork(1, 2, 12) == 8
    cache.manager.free(0)
    cache.set_limits((4, 4))
    cache.manager.check_integrity()
    cache.scribble()
    for seq in (1, 2):
        assert all(cache.holds(seq, p, p + 1000) for p in range(8))
    cache.manager.free(2)
    cache.manager.check_integrity()
    assert cache.manager.allocate(3, ids(12, 100)) == 8  # it can still be found


def test_no_room_moves_nothing() -> None:
    cache = Cache((8, 8), (3, 3), "cpu")
    manager = cache.manager
    cache.fill(0, ids(16))
    assert not manager.swap_out(0, ids(16))
    cache.fill(1, ids(12, 100))
    assert manager.swap_out(1, ids(12, 100))
    cache.fill(2, ids(16, 200))
    assert not manager.swap_in(1)
    manager.check_integrity()
    manager.free(1)
    manager.free(0)
    assert manager.allocate(3, ids(4)) == 0
    assert not manager.swap_out(3, ids(4))  # nothing is computed
    manager.check_integrity()


def test_a_shrunk_pool_gives_bytes_back_and_grows_again() -> None:
    for device in DEVICES:
        cache = Cache((8, 8), (0, 0), device.name)
        cache.fill(0, ids(12))
        cache.fill(1, ids(12, 100))
        cache.manager.free(0)
        full = cache.pool.nbytes
        cache.set_limits((3, 3))
        cache.manager.check_integrity()
        assert cache.pool.nbytes == full * 3 // 8
        assert all(cache.holds(1, p, p + 1000) for p in range(12))
        assert not cache.manager.append(1, 13)
        cache.set_limits((8, 8))
        assert cache.pool.nbytes == full
        assert all(cache.holds(1, p, p + 1000) for p in range(12))
        assert cache.manager.append(1, 13)
        cache.manager.check_integrity()


def test_growing_needs_room_on_the_device() -> None:
    cache = Cache((8, 8), (0, 0), "cpu")
    cache.set_limits((3, 3))
    taken = cache.ledger.reserve("cpu", Kind.WEIGHTS, cache.ledger.free("cpu") - 100)
    with pytest.raises(BudgetExceeded):
        cache.pool.resize(0, 8)
    taken.release()
    cache.pool.resize(0, 8)


def test_memory_behind_unused_blocks_returns_to_the_system() -> None:
    group = LayerGroup((0,), 8, 64)
    ledger = Ledger([Device("cpu", "cpu", 1 << 30)])
    pool = KVPool([group], [1000], 16, "f32", {"cpu": make_backend(DEVICES[0])}, ledger)
    pool.layer(0).k[:] = 1
    pool.layer(0).v[:] = 1
    before, _ = resident_bytes()
    pool.resize(0, 250)
    after, _ = resident_bytes()
    assert before - after > 0.7 * 1000 * pool.block_bytes[0]
    assert (pool.layer(0).k[:250] == 1).all()
    assert (pool.layer(0).k[251:999] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 3.0])
def test_slots_are_a_share_of_the_blocks_within_the_budget(share: float) -> None:
    groups, blocks = [LayerGroup((0, 1), 2, 64), LayerGroup((2,), 2, 64, 100)], [50, 9]
    total = sum(n * 16 * g.token_bytes("f16") for g, n in zip(groups, blocks, strict=True))
    slots = swap_slots(groups, blocks, "f16", 16, int(share * total))
    assert sum(n * 16 * g.token_bytes("f16") for g, n in zip(groups, slots, strict=True)) <= share * total
    assert all(share * n - 1.01 <= s <= share * n for s, n in zip(slots, blocks, strict=True))


class Swapping(RuleBasedStateMachine):
    """Random operations. Each token's key is a number that stands for all tokens up to it."""

    running: Bundle[int] = Bundle("running")
    swapped: Bundle[int] = Bundle("swapped")

    @initialize(
        blocks=st.tuples(st.integers(4, 14), st.integers(4, 14)),
        slots=st.tuples(st.integers(0, 12), st.integers(0, 12)),
        device=st.sampled_from(["cpu", "virtual:0"]),
        caching=st.booleans(),
    )
    def setup(self, blocks: tuple[int, int], slots: tuple[int, int], device: str, caching: bool) -> None:
        self.cache = Cache(blocks, slots, device, caching)
        self.manager = self.cache.manager
        self.texts: dict[int, list[int]] = {}
        self.numbers: dict[tuple[int, ...], int] = {}
        self.next_id = 0

    def number(self, seq: int, position: int) -> int:
        return self.numbers.setdefault(tuple(self.texts[seq][: position + 1]), len(self.numbers))

    @rule(target=running, text=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    def allocate(self, text: list[int]) -> int:
        self.next_id += 1
        self.manager.allocate(self.next_id, np.array(text, np.int32))
        self.texts[self.next_id] = text
        return self.next_id

    @rule(seq=running, count=st.integers(1, 12), more=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def compute(self, seq: int, count: int, more: list[int]) -> None:
        text = self.texts[seq]
        start = self.manager.tables[seq].num_tokens
        end = min(start + count, 16 * SIZE)
        if not self.manager.append(seq, end):
            return
        text += more[: max(0, end - len(text))]
        for position in range(start, end):
            self.cache.write(seq, position, self.number(seq, position))
        self.manager.commit(seq, np.array(text, np.int32), end)

    @rule(target=running, parent=running, data=st.data())
    def fork(self, parent: int, data: st.DataObject) -> int:
        length = data.draw(st.integers(1, len(self.texts[parent])))
        self.next_id += 1
        self.manager.fork(parent, self.next_id, length)
        self.texts[self.next_id] = self.texts[parent][:length]
        return self.next_id

    @rule(target=swapped, seq=consumes(running), beyond=st.integers(0, 8))
    def swap_out(self, seq: int, beyond: int) -> Any:
        self.compute(seq, 9, [0, 1] * 6)
        tokens = self.manager.tables[seq].num_tokens
        self.manager.append(seq, min(tokens + beyond, 16 * SIZE))  # of a chunk that was chosen and not computed
        if self.manager.swap_out(seq, np.array(self.texts[seq], np.int32)):
            return seq
        self.manager.free(seq)
        return multiple()

    @rule(target=running, seq=consumes(swapped))
    def swap_in(self, seq: int) -> Any:
        if self.manager.swap_in(seq):
            return seq
        self.manager.free(seq)
        return multiple()

    @rule(seq=consumes(running))
    def free(self, seq: int) -> None:
        self.manager.free(seq)

    @rule(seq=consumes(swapped))
    def abort(self, seq: int) -> None:
        self.manager.free(seq)

    @rule(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def resize(self, shares: tuple[float, float]) -> None:
        for group, share in enumerate(shares):
            for pool, books in ((self.cache.pool, self.manager), (self.cache.swap.pool, self.cache.swap)):
                allocator = books.allocators[group]
                limit = max(1, allocator.in_use, round(share * allocator.num_blocks))
                if limit <= allocator.num_blocks:
                    self.manager.set_limit(pool, group, limit)

    @rule()
    def flush(self) -> None:
        for group, allocator in enumerate(self.manager.allocators):
            limit = allocator.limit
            for blocks in (max(1, allocator.in_use), limit):
                self.manager.set_limit(self.cache.pool, group, blocks)
        self.cache.scribble()

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check_integrity()

    @invariant()
    def unused_memory_does_not_matter(self) -> None:
        self.cache.scribble()

    @invariant()
    def every_visible_token_has_its_key(self) -> None:
        for seq, table in self.manager.tables.items():
            for position in range(table.num_tokens):
                assert self.cache.holds(seq, position, self.number(seq, position))


TestSwapping = Swapping.TestCase
TestSwapping.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)

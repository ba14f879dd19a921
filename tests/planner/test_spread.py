"""Layers that are brought for each step: spread through their run, and how long a step then takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.memory.plan import spread
from chandra.planner.cost import SLOTS, waiting
from chandra.planner.placement import BALANCE, Offload, Splitter, Tier, disk_sums, spread_sums, stage_bounds

LAYERS = 30


@given(st.integers(0, 90), st.integers(0, 90))
@settings(deadline=None)
def test_layers_lie_evenly_between_the_first_and_the_last(count: int, more: int) -> None:
    among = count + more
    layers = spread(count, among)
    assert len(set(layers)) == count
    assert all(0 <= layer < among for layer in layers)
    if count > 1:
        assert (layers[0], layers[-1]) == (0, among - 1)
        gaps = np.diff(layers)
        assert gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=12), st.integers(0, 12))
@settings(deadline=None, max_examples=40)
def test_sums_over_all_spreads(values: list[int], disk_layers: int) -> None:
    count, array = len(values), np.array(values, np.float64)
    moved, read = spread_sums(array), disk_sums(array, disk_layers, in_run=True)
    first = disk_sums(array, disk_layers, in_run=False)
    for off in range(count + 1):
        on_disk = spread(min(off, disk_layers), off)
        assert first[off] == sum(values[i] for i in on_disk)
        for end in range(off, count + 1):
            layers = spread(off, end)
            assert moved[off, end] == sum(values[i] for i in layers)
            assert read[off, end] == sum(values[layers[i]] for i in on_disk)


def step(streamed: tuple[int, ...], busy: float, copying: float, rest: float) -> float:
    """Seconds of a step in which so many layers are copied."""
    layers = [("link", busy, copying if i in streamed else 0.0) for i in range(LAYERS)]
    return LAYERS * busy + rest + waiting(layers, rest)


@pytest.mark.parametrize("count", [6, 12, 18, 24, 30])
@pytest.mark.parametrize("busy", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("rest", [0.0, 0.5, 2.0])
def test_a_link_that_is_the_limit_is_used(count: int, busy: float, rest: float) -> None:
    computing, copying = LAYERS * busy + rest, float(count)
    seconds = step(spread(count, LAYERS), busy, 1.0, rest)
    assert seconds >= max(computing, copying) - 1e-9
    if copying >= computing:
        assert copying / seconds > 0.9
    else:
        assert computing / seconds > 0.9
    assert seconds <= step(tuple(range(count)), busy, 1.0, rest) + 1e-9  # than those in a row


def test_what_comes_by_another_way_does_not_wait_for_the_link() -> None:
    both = [("link", 0.1, 1.0), ("disk", 0.1, 1.0)] * 5
    assert waiting(both, 0.0) == pytest.approx(5 - 10 * 0.1)
    assert waiting([("link", 0.1, 1.0)] * 10, 0.0) == pytest.approx(10 - 10 * 0.1)
    assert waiting([("link", 1.0, 0.5)] * 5, 0.0) == 0
    assert waiting([("link", 0.0, 1.0)] * 5, 10.0) == pytest.approx(5 - SLOTS)  # which are there when the step begins


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_of_all_splits(seed: int) -> None:
    """Every number of streamed layers, every end of their run, every order and size of the runs behind it."""
    rng = np.random.default_rng(seed)
    count, names = int(rng.integers(3, 7)), ("a", "b", "c")
    tiers = [
        Tier(name, float(rng.integers(4, 30)), rng.uniform(1, 3, count), rng.uniform(1, 4, count), float(name == "c"))
        for name in names
    ]
    bounds = stage_bounds([(float(tier.seconds.sum()), tier.fixed) for tier in tiers])
    splitter = Splitter(tiers, bounds, count, "c", 0.1)
    shape = count + 1, count + 1
    seconds, first_need = rng.uniform(1, 5, shape), rng.uniform(0, 25, shape)
    host_need, disk_need = rng.uniform(0, 10, shape), np.zeros(1)
    offload = Offload("stream", "a", 0, seconds, first_need, host_need, disk_need)

    def rest(start: int, left: tuple[Tier, ...], bound: float) -> Iterator[float]:
        """Seconds of all ways to place the layers from `start` on."""
        for tier in left:
            for end in range(start + 1, count + 1):
                time = tier.seconds[start:end].sum()
                if time <= bound - tier.fixed + 1e-9 and tier.need[start:end].sum() <= tier.room:
                    others = tuple(t for t in left if t is not tier)
                    after = [0.1 * (tier.name != "c")] if end == count else rest(end, others, bound)
                    yield from (time + more for more in after)

    best = float("inf")
    for off, end, bound in product(range(count + 1), range(count + 1), bounds):
        stays = tiers[0].seconds[off:end].sum() <= bound - tiers[0].fixed + 1e-9
        if off <= end and stays and first_need[off, end] <= tiers[0].room and host_need[off, end] <= 6:
            after = [0.1] if end == count else rest(end, tuple(tiers[1:]), bound)
            own = seconds[off, end]
            best = min([best, *(own + more + BALANCE * max(bound, own) for more in after)])
    found = splitter.best(offload, 6.0)
    assert (found.cost if found else float("inf")) == pytest.approx(best)

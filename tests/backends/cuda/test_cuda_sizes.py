"""The sizes that plans are made with against what the kernels ask for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.backends.cuda import linear, moe, sizes
from chandra.backends.cuda.layouts import LAYOUTS


@given(st.integers(1, 600), st.integers(2, 128), st.integers(1, 8), st.sampled_from([64, 2048]))
@settings(deadline=None, max_examples=50)
def test_experts(rows: int, experts: int, top_k: int, hidden: int) -> None:
    top_k = min(top_k, experts)
    tiles = (1, 2, 4, 8, 16, 32, 64, 128)
    kernels = max(sum(moe._sizes(rows, bm, experts, top_k, hidden, 2 * hidden)) for bm in tiles)
    assert kernels <= sizes.moe_scratch(rows, experts, top_k, hidden, 2 * hidden) < 1.1 * kernels + (1 << 17)


@given(st.integers(1, 256), st.integers(1, 512), st.integers(1, 400))
def test_split_products_find_their_places(multiprocessors: int, blocks: int, spans: int) -> None:
    splits = linear.splits_for(linear.Chip(90, multiprocessors, 227 << 10), blocks, spans)
    assert splits == 1 or splits * blocks <= sizes.PLACES
    assert linear.tiles_for(linear.Chip(90, multiprocessors, 0), 16, LAYOUTS["Q4_0"]).bn * 16 <= sizes.TILE


def test_every_context_has_a_bucket() -> None:
    assert all(c <= sizes.context_bucket(c) < max(257, 2 * c) for c in range(1, 5000))

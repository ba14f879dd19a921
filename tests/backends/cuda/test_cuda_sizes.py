"""The sizes that plans are made with against what the kernels' modules ask for, which import Triton."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.backends.cuda import attention, linear, moe, sizes
from chandra.ops.contracts import AttentionParams


@given(st.integers(1, 64), st.integers(1, 70000), st.sampled_from([32, 64, 128, 256]), st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_attention(sequences: int, context: int, head_dim: int, heads: int) -> None:
    params = AttentionParams(heads, heads, head_dim, 1.0)
    kernels = attention.scratch_bytes(params, sequences, sizes.context_bucket(context))
    planned = sizes.attention_bytes(0, heads, head_dim, sequences, context)
    assert kernels <= planned < kernels + 256
    assert sizes.context_bucket(context) >= context


@given(st.integers(1, 600), st.integers(2, 128), st.integers(1, 8), st.sampled_from([64, 2048]))
@settings(deadline=None, max_examples=50)
def test_experts(rows: int, experts: int, top_k: int, hidden: int) -> None:
    kernels = moe.scratch_bytes(rows, experts, min(top_k, experts), hidden, 2 * hidden)
    planned = sizes.moe_bytes(rows, experts, min(top_k, experts), hidden, 2 * hidden)
    own = sizes.linear_bytes(rows, hidden, hidden) + 4 * rows * experts
    assert kernels <= planned - own < 1.1 * kernels + (1 << 17)


@pytest.mark.parametrize(("capability", "multiprocessors"), [(75, 40), (90, 132), (120, 188)])
def test_products(capability: int, multiprocessors: int) -> None:
    kernels = linear.scratch_bytes(linear.Chip(capability, multiprocessors, 100 << 10))
    assert kernels <= sizes.Scratch(0, 0).nbytes

"""The Triton kernels of attention over the paged cache.

One program computes the query heads of one kv head, so that keys and values are read once. Tiles of TILE tokens start
at multiples of TILE and the splits of decode at fixed positions, so a row's sums are formed in the same order whatever
else is in the batch.

A row of the cache is read as two planes of HALF values, which is what quantized codes are unpacked to: for floats the
first and the second half, for q8_0 the even and the odd values, for q4_0 the low and the high nibbles. Queries and
outputs are held in the same planes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chandra.backends.cuda import sizes
from chandra.backends.cuda.fused_kernels import cap

# Sizes of a batch are not specialized for: compiling in the middle of an answer would stall it.
# a line for every argument would bury the code
# fmt: off

LOG2E = tl.constexpr(1.4426950408889634)
SHORT, LONG, SHORT_SPLITS = (tl.constexpr(n) for n in (sizes.SHORT, sizes.LONG, sizes.SHORT_SPLITS))


@triton.jit
def _split_start(split):
    """The first position of a split of decode: the first 32 have 128 tokens, later ones 512."""
    return tl.minimum(split, SHORT_SPLITS) * SHORT + tl.maximum(split - SHORT_SPLITS, 0) * LONG


@triton.jit
def _split_of(position):
    short = SHORT * SHORT_SPLITS
    return tl.where(position < short, position // SHORT, SHORT_SPLITS + (position - short) // LONG)


@triton.jit
def _columns(KV_TYPE: tl.constexpr, HALF: tl.constexpr):
    """The columns of a head that the two planes hold."""
    i = tl.arange(0, HALF)
    if KV_TYPE == "q8_0":
        first, second = 2 * i, 2 * i + 1
    elif KV_TYPE == "q4_0":
        first = i // 16 * 32 + i % 16
        second = first + 16
    else:
        first, second = i, HALF + i
    return first, second


@triton.jit
def _head(places, inside, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr):
    """Both planes of heads of floats, which begin at `places`."""
    first, second = _columns(KV_TYPE, HALF)
    return (
        tl.load(places[:, None] + first[None, :], inside[:, None] & (first < DIM)[None, :], other=0.0),
        tl.load(places[:, None] + second[None, :], inside[:, None] & (second < DIM)[None, :], other=0.0),
    )


@triton.jit
def _store_head(places, values, inside, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr):
    first, second = _columns(KV_TYPE, HALF)
    dtype = places.dtype.element_ty
    tl.store(places[:, None] + first[None, :], values[0].to(dtype), inside[:, None] & (first < DIM)[None, :])
    tl.store(places[:, None] + second[None, :], values[1].to(dtype), inside[:, None] & (second < DIM)[None, :])


@triton.jit
def _load(cache, rows, inside, DTYPE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr):
    """Both planes (TILE, HALF) of rows of the cache."""
    i = tl.arange(0, HALF)
    if KV_TYPE == "q8_0" or KV_TYPE == "q4_0":
        WORDS: tl.constexpr = 17 if KV_TYPE == "q8_0" else 9
        blocks = cache + rows * (DIM // 32 * WORDS)
        j = tl.arange(0, HALF // 16)
        scales = tl.load(blocks[:, None] + j[None, :] * WORDS, inside[:, None] & (j[None, :] < DIM // 32), other=0)
        scales = scales.to(tl.float16, bitcast=True).to(tl.float32)
        scales = tl.broadcast_to(scales[:, :, None], (rows.shape[0], HALF // 16, 16))
        scales = tl.reshape(scales, (rows.shape[0], HALF))
        here = inside[:, None] & (i[None, :] < DIM // 2)
        if KV_TYPE == "q8_0":
            codes = tl.load(blocks[:, None] + (i // 16 * WORDS + 1 + i % 16)[None, :], here, other=0).to(tl.int32)
            first, second = (codes << 24) >> 24, codes >> 8
        else:
            places = blocks.to(tl.pointer_type(tl.uint8))[:, None] + (i // 16 * (2 * WORDS) + 2 + i % 16)[None, :]
            codes = tl.load(places, here, other=0).to(tl.int32)
            first, second = (codes & 15) - 8, (codes >> 4) - 8
        first, second = (first.to(tl.float32) * scales).to(DTYPE), (second.to(tl.float32) * scales).to(DTYPE)
    else:
        first, second = _head(cache + rows * DIM, inside, DIM, HALF, KV_TYPE)
        if cache.dtype.element_ty != DTYPE:
            first, second = first.to(tl.float32), second.to(tl.float32)
        first, second = first.to(DTYPE), second.to(DTYPE)
    return first, second


@triton.jit
def _dot(a, b, sum):
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _rows_of(block_table, positions, inside, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The rows of the cache, counted through blocks and heads, of tokens at these positions."""
    block = tl.load(block_table + positions // BLOCK_SIZE, inside, other=0).to(tl.int64)
    return (block * KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _attend(
    q_first, q_second, position, low, high, start, state, block_table, k_cache, v_cache, kv_head,
    scale, softcap, window,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of the online softmax (https://arxiv.org/abs/2205.14135) of queries (M,) at `position`: tokens from
    `start` on, of which those in [low, high) exist. `state` is the maximum, the sum and both planes of the output."""
    maximum, total, first, second = state
    tokens = start + tl.arange(0, TILE)
    inside = (tokens >= low) & (tokens < high)
    rows = _rows_of(block_table, tokens, inside, kv_head, KV_HEADS, BLOCK_SIZE)
    DTYPE: tl.constexpr = q_first.dtype
    k_first, k_second = _load(k_cache, rows, inside, DTYPE, DIM, HALF, KV_TYPE)
    v_first, v_second = _load(v_cache, rows, inside, DTYPE, DIM, HALF, KV_TYPE)
    scores = tl.zeros((position.shape[0], TILE), tl.float32)
    scores = _dot(q_second, tl.trans(k_second), _dot(q_first, tl.trans(k_first), scores))
    scores *= scale * LOG2E if softcap is None else scale
    if softcap is not None:
        scores = cap(scores, softcap) * LOG2E
    distance = position[:, None] - tokens[None, :]
    visible = inside[None, :] & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    pivot = tl.where(highest == float("-inf"), 0.0, highest)  # nothing visible yet
    weights = tl.exp2(scores - pivot[:, None])
    kept = tl.exp2(maximum - pivot)
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(DTYPE)
    first = _dot(weights, v_first, first * kept[:, None])
    second = _dot(weights, v_second, second * kept[:, None])
    return highest, total, first, second


@triton.jit
def _empty(M: tl.constexpr, HALF: tl.constexpr):
    """The state before the first token."""
    output = tl.zeros((M, HALF), tl.float32)
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), output, output


@triton.jit(do_not_specialize=["window", "table_width", "splits"], do_not_specialize_on_alignment=["maxima", "totals"])
def decode(
    q, query_start, context_lens, block_tables, k_cache, v_cache, outputs, maxima, totals,
    scale, softcap, window, table_width, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):
    """Program (split, kv head, sequence): the part of a sequence's only query that one split of its tokens gives.

    outputs (b, splits, H, d), not yet divided; maxima (as powers of two) and totals (b, splits, H).
    """
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(query_start + sequence).to(tl.int64)
    length = tl.load(query_start + sequence + 1) - row
    context = tl.load(context_lens + sequence)
    low = tl.maximum(context - window, 0) if window is not None else 0
    begin = tl.maximum(_split_start(split), low // TILE * TILE)
    end = tl.minimum(_split_start(split + 1), context)
    if (length != 1) | (begin >= end):
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    m = tl.arange(0, M)
    heads = kv_head * GROUP + m
    q_first, q_second = _head(q + (row * HEADS + heads) * DIM, m < GROUP, DIM, HALF, KV_TYPE)
    position = tl.full((M,), 0, tl.int32) + (context - 1)
    state = _empty(M, HALF)
    block_table = block_tables + sequence * table_width
    for start in tl.range(begin, end, TILE):
        state = _attend(
            q_first, q_second, position, low, end, start, state, block_table, k_cache, v_cache, kv_head,
            scale, softcap, window, KV_HEADS, DIM, HALF, KV_TYPE, BLOCK_SIZE, TILE,
        )
    maximum, total, first, second = state
    parts = (sequence * splits + split) * HEADS + heads
    tl.store(maxima + parts, maximum, m < GROUP)
    tl.store(totals + parts, total, m < GROUP)
    _store_head(outputs + parts * DIM, (first, second), m < GROUP, DIM, HALF, KV_TYPE)


@triton.jit(do_not_specialize=["window", "splits"], do_not_specialize_on_alignment=["maxima", "totals"])
def combine(
    query_start, context_lens, outputs, maxima, totals, out, window, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):
    """Program (head, sequence): out (n, H*d) from the parts of `decode`, in their order. No context gives zeros."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    context = tl.load(context_lens + sequence)
    low = tl.maximum(context - window, 0) if window is not None else 0
    begin, end = _split_of(low), _split_of(context - 1) + 1 if context > 0 else 0
    columns = tl.arange(0, PADDED)
    maximum, total, output = float("-inf"), 0.0, tl.zeros((PADDED,), tl.float32)
    for start in range(begin, end, TILE):
        split = start + tl.arange(0, TILE)
        parts = (sequence * splits + split) * HEADS + head
        maxima_here = tl.load(maxima + parts, split < end, other=float("-inf"))
        highest = tl.maximum(maximum, tl.max(maxima_here, 0))
        weights = tl.exp2(maxima_here - highest)
        kept = tl.exp2(maximum - highest)
        total = total * kept + tl.sum(weights * tl.load(totals + parts, split < end, other=0.0), 0)
        inside = (split < end)[:, None] & (columns < DIM)[None, :]
        values = tl.load(outputs + parts[:, None] * DIM + columns[None, :], inside, other=0.0)
        output = output * kept + tl.sum(weights[:, None] * values, 0)
        maximum = highest
    output = output / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (row * HEADS + head) * DIM + columns, output.to(out.dtype.element_ty), columns < DIM)


@triton.jit
def _tile_of(query_start, sequences, QUERIES: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence and the first of its queries that this program computes, the last tiles (with the longest contexts)
    first; sequence -1 beyond them. Sequences of one query are left to `decode`."""
    i = tl.arange(0, SEQUENCES)
    begins = tl.load(query_start + i, i < sequences, other=0)
    lengths = tl.load(query_start + i + 1, i < sequences, other=0) - begins
    tiles = tl.where(lengths > 1, (lengths + QUERIES - 1) // QUERIES, 0)
    ends = tl.cumsum(tiles, 0)
    tile = tl.sum(tiles, 0) - 1 - tl.program_id(0)
    sequence = tl.where(tile < 0, -1, tl.sum((ends <= tile).to(tl.int32), 0))
    return sequence, (tile - tl.max(tl.where(ends <= tile, ends, 0), 0)) * QUERIES


@triton.jit(do_not_specialize=["window", "table_width", "sequences"])
def prefill(
    q, query_start, context_lens, block_tables, k_cache, v_cache, out,
    scale, softcap, window, table_width, sequences,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr,
):
    """Program (tile, kv head): out (n, H*d) of some neighbouring queries of one sequence."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = M // GROUP
    kv_head = tl.program_id(1)
    sequence, first_query = _tile_of(query_start, sequences, QUERIES, SEQUENCES)
    if sequence < 0:
        return
    row = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - row
    context = tl.load(context_lens + sequence)
    m = tl.arange(0, M)
    queries = first_query + m // GROUP
    inside = (m < QUERIES * GROUP) & (queries < length)
    places = ((row + queries).to(tl.int64) * HEADS + kv_head * GROUP + m % GROUP) * DIM
    q_first, q_second = _head(q + places, inside, DIM, HALF, KV_TYPE)
    position = context - length + queries
    begin = context - length + first_query
    end = tl.minimum(context, begin + QUERIES)
    low = tl.maximum(begin - window + 1, 0) if window is not None else 0
    state = _empty(M, HALF)
    block_table = block_tables + sequence.to(tl.int64) * table_width
    for start in tl.range(low // TILE * TILE, end, TILE):
        state = _attend(
            q_first, q_second, position, low, end, start, state, block_table, k_cache, v_cache, kv_head,
            scale, softcap, window, KV_HEADS, DIM, HALF, KV_TYPE, BLOCK_SIZE, TILE,
        )
    _, total, first, second = state
    share = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    _store_head(out + places, (first * share, second * share), inside, DIM, HALF, KV_TYPE)

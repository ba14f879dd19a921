"""The Triton kernels of rows: norms, rope, the quantization of what enters the KV cache, logits."""

from __future__ import annotations

import triton
import triton.language as tl

# a line for every argument would bury the code
# fmt: off

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
TURN = tl.constexpr(6.283185307179586)


@triton.jit
def norm_rows(
    x, rows, weight, bias, out, width, eps, LAYER: tl.constexpr, ADD: tl.constexpr, WIDTH: tl.constexpr,
):
    """Program i: out[i] (+)= norm(x[rows[i]]). rows, weight and bias may be None."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if rows is not None:
        source = tl.load(rows + row).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    values = tl.load(x + source * width + columns, inside, other=0.0).to(tl.float32)
    if LAYER:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    if weight is not None:
        values *= tl.rsqrt(tl.sum(values * values, 0) / width + eps)
        values *= tl.load(weight + columns, inside, other=0.0)
    if bias is not None:
        values += tl.load(bias + columns, inside, other=0.0)
    places = out + row * width + columns
    if ADD:
        values += tl.load(places, inside, other=0.0)
    tl.store(places, values.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count"])
def finish_logits(logits, count, scale, softcap, SIZE: tl.constexpr):
    """logits = softcap * tanh(logits * scale / softcap), in place."""
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = places < count
    values = tl.load(logits + places, inside, other=0.0) * scale
    if softcap is not None:
        values = cap(values, softcap)
    tl.store(logits + places, values, inside)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap) of float32."""
    return softcap - 2.0 * softcap / (tl.exp(x * (2.0 / softcap)) + 1.0)


@triton.jit
def rope_write(
    q, k, v, positions, slots, inv_freq, q_weight, q_bias, k_weight, k_bias, q_out, k_cache, v_cache,
    rope_scale, q_eps, k_eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_LAYER: tl.constexpr, K_LAYER: tl.constexpr,
    KV_TYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
):
    """Program (i, t): row i, tile t of HEADS heads, those of q first, then k's, then v's."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    Q_TILES: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_TILES: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    position = tl.load(positions + row)
    columns = tl.arange(0, PADDED)
    if tile < Q_TILES:
        heads = tile * HEADS + tl.arange(0, HEADS)
        places = (row * Q_HEADS + heads[:, None]) * DIM
        inside = (heads[:, None] < Q_HEADS) & (columns[None, :] < DIM)
        y = _rotated(
            q + places, inside, position, inv_freq, rope_scale, q_weight, q_bias, q_eps, DIM, PADDED, PAIRS,
            INTERLEAVED, Q_LAYER,
        )
        tl.store(q_out + places + columns[None, :], y.to(q_out.dtype.element_ty), inside)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            heads = (tile - Q_TILES) % KV_TILES * HEADS + tl.arange(0, HEADS)
            places = (row * KV_HEADS + heads[:, None]) * DIM
            inside = (heads[:, None] < KV_HEADS) & (columns[None, :] < DIM)
            block = (slot // BLOCK_SIZE).to(tl.int64)
            cached = (block * KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
            if tile < Q_TILES + KV_TILES:
                y = _rotated(
                    k + places, inside, position, inv_freq, rope_scale, k_weight, k_bias, k_eps, DIM, PADDED, PAIRS,
                    INTERLEAVED, K_LAYER,
                )
                _write(k_cache, cached, y, heads < KV_HEADS, DIM, PADDED, KV_TYPE, HEADS)
            else:
                y = tl.load(v + places + columns[None, :], inside, other=0.0).to(tl.float32)
                _write(v_cache, cached, y, heads < KV_HEADS, DIM, PADDED, KV_TYPE, HEADS)


@triton.jit
def _rotated(
    x, inside, position, inv_freq, rope_scale, weight, bias, eps,
    DIM: tl.constexpr, PADDED: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, LAYER: tl.constexpr,
):
    """Heads after head norm and rope, float32 (HEADS, PADDED). The partner of every value is loaded beside it."""
    columns = tl.arange(0, PADDED)
    y = tl.load(x + columns[None, :], inside, other=0.0).to(tl.float32)
    mean, root = 0.0, 1.0
    if LAYER:
        mean = (tl.sum(y, 1) / DIM)[:, None]
    if weight is not None:
        centered = tl.where(inside, y - mean, 0.0)
        root = tl.rsqrt(tl.sum(centered * centered, 1) / DIM + eps)[:, None]
        y = _scaled(y, mean, root, columns, columns < DIM, weight, bias)
    if PAIRS > 0:
        turning = columns < 2 * PAIRS
        if INTERLEAVED:
            partner = columns ^ 1
            pair = columns // 2
            first = partner > columns
        else:
            first = columns < PAIRS
            partner = tl.where(first, columns + PAIRS, columns - PAIRS)
            pair = tl.where(first, columns, columns - PAIRS)
        other = tl.load(x + partner[None, :], inside & turning[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            other = _scaled(other, mean, root, partner, turning, weight, bias)
        # float32 would lose the angle of far positions, and sine is fast only for small ones
        turns = tl.load(inv_freq + pair, turning, other=0.0).to(tl.float64) * position.to(tl.float64) * (1 / TURN)
        angle = ((turns - tl.floor(turns)) * TURN).to(tl.float32)
        cosine = tl.where(turning, tl.cos(angle) * rope_scale, 1.0)
        sine = tl.where(turning, tl.sin(angle) * rope_scale, 0.0)
        y = y * cosine[None, :] + other * tl.where(first, -sine, sine)[None, :]
    return y


@triton.jit
def _scaled(x, mean, root, columns, inside, weight, bias):
    y = (x - mean) * root * tl.load(weight + columns, inside, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + columns, inside, other=0.0)[None, :]
    return y


@triton.jit
def _write(cache, rows, y, inside, DIM: tl.constexpr, PADDED: tl.constexpr, KV_TYPE: tl.constexpr, HEADS: tl.constexpr):
    """Write y (HEADS, PADDED) to these rows of the cache. Quantized rows are addressed in words of 16 bits."""
    if KV_TYPE == "q8_0":
        _write_q8_0(cache, rows, tl.reshape(y, (HEADS, PADDED // 32, 32)), inside, DIM)
    elif KV_TYPE == "q4_0":
        _write_q4_0(cache, rows, tl.reshape(y, (HEADS, PADDED // 32, 32)), inside, DIM)
    else:
        columns = tl.arange(0, PADDED)
        places = cache + rows[:, None] * DIM + columns[None, :]
        tl.store(places, y.to(cache.dtype.element_ty), inside[:, None] & (columns[None, :] < DIM))


@triton.jit
def _reciprocal(d):
    """1 / d, and 0 where that would not be finite: a block of zeros packs as zeros."""
    zero = tl.abs(d) < TINY
    return tl.where(zero, 0.0, tl.div_rn(1.0, tl.where(zero, 1.0, d)))


@triton.jit
def _write_q8_0(cache, rows, y, inside, DIM: tl.constexpr):
    """Blocks (HEADS, blocks, 32) as `quant/q8_0.py` packs them."""
    d = tl.div_rn(tl.max(tl.abs(y), 2), 127.0)
    scaled = y * _reciprocal(d)[:, :, None]
    whole = scaled.to(tl.int32)
    codes = whole + (2.0 * (scaled - whole.to(tl.float32))).to(tl.int32)  # halves away from zero
    _write_blocks(cache, rows, d, inside, DIM, 17)
    low, high = tl.split(tl.reshape(codes, (y.shape[0], y.shape[1], 16, 2)))
    _write_words(cache, rows, (low & 255) | (high << 8), inside, DIM, 17)


@triton.jit
def _write_q4_0(cache, rows, y, inside, DIM: tl.constexpr):
    """Blocks (HEADS, blocks, 32) as `quant/q4_0.py` packs them."""
    at = tl.argmax(tl.abs(y), 2, tie_break_left=True)
    peak = tl.sum(tl.where(tl.arange(0, 32)[None, None, :] == at[:, :, None], y, 0.0), 2)
    d = peak * -0.125
    codes = tl.clamp(y * _reciprocal(d)[:, :, None] + 8.5, 0.0, 15.0).to(tl.int32)
    _write_blocks(cache, rows, d, inside, DIM, 9)
    low, high = tl.split(tl.permute(tl.reshape(codes, (y.shape[0], y.shape[1], 2, 16)), (0, 1, 3, 2)))
    even, odd = tl.split(tl.reshape(low | (high << 4), (y.shape[0], y.shape[1], 8, 2)))
    _write_words(cache, rows, even | (odd << 8), inside, DIM, 9)


@triton.jit
def _write_blocks(cache, rows, d, inside, DIM: tl.constexpr, WORDS: tl.constexpr):
    blocks = tl.arange(0, d.shape[1])
    places = cache + (rows[:, None] * (DIM // 32) + blocks[None, :]) * WORDS
    scales = d.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(places, scales, inside[:, None] & (blocks[None, :] < DIM // 32))


@triton.jit
def _write_words(cache, rows, words, inside, DIM: tl.constexpr, WORDS: tl.constexpr):
    blocks, columns = tl.arange(0, words.shape[1]), tl.arange(0, words.shape[2])
    places = cache + ((rows[:, None] * (DIM // 32) + blocks[None, :]) * WORDS)[:, :, None] + columns[None, None, :] + 1
    tl.store(places, words.to(tl.int16), (inside[:, None] & (blocks[None, :] < DIM // 32))[:, :, None])

"""The Triton kernels that choose experts, group rows by expert and add the parts up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose_kernel(logits, choices, shares, experts, TOP: tl.constexpr, E: tl.constexpr, NORMALIZE: tl.constexpr):
    """The TOP largest logits of a row, largest first (the first of equals), and the softmax over them or over all."""
    row, e = tl.program_id(0), tl.arange(0, E)
    values = tl.load(logits + row * experts + e, mask=e < experts, other=-float("inf"))
    largest = tl.max(values, 0)
    total = tl.sum(tl.exp(values - largest), 0)
    left, chosen_total = values, 0.0
    for j in tl.static_range(TOP):
        best = tl.argmax(left, 0)
        share = tl.exp(tl.max(left, 0) - largest)
        tl.store(choices + row * TOP + j, best)
        tl.store(shares + row * TOP + j, share / total)
        chosen_total += share
        left = tl.where(e == best, -float("inf"), left)
    if NORMALIZE:
        tl.debug_barrier()
        for j in tl.static_range(TOP):
            share = tl.load(shares + row * TOP + j)
            tl.store(shares + row * TOP + j, share * total / chosen_total)


@triton.jit(do_not_specialize=["slots", "count"])
def group_kernel(choices, order, tiles, slots, count, BM: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr):
    """Expert of this program: its slots in their order, from a tile's start on, -1 to the tile's end; its tiles."""
    own, e, c = tl.program_id(0), tl.arange(0, E), tl.arange(0, CHUNK)
    counts = tl.zeros((E,), tl.int32)
    for start in range(0, slots, CHUNK):
        chosen = tl.load(choices + start + c, mask=start + c < slots, other=-1)
        counts += tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), 0)
    needed = (counts + BM - 1) // BM
    first = tl.sum(tl.where(e < own, needed, 0), 0)
    mine, place = tl.sum(tl.where(e == own, needed, 0), 0), first * BM
    for start in range(0, slots, CHUNK):
        chosen = tl.load(choices + start + c, mask=start + c < slots, other=-1)
        match = chosen == own
        before = tl.cumsum(match.to(tl.int32), 0)
        tl.store(order + place + before - 1, start + c, mask=match)
        place += tl.sum(match.to(tl.int32), 0)
    rest = tl.arange(0, BM)
    tl.store(order + place + rest, rest * 0 - 1, mask=place + rest < (first + mine) * BM)
    for tile in range(first, first + mine):
        tl.store(tiles + tile, own)
    if own == tl.num_programs(0) - 1:
        for tile in range(first + mine, count):
            tl.store(tiles + tile, -1)


@triton.jit(do_not_specialize=["width"])
def add_kernel(parts, shares, out, width, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = the parts of its slots, by their shares, in the order of the slots."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP):
        share = tl.load(shares + row * TOP + j)
        acc += share * tl.load(parts + (row * TOP + j) * width + c, mask=c < width, other=0.0)
    tl.store(out + row * width + c, acc, mask=c < width)

"""Mixture of experts on a GPU: choose, group the choices by expert, compute, and add up.

A slot is one choice of one row: slot `row * top_k + j`. Nothing returns to the host, so a step can be captured.
"""

from __future__ import annotations

import triton

from chandra.backends.cuda.launch import launch
from chandra.backends.cuda.layouts import ALIGNMENT, DeviceWeight
from chandra.backends.cuda.linear import DECODE, Product, Routes, chip_of, gate_up, product, tiles_for
from chandra.backends.cuda.moe_kernels import add_kernel, choose_kernel, group_kernel
from chandra.backends.cuda.sizes import EXPERT_ROWS
from chandra.lazy import torch


def _sizes(n: int, bm: int, experts: int, top_k: int, hidden: int, ff: int) -> tuple[int, ...]:
    """Bytes of choices, shares, order, tiles, inner state and parts, each a multiple of the alignment."""
    slots = n * top_k
    tiles = min(slots, min(slots, experts) + slots // bm)
    sizes = (4 * slots, 4 * slots, 4 * tiles * bm, 4 * tiles, 2 * slots * ff, 4 * slots * hidden)
    return tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate: DeviceWeight,
    up: DeviceWeight,
    down: DeviceWeight,
    top_k: int,
    normalize: bool,
    activation: str,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """out float32 `(n, hidden)` = the chosen experts of x `(n, hidden)`, weighted (see `contracts.Experts`).

    router_logits float32 `(n, experts)`; scratch uint8 of `sizes.moe_scratch`, 128-byte aligned, whatever is in it.
    """
    n, hidden = x.shape
    experts, ff = up.arrangement.shape[:2]
    slots = n * top_k
    rows = n if n <= DECODE else min(EXPERT_ROWS, max(DECODE + 1, slots // experts))
    bm = tiles_for(chip_of(x.device), rows, up.arrangement.layout).bm
    choices, shares, order, tiles, inner, parts = torch.split(
        scratch[: sum(sizes := _sizes(n, bm, experts, top_k, hidden, ff))], list(sizes)
    )
    choices, order, tiles = (t.view(torch.int32) for t in (choices, order, tiles))
    shares, parts = shares.view(torch.float32), parts.view(torch.float32)[: slots * hidden]
    inner = inner.view(x.dtype)[: slots * ff].view(slots, ff)
    tiles = tiles[: min(slots, min(slots, experts) + slots // bm)]
    power = triton.next_power_of_2(experts)
    chosen = router_logits, choices, shares, experts
    launch(choose_kernel, n)(*chosen, TOP=top_k, E=power, NORMALIZE=normalize, num_warps=1)
    chunk = min(max(triton.next_power_of_2(slots), 16), 8192 // min(power, 512))
    launch(group_kernel, experts)(choices, order, tiles, slots, len(tiles), BM=bm, E=power, CHUNK=chunk)
    gate_up(x, Product(gate, None, inner), Product(up, None, inner), activation, routes=Routes(order, tiles, top_k, bm))
    product(inner, Product(down, None, parts.view(slots, hidden)), routes=Routes(order, tiles, 1, bm))
    block = min(1024, triton.next_power_of_2(hidden))
    launch(add_kernel, n, triton.cdiv(hidden, block))(parts, shares, out, hidden, TOP=top_k, BLOCK=block)

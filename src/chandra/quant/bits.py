"""Bit fields, float16 scales and rounding, shared by the formats. Blocks are rows of uint8."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from chandra.lazy import torch
from chandra.quant.base import require_finite


def unpack_fields(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """uint8 `(n, k)` -> uint8 `(n, k * 8 / bits)`: the bit fields of each byte, lowest first.

    The bytes come in runs: field `i` of byte `j` is value `i * run + j` of its run.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    fields = (data.reshape(len(data), data.shape[1] // run, 1, run) >> shifts) & ((1 << bits) - 1)
    return fields.reshape(len(data), data.shape[1] * 8 // bits)


def pack_fields(values: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `unpack_fields`: values below `2**bits` of any dtype -> uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)[:, None]
    n, k = values.shape[0], values.shape[1] * bits // 8
    fields = values.to(torch.uint8).reshape(n, k // run, 8 // bits, run) << shifts
    return fields.sum(2, dtype=torch.uint8).reshape(n, k)


def half(data: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at byte `offset` of every block, as float32 `(n, 1)`."""
    return data[:, offset : offset + 2].contiguous().view(torch.float16).to(torch.float32)


def to_half(name: str, values: torch.Tensor) -> torch.Tensor:
    """float32 -> float16. Raises `UnsupportedError` if a value is too large for it."""
    halves = values.to(torch.float16)
    require_finite(name, halves)
    return halves


def half_bytes(name: str, values: torch.Tensor) -> torch.Tensor:
    """float32 `(n, 1)` -> uint8 `(n, 2)`. Raises `UnsupportedError` if a value is too large for float16."""
    return to_half(name, values).view(torch.uint8)


def reciprocal(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 where that would not be finite: a block of zeros packs as zeros."""
    return torch.where(values.abs() < torch.finfo(torch.float32).tiny, 0.0, 1.0 / values)


def signed_max(values: torch.Tensor) -> torch.Tensor:
    """The value of the largest magnitude in each row, with its sign (the first of equals), `(n, 1)`."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))


def table(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """A float32 lookup table on a device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def nearest(values: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """The index of the nearest of ascending levels (the lower of two equally near)."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    return torch.bucketize(values, table(middles, values.device))

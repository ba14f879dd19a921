"""Q5_1: 32 values, a float16 scale and minimum, 5-bit values."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, reciprocal, unpack_fields


class Q5_1(BlockFormat):
    """`d`, `m` float16 | 4 bytes of fifth bits | 16 of nibbles (value `j` low, `j + 16` high). `x = d * q + m`."""

    name = "Q5_1"
    block_size, block_bytes, ggml_type = 32, 24, 7

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = blocks.aminmax(dim=1, keepdim=True)
        d = (high - low) / 31
        q = ((blocks - low) * reciprocal(d) + 0.5).trunc().clamp(0, 31).to(torch.uint8)
        scales = (half_bytes(self.name, d), half_bytes(self.name, low))
        return *scales, pack_fields(q >> 4, 1, 1), pack_fields(q & 15, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        q = unpack_fields(data[:, 8:], 4, 16) | unpack_fields(data[:, 4:8], 1, 1) << 4
        return half(data, 0) * q + half(data, 2)

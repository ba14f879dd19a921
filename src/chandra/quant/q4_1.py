"""Q4_1: 32 values, a float16 scale and minimum, 4-bit values."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, reciprocal, unpack_fields


class Q4_1(BlockFormat):
    """`d`, `m` float16 | 16 bytes of nibbles (value `j` low, `j + 16` high). `x = d * q + m`."""

    name = "Q4_1"
    block_size, block_bytes, ggml_type = 32, 20, 3

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = blocks.aminmax(dim=1, keepdim=True)
        d = (high - low) / 15
        q = ((blocks - low) * reciprocal(d) + 0.5).trunc().clamp(0, 15)
        return half_bytes(self.name, d), half_bytes(self.name, low), pack_fields(q, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return half(data, 0) * unpack_fields(data[:, 4:], 4, 16) + half(data, 2)

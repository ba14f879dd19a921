"""Q4_0: 32 values, one float16 scale, 4-bit values around 8."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, reciprocal, signed_max, unpack_fields


class Q4_0(BlockFormat):
    """`d` float16 | 16 bytes of nibbles (value `j` low, `j + 16` high). `x = d * (q - 8)`."""

    name = "Q4_0"
    block_size, block_bytes, ggml_type = 32, 18, 2

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = signed_max(blocks) / -8
        q = (blocks * reciprocal(d) + 8.5).trunc().clamp(0, 15)
        return half_bytes(self.name, d), pack_fields(q, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return half(data, 0) * (unpack_fields(data[:, 2:], 4, 16).to(torch.float32) - 8)

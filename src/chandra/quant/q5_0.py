"""Q5_0: 32 values, one float16 scale, 5-bit values around 16."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, reciprocal, signed_max, unpack_fields


class Q5_0(BlockFormat):
    """`d` float16 | 4 bytes of fifth bits | 16 bytes of nibbles (value `j` low, `j + 16` high). `x = d * (q - 16)`."""

    name = "Q5_0"
    block_size, block_bytes, ggml_type = 32, 22, 6

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = signed_max(blocks) / -16
        q = (blocks * reciprocal(d) + 16.5).trunc().clamp(0, 31).to(torch.uint8)
        return half_bytes(self.name, d), pack_fields(q >> 4, 1, 1), pack_fields(q & 15, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        q = unpack_fields(data[:, 6:], 4, 16) | unpack_fields(data[:, 2:6], 1, 1) << 4
        return half(data, 0) * (q.to(torch.float32) - 16)

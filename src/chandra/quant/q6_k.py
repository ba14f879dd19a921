"""Q6_K: 256 values in 16 groups of 16, 6-bit values around 32, int8 scales."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, unpack_fields
from chandra.quant.search import symmetric_super_block


class Q6_K(BlockFormat):
    """128 bytes of nibbles, runs of 64 | 64 bytes of upper bit pairs, runs of 32 | 16 int8 scales | `d` float16.

    `x = d * sc * (q - 32)`.
    """

    name = "Q6_K"
    block_size, block_bytes, ggml_type = 256, 210, 14

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = [0.1 * i for i in range(-9, 10)]
        d, sc, scaled = symmetric_super_block(
            self.name, blocks, 16, lambda x: x.round().clamp(-32, 31), extreme=-32, scale_extreme=-128, steps=steps
        )
        q = (scaled.round().clamp(-32, 31) + 32).to(torch.uint8)
        scales = (sc.to(torch.int8).view(torch.uint8), half_bytes(self.name, d))
        return pack_fields(q & 15, 4, 64), pack_fields(q >> 4, 2, 32), *scales

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        scale = half(data, 208) * data[:, 192:208].contiguous().view(torch.int8)
        q = unpack_fields(data[:, :128], 4, 64) | unpack_fields(data[:, 128:192], 2, 32) << 4
        return (scale[..., None] * (q.to(torch.float32) - 32).reshape(-1, 16, 16)).reshape(-1, 256)

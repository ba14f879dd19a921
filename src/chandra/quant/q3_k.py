"""Q3_K: 256 values in 16 groups of 16, 3-bit values around 4, 6-bit scales."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, unpack_fields
from chandra.quant.search import symmetric_super_block


class Q3_K(BlockFormat):
    """32 bytes of third bits | 64 bytes of 2-bit values | 12 bytes of scales | `d` float16. Runs of 32 bytes.

    The scales are 8 bytes of low nibbles, then 4 bytes of upper bit pairs. `x = d * (sc - 32) * (q - 4)`.
    """

    name = "Q3_K"
    block_size, block_bytes, ggml_type = 256, 110, 11

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = [0.1 * i for i in range(-9, 10)]
        d, sc, scaled = symmetric_super_block(
            self.name, blocks, 16, lambda x: x.round().clamp(-4, 3), extreme=-4, scale_extreme=-32, steps=steps
        )
        q = (scaled.round().clamp(-4, 3) + 4).to(torch.uint8)
        sc = (sc + 32).to(torch.uint8)
        scales = (pack_fields(sc & 15, 4, 8), pack_fields(sc >> 4, 2, 4))
        return pack_fields(q >> 2, 1, 32), pack_fields(q & 3, 2, 32), *scales, half_bytes(self.name, d)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        sc = unpack_fields(data[:, 96:104], 4, 8) | unpack_fields(data[:, 104:108], 2, 4) << 4
        scale = half(data, 108) * (sc.to(torch.float32) - 32)
        q = unpack_fields(data[:, 32:96], 2, 32) | unpack_fields(data[:, :32], 1, 32) << 2
        return (scale[..., None] * (q.to(torch.float32) - 4).reshape(-1, 16, 16)).reshape(-1, 256)

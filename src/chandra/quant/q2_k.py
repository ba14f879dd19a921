"""Q2_K: 256 values in 16 groups of 16, 2-bit values, 4-bit scales and minimums."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, unpack_fields
from chandra.quant.search import affine_super_block


class Q2_K(BlockFormat):
    """16 bytes of scales (low nibble) and minimums | 64 bytes of 2-bit values, runs of 32 bytes | `d`, `dmin` float16.

    `x = d * sc * q - dmin * m`.
    """

    name = "Q2_K"
    block_size, block_bytes, ggml_type = 256, 84, 10

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d, dmin, sc, m, q = affine_super_block(self.name, blocks, group=16, top=3, scale_top=15)
        scales = (sc + 16 * m).to(torch.uint8)
        return scales, pack_fields(q, 2, 32), half_bytes(self.name, d), half_bytes(self.name, dmin)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        scale, shift = half(data, 80) * (data[:, :16] & 15), half(data, 82) * (data[:, :16] >> 4)
        q = unpack_fields(data[:, 16:80], 2, 32).reshape(-1, 16, 16)
        return (scale[..., None] * q - shift[..., None]).reshape(-1, 256)

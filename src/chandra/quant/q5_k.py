"""Q5_K: 256 values in 8 groups of 32, 5-bit values, 6-bit scales and minimums."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, unpack_fields
from chandra.quant.q4_k import pack_scales, unpack_scales
from chandra.quant.search import affine_super_block


class Q5_K(BlockFormat):
    """`d`, `dmin` float16 | 12 bytes of scales and minimums as in Q4_K | 32 bytes of fifth bits | 128 of nibbles.

    Runs of 32 bytes. `x = d * sc * q - dmin * m`.
    """

    name = "Q5_K"
    block_size, block_bytes, ggml_type = 256, 176, 13

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d, dmin, sc, m, q = affine_super_block(self.name, blocks, group=32, top=31, scale_top=63)
        q = q.to(torch.uint8)
        scales = (half_bytes(self.name, d), half_bytes(self.name, dmin), pack_scales(sc, m))
        return *scales, pack_fields(q >> 4, 1, 32), pack_fields(q & 15, 4, 32)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        sc, m = unpack_scales(data[:, 4:16])
        scale, shift = half(data, 0) * sc, half(data, 2) * m
        q = unpack_fields(data[:, 48:], 4, 32) | unpack_fields(data[:, 16:48], 1, 32) << 4
        return (scale[..., None] * q.reshape(-1, 8, 32) - shift[..., None]).reshape(-1, 256)

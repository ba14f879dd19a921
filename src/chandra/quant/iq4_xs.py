"""IQ4_XS: 256 values in 8 groups of 32, 4-bit indices into the levels of IQ4_NL, 6-bit scales."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, nearest, pack_fields, table, unpack_fields
from chandra.quant.iq4_nl import LEVELS, nearest_level
from chandra.quant.search import symmetric_super_block


class IQ4_XS(BlockFormat):
    """`d` float16 | 2 bytes of upper bit pairs of the scales | 4 bytes of their low nibbles | 128 bytes of nibbles.

    In a group, value `j` is a low nibble and `j + 16` the high one of the same byte. `x = d * (sc - 32) * LEVELS[q]`.
    """

    name = "IQ4_XS"
    block_size, block_bytes, ggml_type = 256, 136, 23

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d, sc, scaled = symmetric_super_block(
            self.name, blocks, 32, nearest_level, extreme=LEVELS[0], scale_extreme=-32, steps=range(-7, 8)
        )
        sc = (sc + 32).to(torch.uint8)
        scales = (half_bytes(self.name, d), pack_fields(sc >> 4, 2, 1), pack_fields(sc & 15, 4, 1))
        return *scales, pack_fields(nearest(scaled, LEVELS), 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        sc = unpack_fields(data[:, 4:8], 4, 1) | unpack_fields(data[:, 2:4], 2, 1) << 4
        scale = half(data, 0) * (sc.to(torch.float32) - 32)
        levels = table(LEVELS, data.device)[unpack_fields(data[:, 8:], 4, 16).int()]
        return (scale[..., None] * levels.reshape(-1, 8, 32)).reshape(-1, 256)

"""IQ4_NL: 32 values, one float16 scale, 4-bit indices into a table of uneven levels."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, nearest, pack_fields, reciprocal, table, unpack_fields
from chandra.quant.search import fit_scale

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def nearest_level(values: torch.Tensor) -> torch.Tensor:
    """The nearest of LEVELS, float32. All bounds between levels are multiples of a half, so a lookup finds it."""
    halves = torch.arange(-256, 257, device=values.device) / 2
    lookup = table(LEVELS, values.device)[nearest(halves, LEVELS)]
    return lookup.take(((2 * values).ceil().clamp(-256, 256) + 256).long())


class IQ4_NL(BlockFormat):
    """`d` float16 | 16 bytes of nibbles (value `j` low, `j + 16` high). `x = d * LEVELS[q]`."""

    name = "IQ4_NL"
    block_size, block_bytes, ggml_type = 32, 18, 20

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = half_bytes(self.name, fit_scale(blocks, nearest_level, LEVELS[0], range(-7, 8)))
        q = nearest(blocks * reciprocal(half(d, 0)), LEVELS)
        return d, pack_fields(q, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return half(data, 0) * table(LEVELS, data.device)[unpack_fields(data[:, 2:], 4, 16).int()]

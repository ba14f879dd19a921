"""Q4_K: 256 values in 8 groups of 32, 4-bit values, 6-bit scales and minimums."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, pack_fields, unpack_fields
from chandra.quant.search import affine_super_block


class Q4_K(BlockFormat):
    """`d`, `dmin` float16 | 12 bytes of scales and minimums | 128 bytes of nibbles, runs of 32 bytes.

    `x = d * sc * q - dmin * m`.
    """

    name = "Q4_K"
    block_size, block_bytes, ggml_type = 256, 144, 12

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d, dmin, sc, m, q = affine_super_block(self.name, blocks, group=32, top=15, scale_top=63)
        scales = (half_bytes(self.name, d), half_bytes(self.name, dmin), pack_scales(sc, m))
        return *scales, pack_fields(q, 4, 32)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        sc, m = unpack_scales(data[:, 4:16])
        scale, shift = half(data, 0) * sc, half(data, 2) * m
        q = unpack_fields(data[:, 16:], 4, 32).reshape(-1, 8, 32)
        return (scale[..., None] * q - shift[..., None]).reshape(-1, 256)


def pack_scales(sc: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """6-bit scales and minimums, each `(n, 8)`, as 12 bytes (Q4_K and Q5_K).

    4 bytes hold the first scales, 4 the first minimums, 4 the low nibbles of the other scales and minimums; the upper
    bit pairs of those are the upper bits of the first 8 bytes.
    """
    sc, m = sc.to(torch.uint8), m.to(torch.uint8)
    first = torch.cat((sc[:, :4] | sc[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6), 1)
    return torch.cat((first, sc[:, 4:] & 15 | m[:, 4:] << 4), 1)


def unpack_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_scales`, uint8."""
    sc, m, nibbles = data[:, :4], data[:, 4:8], data[:, 8:]
    return (
        torch.cat((sc & 63, nibbles & 15 | sc >> 6 << 4), 1),
        torch.cat((m & 63, nibbles >> 4 | m >> 6 << 4), 1),
    )

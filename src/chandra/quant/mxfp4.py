"""MXFP4: 32 values of E2M1 with a shared power of two (OCP Microscaling Formats specification 1.0)."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import nearest, pack_fields, table, unpack_fields

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # E2M1 doubled, so that they are whole


class MXFP4(BlockFormat):
    """`e` uint8 | 16 bytes of nibbles (value `j` low, `j + 16` high). `x = 2**(e - 128) * level[q]`, sign in bit 3."""

    name = "MXFP4"
    block_size, block_bytes, ggml_type = 32, 17, 39

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        largest = blocks.abs().amax(1, keepdim=True)
        e = torch.where(largest > 0, largest.frexp().exponent + 124, 0).clamp(0, 254)
        q = nearest(blocks.abs() / self.scale(e), MAGNITUDES)
        q = q | ((blocks < 0) & (q > 0)) * 8
        return e.to(torch.uint8), pack_fields(q, 4, 16)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        levels = table((*MAGNITUDES, *(-level for level in MAGNITUDES)), data.device)
        return self.scale(data[:, :1].to(torch.int32)) * levels[unpack_fields(data[:, 1:], 4, 16).int()]

    @staticmethod
    def scale(e: torch.Tensor) -> torch.Tensor:
        """`2**(e - 128)` of an int32 exponent, exact where it is subnormal too."""
        return torch.where(e < 2, (e + 1) << 21, (e - 1) << 23).view(torch.float32)

"""Q8_0: 32 values, one float16 scale, 8-bit values."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat
from chandra.quant.bits import half, half_bytes, reciprocal


class Q8_0(BlockFormat):
    """`d` float16 | 32 int8. `x = d * q`."""

    name = "Q8_0"
    block_size, block_bytes, ggml_type = 32, 34, 8

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = blocks.abs().amax(1, keepdim=True) / 127
        scaled = blocks * reciprocal(d)
        whole = scaled.trunc()
        q = whole + (2 * (scaled - whole)).trunc()  # halves away from zero, as the format's reference does
        return half_bytes(self.name, d), q.to(torch.int8).view(torch.uint8)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return half(data, 0) * data[:, 2:].contiguous().view(torch.int8)

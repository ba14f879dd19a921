"""F32, F16 and BF16: plain floats, blocks of one value in little-endian bytes."""

from __future__ import annotations

from chandra.lazy import torch
from chandra.quant.base import BlockFormat, require_finite


class F32(BlockFormat):
    """IEEE 754 single precision."""

    name = "F32"
    block_size, block_bytes, ggml_type = 1, 4, 0

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (blocks.view(torch.uint8),)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return data.contiguous().view(torch.float32)


class F16(BlockFormat):
    """IEEE 754 half precision. Packing raises `UnsupportedError` where a finite value would become infinite."""

    name = "F16"
    block_size, block_bytes, ggml_type = 1, 2, 1

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = blocks.to(torch.float16)
        require_finite(self.name, halves[torch.isfinite(blocks)])
        return (halves.view(torch.uint8),)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return data.contiguous().view(torch.float16).to(torch.float32)


class BF16(BlockFormat):
    """The upper half of a single: 8 bits of exponent, 7 of fraction; rounded to nearest, ties to even."""

    name = "BF16"
    block_size, block_bytes, ggml_type = 1, 2, 30

    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (blocks.to(torch.bfloat16).view(torch.uint8),)

    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        return data.contiguous().view(torch.bfloat16).to(torch.float32)

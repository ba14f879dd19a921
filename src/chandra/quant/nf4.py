"""nf4 and nf4-dq: NormalFloat4 of QLoRA (https://arxiv.org/abs/2305.14314), bit for bit as bitsandbytes stores it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from chandra.lazy import torch
from chandra.quant.base import CHUNK, Format, Part, require_finite, spans
from chandra.quant.bits import table

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # values per absmax
NESTED_BLOCK = 256  # absmax values per nested absmax


class NF4(Format):
    """Blocks of 64 values, counted flat over the whole tensor. `x = LEVELS[q] * absmax`.

    `data` uint8 `(ceil(values / 2),)`: two a byte, the first in the high nibble; `absmax` float32, one per block.
    """

    name = "nf4"

    @property
    def bits_per_weight(self) -> float:
        return 4 + 32 / BLOCK

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        values = math.prod(shape)
        return Part("data", (-(-values // 2),), "uint8"), Part("absmax", (-(-values // BLOCK),), "float32")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, absmax = (
            torch.empty(part.shape, dtype=getattr(torch, part.dtype), device=weight.device)
            for part in NF4.parts(self, tuple(weight.shape))
        )
        flat = weight.detach().reshape(-1)
        levels = table(LEVELS, weight.device)
        middles = (levels[1:] + levels[:-1]) / 2  # in float32, to decide ties as bitsandbytes does
        for start, stop in spans(len(flat), CHUNK):
            values = flat[start:stop].to(torch.float32)
            require_finite(self.name, values)
            blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
            largest = blocks.abs().amax(1, keepdim=True)
            scaled = (blocks * (1.0 / largest.clamp(min=1e-38))).clamp(-1, 1)
            q = torch.bucketize(scaled, middles).to(torch.uint8).reshape(-1)
            data[start // 2 : -(-stop // 2)] = (q[::2] << 4 | q[1::2])[: -(-len(values) // 2)]
            absmax[start // BLOCK : -(-stop // BLOCK)] = largest[:, 0]
        return {"data": data, "absmax": absmax}

    def unpack_rows(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], start: int, stop: int
    ) -> torch.Tensor:
        first, last = start * shape[-1], stop * shape[-1]
        block = first // BLOCK
        data = parts["data"].reshape(-1)[block * BLOCK // 2 : -(-last // 2)]
        q = torch.stack((data >> 4, data & 15), 1).reshape(-1)
        absmax = self.absmax(parts, block, -(-last // BLOCK)).repeat_interleave(BLOCK)[: len(q)]
        values = table(LEVELS, data.device)[q.int()] * absmax
        return values[first - block * BLOCK : last - block * BLOCK].reshape(stop - start, shape[-1])

    def absmax(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """The float32 absmax of some blocks."""
        return parts["absmax"][start:stop]


class NF4DQ(NF4):
    """nf4 with double quantization: `absmax = dynamic_map()[absmax] * nested_absmax + nested_offset`.

    `absmax` uint8, `nested_absmax` float32 one per 256 of them, `nested_offset` float32 `(1,)`.
    """

    name = "nf4-dq"

    @property
    def bits_per_weight(self) -> float:
        return 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        data, absmax = super().parts(shape)
        nested = Part("nested_absmax", (-(-absmax.shape[0] // NESTED_BLOCK),), "float32")
        return data, Part("absmax", absmax.shape, "uint8"), nested, Part("nested_offset", (1,), "float32")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = super().pack(weight)
        absmax = packed["absmax"]
        offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
        blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
        nested = blocks.abs().amax(1, keepdim=True)
        levels = dynamic_map().to(absmax.device)
        middles = (levels[1:] + levels[:-1]) / 2
        q = torch.bucketize(blocks / nested.clamp(min=1e-38), middles).to(torch.uint8)
        return {
            "data": packed["data"],
            "absmax": q.reshape(-1)[: len(absmax)],
            "nested_absmax": nested[:, 0],
            "nested_offset": offset.reshape(1),
        }

    def absmax(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        q = parts["absmax"][start:stop]
        nested = parts["nested_absmax"][torch.arange(start, stop, device=q.device) // NESTED_BLOCK]
        return dynamic_map().to(q.device)[q.int()] * nested + parts["nested_offset"]


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 ascending levels of the dynamic 8-bit type, float32 (https://arxiv.org/abs/1511.04561).

    Seven decades down from 1; decade `i` from below holds `2**i` levels of each sign, the middles of an even division
    of 0.1 to 1. Zero and one fill up.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += middles + [-level for level in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32)

"""nf4 and nf4-dq: NormalFloat4 of QLoRA (https://arxiv.org/abs/2305.14314), bit for bit as bitsandbytes stores it."""

from __future__ import annotations

import functools
import math

from chandra.lazy import torch
from chandra.quant.base import Format, Part, Tensors
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

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        values = math.prod(shape)
        return Part("data", (-(-values // 2),), "uint8"), Part("absmax", (-(-values // BLOCK),), "float32")

    def unit(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return BLOCK

    def pack_units(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, absmax = nearest_levels(units, table(LEVELS, units.device))
        return q[:, ::2] << 4 | q[:, 1::2], absmax

    def unpack_rows(self, parts: Tensors, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        first, last = start * shape[-1], stop * shape[-1]
        block = first // BLOCK
        data = parts["data"].reshape(-1)[block * BLOCK // 2 : -(-last // 2)]
        q = torch.stack((data >> 4, data & 15), 1).reshape(-1)
        absmax = self.absmax(parts, block, -(-last // BLOCK)).repeat_interleave(BLOCK)[: len(q)]
        values = table(LEVELS, data.device)[q.int()] * absmax
        return values[first - block * BLOCK : last - block * BLOCK].reshape(stop - start, shape[-1])

    def absmax(self, parts: Tensors, start: int, stop: int) -> torch.Tensor:
        """The float32 absmax of some blocks."""
        return parts["absmax"][start:stop]


class NF4DQ(NF4):
    """nf4 with double quantization: `absmax = dynamic_map()[absmax] * nested_absmax + nested_offset`.

    `absmax` uint8, `nested_absmax` float32 one per 256 of them, `nested_offset` float32 `(1,)`.
    """

    name = "nf4-dq"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        data, absmax = super().parts(shape)
        nested = Part("nested_absmax", (-(-absmax.shape[0] // NESTED_BLOCK),), "float32")
        return data, Part("absmax", absmax.shape, "uint8"), nested, Part("nested_offset", (1,), "float32")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, absmax = NF4().pack(weight).values()
        offset = absmax.mean()
        blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
        q, nested = nearest_levels(blocks, dynamic_map().to(absmax.device))
        q, nested = q.reshape(-1)[: len(absmax)], nested.reshape(-1)
        return {"data": data, "absmax": q, "nested_absmax": nested, "nested_offset": offset.reshape(1)}

    def absmax(self, parts: Tensors, start: int, stop: int) -> torch.Tensor:
        q = parts["absmax"][start:stop]
        nested = parts["nested_absmax"][torch.arange(start, stop, device=q.device) // NESTED_BLOCK]
        return dynamic_map().to(q.device)[q.int()] * nested + parts["nested_offset"]


def nearest_levels(blocks: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row: indices of the nearest ascending levels to its values / absmax (uint8), and absmax `(n, 1)`."""
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))).clamp(-1, 1)
    middles = (levels[1:] + levels[:-1]) / 2  # in float32, to decide ties as bitsandbytes does
    return torch.bucketize(scaled, middles).to(torch.uint8), absmax


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

"""int8: one float32 scale per row, as LLM.int8() stores its weights (https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

import math

from chandra.lazy import torch
from chandra.quant.base import Format, Part, Tensors
from chandra.quant.bits import reciprocal


class Int8(Format):
    """`data` int8 `(*rows, columns)`, `scales` float32 `(*rows)`: the largest magnitude / 127. `x = data * scale`."""

    name = "int8"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return Part("data", shape, "int8"), Part("scales", shape[:-1], "float32")

    def unit(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def pack_units(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        largest = units.abs().amax(1, keepdim=True)
        inverse = torch.where(reciprocal(largest) > 0, 127 / largest, 0.0)
        return (units * inverse).round().to(torch.int8), largest / 127

    def unpack_rows(self, parts: Tensors, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        data = parts["data"].reshape(math.prod(shape[:-1]), shape[-1])
        return data[start:stop] * parts["scales"].reshape(-1, 1)[start:stop]

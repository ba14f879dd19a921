"""int8: one float32 scale per row, as LLM.int8() stores its weights (https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from chandra.lazy import torch
from chandra.quant.base import CHUNK, Format, Part, require_finite, spans


class Int8(Format):
    """`data` int8 `(*rows, columns)`, `scales` float32 `(*rows)`: the largest magnitude / 127. `x = data * scale`."""

    name = "int8"

    @property
    def bits_per_weight(self) -> float:
        return 8.0

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return Part("data", shape, "int8"), Part("scales", shape[:-1], "float32")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = weight.detach().reshape(-1, weight.shape[-1])
        data = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty((len(rows), 1), dtype=torch.float32, device=weight.device)
        for start, stop in spans(len(rows), CHUNK // max(1, weight.shape[-1])):
            chunk = rows[start:stop].to(torch.float32)
            require_finite(self.name, chunk)
            largest = chunk.abs().amax(1, keepdim=True)
            inverse = torch.where(largest > 127 / torch.finfo(torch.float32).max, 127 / largest, 0.0)
            data[start:stop] = (chunk * inverse).round().to(torch.int8)
            scales[start:stop] = largest / 127
        return {"data": data.reshape(weight.shape), "scales": scales.reshape(weight.shape[:-1])}

    def unpack_rows(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], start: int, stop: int
    ) -> torch.Tensor:
        rows = parts["data"].reshape(math.prod(shape[:-1]), shape[-1])[start:stop]
        return rows * parts["scales"].reshape(-1, 1)[start:stop]

"""int4: groups of columns with a float16 scale and zero (fits what GPTQ and AWQ store)."""

from __future__ import annotations

import math

from chandra.lazy import torch
from chandra.quant.base import Format, Part, Tensors
from chandra.quant.bits import pack_fields, reciprocal, to_half, unpack_fields
from chandra.quant.search import fit_affine


class Int4(Format):
    """`data` uint8 `(*rows, columns / 2)`: even columns in the low nibbles, odd ones in the high.

    `scales` and `zeros` float16 `(*rows, columns / group_size)`; `x = (q - zero) * scale`, zeros from 0 to 15.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.name = f"int4-g{group_size}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        groups = (*shape[:-1], self.blocks_per_row(shape[-1], self.group_size))
        data = Part("data", (*shape[:-1], shape[-1] // 2), "uint8")
        return data, Part("scales", groups, "float16"), Part("zeros", groups, "float16")

    def unit(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return self.group_size

    def pack_units(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with_zero = torch.nn.functional.pad(units, (0, 1))  # a group on one side of zero must reach it
        scale, offset = fit_affine(with_zero, 15)
        scales = to_half(self.name, scale)
        inverse = reciprocal(scales.to(torch.float32))
        zeros = (offset * inverse).clamp(0, 15).to(torch.float16)
        q = (units * inverse + zeros).round().clamp(0, 15)
        return pack_fields(q, 4, 1), scales, zeros

    def unpack_rows(self, parts: Tensors, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        data, scales, zeros = (
            parts[name].reshape(math.prod(shape[:-1]), -1)[start:stop] for name in ("data", "scales", "zeros")
        )
        q = unpack_fields(data, 4, 1).reshape(-1, self.group_size)
        values = (q - zeros.reshape(-1, 1).to(torch.float32)) * scales.reshape(-1, 1).to(torch.float32)
        return values.reshape(stop - start, shape[-1])

"""int4: groups of columns with a float16 scale and zero (fits what GPTQ and AWQ store)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from chandra.errors import UnsupportedError
from chandra.lazy import torch
from chandra.quant.base import CHUNK, Format, Part, require_finite, spans
from chandra.quant.bits import pack_fields, reciprocal, to_half, unpack_fields
from chandra.quant.search import fit_affine


class Int4(Format):
    """`data` uint8 `(*rows, columns / 2)`: even columns in the low nibbles, odd ones in the high.

    `scales` and `zeros` float16 `(*rows, columns / group_size)`; `x = (q - zero) * scale`, zeros from 0 to 15.
    """

    group_size: ClassVar[int]

    @property
    def bits_per_weight(self) -> float:
        return 4 + 32 / self.group_size

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if shape[-1] % self.group_size:
            raise UnsupportedError(
                f"{self.name} packs groups of {self.group_size} columns; {shape[-1]} is not a multiple",
                "choose a format with smaller groups for this tensor, for example int4-g32 or int8",
            )
        groups = (*shape[:-1], shape[-1] // self.group_size)
        data = Part("data", (*shape[:-1], shape[-1] // 2), "uint8")
        return data, Part("scales", groups, "float16"), Part("zeros", groups, "float16")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = self.parts(tuple(weight.shape))
        groups = weight.detach().reshape(-1, self.group_size)
        widths = (self.group_size // 2, 1, 1)
        packed = [
            torch.empty((len(groups), width), dtype=getattr(torch, part.dtype), device=weight.device)
            for part, width in zip(parts, widths, strict=True)
        ]
        for start, stop in spans(len(groups), CHUNK // self.group_size):
            for whole, piece in zip(packed, self.pack_groups(groups[start:stop].to(torch.float32)), strict=True):
                whole[start:stop] = piece
        return {part.name: whole.reshape(part.shape) for part, whole in zip(parts, packed, strict=True)}

    def pack_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 `(n, group_size)` -> nibbles `(n, group_size / 2)`, scales and zeros `(n, 1)`."""
        require_finite(self.name, groups)
        groups_and_zero = torch.cat((groups, torch.zeros_like(groups[:, :1])), 1)  # the zero must lie in 0..15
        scale, offset = fit_affine(groups_and_zero, 15, [0.1 * i - 1 for i in range(21)])
        scales = to_half(self.name, scale)
        inverse = reciprocal(scales.to(torch.float32))
        zeros = (offset * inverse).clamp(0, 15).to(torch.float16)
        q = (groups * inverse + zeros).round().clamp(0, 15)
        return pack_fields(q, 4, 1), scales, zeros

    def unpack_rows(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], start: int, stop: int
    ) -> torch.Tensor:
        rows = math.prod(shape[:-1])
        q = unpack_fields(parts["data"].reshape(rows, -1)[start:stop], 4, 1).reshape(-1, self.group_size)
        scales, zeros = (
            parts[name].reshape(rows, -1)[start:stop].reshape(-1, 1).to(torch.float32) for name in ("scales", "zeros")
        )
        return ((q - zeros) * scales).reshape(stop - start, shape[-1])


class Int4G32(Int4):
    """Groups of 32."""

    name, group_size = "int4-g32", 32


class Int4G64(Int4):
    """Groups of 64."""

    name, group_size = "int4-g64", 64


class Int4G128(Int4):
    """Groups of 128."""

    name, group_size = "int4-g128", 128

"""What a weight format is: how many bytes, in which parts, and how to pack and unpack it.

A format is a file of this package. It knows nothing about devices or kernels: fast kernels are registered by the
backends, and a format without one works through `unpack`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from chandra.errors import UnsupportedError
from chandra.lazy import torch

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"  # the parts of a weight, by name

CHUNK = 1 << 18  # values packed or unpacked at once: bounds the temporaries, and keeps them in the cache


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of consecutive pieces of at most `step` (at least 1) that cover `range(total)`."""
    step = max(1, step)
    return ((start, min(start + step, total)) for start in range(0, total, step))


def require_finite(name: str, values: torch.Tensor) -> None:
    """Raise `UnsupportedError` if a value that format `name` is to hold is infinite or not a number."""
    if not bool(torch.isfinite(values).all()):
        raise UnsupportedError(
            f"the weight has values that are infinite, not a number, or too large for {name}",
            "keep this tensor in BF16 or F32, or check whether the model file is damaged",
        )


@dataclass(frozen=True)
class Part:
    """One stored array of a packed weight: `data`, `scales`, `zeros`, …"""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a numpy dtype name; bfloat16 is stored as uint16

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Format(ABC):
    """A weight format. Shapes are logical: `(rows, columns)` or `(experts, rows, columns)`; columns are the inputs."""

    name: str

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The arrays that hold a weight of this shape. Raises `UnsupportedError` if the shape cannot be packed."""

    @abstractmethod
    def unit(self, shape: tuple[int, ...]) -> int:
        """How many consecutive values are packed by themselves: a block, a group or a row."""

    @abstractmethod
    def pack_units(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float32 `(n, unit)` -> for each part, its entries for these units `(n, k)`."""

    @abstractmethod
    def unpack_rows(self, parts: Tensors, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """float32 `(stop - start, columns)`: some rows, without touching the others.

        Rows are counted through the leading dimensions: row `r` of expert `e` is `e * rows + r`.
        """

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack a weight of any float dtype: one tensor for each of `parts(weight.shape)`, in its shape and dtype.

        Raises `UnsupportedError` if the shape does not fit or a value is not finite (plain floats keep those).
        """
        shape = tuple(weight.shape)
        packed = {
            part.name: torch.empty(part.shape, dtype=getattr(torch, part.dtype), device=weight.device)
            for part in self.parts(shape)
        }
        flat, unit = weight.detach().reshape(-1), self.unit(shape)
        for start, stop in spans(len(flat), CHUNK // unit * unit or unit):
            values = flat[start:stop].to(torch.float32)
            if unit > 1:  # plain floats hold infinities
                require_finite(self.name, values)
            units = torch.nn.functional.pad(values, (0, -len(values) % unit)).reshape(-1, unit)
            for whole, piece in zip(packed.values(), self.pack_units(units), strict=True):
                target = whole.view(-1)[start // unit * piece.shape[1] :][: piece.numel()]
                target.copy_(piece.reshape(-1)[: len(target)])
        return packed

    def unpack(self, parts: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
        """The float32 weight of this shape: the reference every kernel is tested against."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        out = torch.empty((rows, columns), dtype=torch.float32, device=next(iter(parts.values())).device)
        for start, stop in spans(rows, CHUNK // max(1, columns)):
            out[start:stop] = self.unpack_rows(parts, shape, start, stop)
        return out.reshape(shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes a weight of this shape takes, summed over its parts."""
        return sum(part.nbytes for part in self.parts(shape))

    @property
    def bits_per_weight(self) -> float:
        """Bits a value of a large matrix takes, scales included. To plan, sum `nbytes` of the real shapes."""
        return 8 * self.nbytes((1 << 14, 1 << 14)) / (1 << 28)

    def blocks_per_row(self, columns: int, block_size: int) -> int:
        """Raises `UnsupportedError` if the columns are not a multiple of the block size."""
        if columns % block_size:
            raise UnsupportedError(
                f"{self.name} packs {block_size} values at once; a row of {columns} is not a multiple",
                "choose a format with smaller blocks for this tensor, for example Q8_0 or F16",
            )
        return columns // block_size


class BlockFormat(Format):
    """A format whose rows are runs of self-contained blocks (all GGUF types, and plain floats as blocks of one).

    One part, `data`: uint8 of shape `(*leading, columns / block_size * block_bytes)`.
    """

    block_size: ClassVar[int]  # elements
    block_bytes: ClassVar[int]
    ggml_type: ClassVar[int]  # GGML_TYPE_* of the GGUF specification

    @abstractmethod
    def pack_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float32 `(n, block_size)` -> the fields of the blocks in their order, uint8 `(n, bytes)` each."""

    @abstractmethod
    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 `(n, block_bytes)` -> float32 `(n, block_size)`."""

    def row_bytes(self, columns: int) -> int:
        return self.blocks_per_row(columns, self.block_size) * self.block_bytes

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("data", (*shape[:-1], self.row_bytes(shape[-1])), "uint8"),)

    def unit(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return self.block_size

    def pack_units(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat(self.pack_blocks(units), 1),)

    def unpack_rows(self, parts: Tensors, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        rows = parts["data"].reshape(math.prod(shape[:-1]), self.row_bytes(shape[-1]))[start:stop]
        return self.unpack_blocks(rows.reshape(-1, self.block_bytes)).reshape(len(rows), shape[-1])


@dataclass(frozen=True)
class PackedWeight:
    """A weight in host memory (often a view of a mapped file), in some format.

    `parts` are numpy arrays as `format.parts(shape)` describes them.
    """

    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, np.ndarray[Any, Any]]

    @classmethod
    def pack(cls, format: Format, weight: torch.Tensor) -> PackedWeight:
        """Pack a weight, wherever it is, into host memory (imports torch). Raises what `format.pack` raises."""
        parts = {name: part.cpu().numpy() for name, part in format.pack(weight).items()}
        return cls(format, tuple(weight.shape), parts)

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self.parts.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts as CPU tensors over the same memory (imports torch); read-only arrays are copied."""
        return {
            name: torch.from_numpy(part if part.flags.writeable else part.copy()) for name, part in self.parts.items()
        }

    def unpack(self) -> torch.Tensor:
        """The whole weight as float32 on the CPU (imports torch)."""
        return self.format.unpack(self.tensors(), self.shape)

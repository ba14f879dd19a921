"""What a weight format is: how many bytes, in which parts, and how to pack and unpack it.

A format is a file of this package. It knows nothing about devices or kernels: fast kernels are registered by the
backends, and a format without one works through `unpack`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from chandra.errors import UnsupportedError
from chandra.lazy import torch


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

    name: ClassVar[str]

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The arrays that hold a weight of this shape. Raises `UnsupportedError` if the shape cannot be packed."""

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack a float32 weight. Returns one tensor for each of `parts(weight.shape)`, in its shape and dtype."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """The float32 weight of this shape: the reference every kernel is tested against."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes a weight of this shape takes, summed over its parts."""
        return sum(part.nbytes for part in self.parts(shape))


class BlockFormat(Format):
    """A format whose rows are runs of self-contained blocks (all GGUF types, and plain floats as blocks of one).

    One part, `data`: uint8 of shape `(*leading, columns / block_size * block_bytes)`.
    """

    block_size: ClassVar[int]  # elements
    block_bytes: ClassVar[int]
    ggml_type: ClassVar[int]  # GGML_TYPE_* of the GGUF specification

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("data", (*shape[:-1], self.row_bytes(shape[-1])), "uint8"),)

    def row_bytes(self, columns: int) -> int:
        if columns % self.block_size:
            raise UnsupportedError(
                f"{self.name} packs blocks of {self.block_size} values; a row of {columns} is not a multiple",
                "choose a format with smaller blocks for this tensor, for example Q8_0 or F16",
            )
        return columns // self.block_size * self.block_bytes

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.detach().to(torch.float32).reshape(-1, self.block_size)
        data = self.pack_blocks(blocks)
        return {"data": data.reshape(*weight.shape[:-1], self.row_bytes(weight.shape[-1]))}

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        return self.unpack_blocks(parts["data"].reshape(-1, self.block_bytes)).reshape(shape)

    @abstractmethod
    def pack_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """float32 `(n, block_size)` -> uint8 `(n, block_bytes)`."""

    @abstractmethod
    def unpack_blocks(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 `(n, block_bytes)` -> float32 `(n, block_size)`."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight in host memory (often a view of a mapped file), in some format.

    `parts` are numpy arrays as `format.parts(shape)` describes them.
    """

    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self.parts.values())

    def unpack(self) -> torch.Tensor:
        """The whole weight as float32 on the CPU (imports torch)."""
        return self.format.unpack({name: torch.from_numpy(part) for name, part in self.parts.items()}, self.shape)

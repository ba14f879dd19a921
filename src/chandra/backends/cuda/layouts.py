"""How weights lie in the memory of a GPU: the codes of all formats in one form, and their scales.

Codes: a row is spans of `planes * width` columns, each stored as `width` words of 32 bits; bit field `i` of word `w` is
column `i * width + w` of the span. So 16 bytes are 32 codes of 4 bits, and one field of all words is a run of columns.
Further bits lie beside in the same order, 8 or 16 bits a word. Codes of 8 bits are stored around 128.

Scales: by group, then row, as neighbouring threads hold neighbouring rows. A scale and its minimum or zero are halves
of one word. The small scales of super-blocks (K-quants, IQ4_XS) are kept in words of nibbles and of upper bit pairs.

The sizes are those of the formats, except: IQ4_XS takes 1.5 % more (its upper bit pairs fill half a word), rows are
padded to a multiple of 32, and columns to a multiple of `planes * 16` (128 of 4 bits, 64 of 8 bits, 32 of floats),
which the widths of most models are. Where nf4 blocks straddle rows, the weight is stored as float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from chandra.lazy import torch
from chandra.quant import nf4
from chandra.quant.base import Format
from chandra.quant.iq4_nl import LEVELS as IQ4_LEVELS
from chandra.quant.mxfp4 import MAGNITUDES

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Parts: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Array: TypeAlias = Any  # of numpy or torch

ROWS = 32  # rows are padded to a multiple of this
ALIGNMENT = 128  # bytes
SUPER = 256  # columns of a super-block


@dataclass(frozen=True)
class Layout:
    """The form of a format. `kind` names how scales are stored (`unpack_kernels.affine` reads them)."""

    bits: int  # in the words; 16 and 32 are plain floats
    kind: str
    scale_dtype: str = "float16"
    group: int = 32  # columns of one scale; 0 is a row
    high: int = 0  # further bits of a code
    offset: int = 0  # the code of zero, where there is no minimum
    small: int = 0  # words of small scales in a super-block
    levels: tuple[float, ...] = ()

    @property
    def planes(self) -> int:
        return 32 // self.bits if self.bits <= 8 else 1


_MXFP4_LEVELS = (*MAGNITUDES, *(-level for level in MAGNITUDES))
LAYOUTS = {
    "F32": Layout(32, "plain"),
    "F16": Layout(16, "plain"),
    "BF16": Layout(16, "plain", "uint16"),
    "Q4_0": Layout(4, "half", offset=8),
    "Q4_1": Layout(4, "affine", "int32"),
    "Q5_0": Layout(4, "half", high=1, offset=16),
    "Q5_1": Layout(4, "affine", "int32", high=1),
    "Q8_0": Layout(8, "half"),
    "Q2_K": Layout(2, "k4", "int32", group=16, small=4),
    "Q3_K": Layout(2, "s6", group=16, high=1, offset=4, small=3),
    "Q4_K": Layout(4, "k6", "int32", small=3),
    "Q5_K": Layout(4, "k6", "int32", high=1, small=3),
    "Q6_K": Layout(4, "s8", group=16, high=2, offset=32, small=4),
    "IQ4_NL": Layout(4, "half", levels=IQ4_LEVELS),
    "IQ4_XS": Layout(4, "s6", small=2, levels=IQ4_LEVELS),
    "MXFP4": Layout(4, "power", "uint8", levels=_MXFP4_LEVELS),
    "int8": Layout(8, "row", "float32", group=0),
    **{f"int4-g{group}": Layout(4, "zero", "int32", group=group) for group in (32, 64, 128)},
    "nf4": Layout(4, "float", "float32", group=nf4.BLOCK, levels=nf4.LEVELS),
    "nf4-dq": Layout(4, "nested", "uint8", group=nf4.BLOCK, levels=nf4.LEVELS),
}


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Arrangement:
    """A layout at a shape: `stored` is the padded shape, `arrays` the name, dtype and shape of what is stored."""

    layout: Layout
    shape: tuple[int, int, int]  # experts, rows, columns
    stored: tuple[int, int, int]
    width: int
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def spans(self) -> int:
        return self.stored[2] // (self.width * self.layout.planes)

    @property
    def pitch(self) -> int:
        """Words (or floats) of a row: a multiple of 16, which lets kernels load 16 bytes at a time."""
        return self.stored[2] // self.layout.planes

    @property
    def nbytes(self) -> int:
        """Alignment and padding included."""
        return sum(_aligned(_bytes_of(dtype, shape)) for _, dtype, shape in self.arrays)

    def views(self, memory: Array) -> dict[str, Array]:
        """The arrays in memory of so many bytes (uint8, aligned to 128): on the host numpy's, else torch's."""
        views, start, on_host = {}, 0, isinstance(memory, np.ndarray)
        for name, dtype, shape in self.arrays:
            there = {"uint16": "bfloat16" if self.layout.kind == "plain" else "int16"}.get(dtype, dtype)
            nbytes = _bytes_of(dtype, shape)
            views[name] = memory[start : start + nbytes].view(dtype if on_host else getattr(torch, there))
            views[name] = views[name].reshape(shape)
            start += _aligned(nbytes)
        return views


def arrange(format: Format, shape: tuple[int, ...]) -> Arrangement:
    """The layout of a format at a shape `(rows, columns)` or `(experts, rows, columns)`."""
    experts, rows, columns = (1, *shape)[-3:]
    layout = LAYOUTS[format.name]
    if layout.kind in ("float", "nested") and columns % layout.group:
        layout = LAYOUTS["F32"]
    if layout.kind == "plain":
        width = 64 if layout.bits == 16 and columns % 64 == 0 else 32
    else:
        width = 32 if layout.group != 16 and columns % (32 * layout.planes) == 0 else 16
    span = width * layout.planes
    stored = experts, -(-rows // ROWS) * ROWS, -(-columns // span) * span
    return Arrangement(layout, (experts, rows, columns), stored, width, _arrays(layout, stored))


def _arrays(layout: Layout, stored: tuple[int, int, int]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    experts, rows, columns = stored
    if layout.kind == "plain":
        dtype = {"float16": "float16", "uint16": "uint16"}[layout.scale_dtype] if layout.bits == 16 else "float32"
        return (("codes", dtype, stored),)
    words = experts, rows, columns // layout.planes
    groups = columns // (SUPER if layout.small else layout.group) if layout.group else 1
    arrays: list[tuple[str, str, tuple[int, ...]]] = [("codes", "int32", words)]
    arrays.append(("scales", layout.scale_dtype, (experts, groups, rows)))
    if layout.high:
        arrays.append(("high", f"uint{layout.high * layout.planes}", words))
    if layout.small:
        arrays.append(("small", "int32", (experts, groups * layout.small, rows)))
    if layout.kind == "nested":  # the offset, the levels of absmax, the nested absmax
        arrays.append(("small", "float32", (257 + -(-experts * rows * columns // nf4.BLOCK // nf4.NESTED_BLOCK),)))
    if layout.levels:
        arrays.append(("levels", "float16", (16,)))
    return tuple(arrays)


def weight_nbytes(format: Format, shape: tuple[int, ...]) -> int:
    """Bytes of a weight in device memory, alignment and padding included."""
    return arrange(format, shape).nbytes


@functools.cache
def level_bytes(levels: tuple[float, ...], bfloat16: bool) -> tuple[int, ...]:
    """16 levels as float16 or bfloat16: their lower bytes in four words, then the upper ones. None for no levels."""
    values = np.array(levels, np.float32)
    if bfloat16:
        bits = values.view(np.uint32)
        halves = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    else:
        halves = values.astype(np.float16).view(np.uint16)
    return tuple(np.ascontiguousarray(halves.view(np.uint8).reshape(-1, 2).T).view(np.int32).reshape(-1).tolist())


@dataclass(frozen=True)
class DeviceWeight:
    """A weight in device memory. Arrays that its layout lacks are those of the codes again."""

    arrangement: Arrangement
    codes: torch.Tensor
    high: torch.Tensor
    scales: torch.Tensor
    small: torch.Tensor
    levels: torch.Tensor


def bind(format: Format, shape: tuple[int, ...], memory: torch.Tensor) -> DeviceWeight:
    """A weight over device memory (uint8, 128-byte aligned) that holds, or will hold, what `pack` writes."""
    arrangement = arrange(format, shape)
    views = arrangement.views(memory)
    codes = views["codes"]
    others: list[Any] = [views.get(name, codes) for name in ("high", "scales", "small", "levels")]
    return DeviceWeight(arrangement, codes, *others)

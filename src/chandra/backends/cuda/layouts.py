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
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from chandra.lazy import torch
from chandra.quant import nf4
from chandra.quant.base import Format, PackedWeight, spans
from chandra.quant.iq4_nl import LEVELS as IQ4_LEVELS
from chandra.quant.mxfp4 import MAGNITUDES

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Parts: TypeAlias = Mapping[str, np.ndarray[Any, Any]]

ROWS = 32  # rows are padded to a multiple of this
ALIGNMENT = 128  # bytes
CHUNK = 1 << 18  # values that a thread repacks at once, in some 8 bytes each
THREADS = 8  # that repack
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
_LAYOUTS = {
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

    def places(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Name, dtype, shape and first byte of every array, and the total as the first byte of none."""
        places, start = [], 0
        for name, dtype, shape in self.arrays:
            places.append((name, dtype, shape, start))
            start += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        return [*places, ("", "", (), start)]


def arrange(format: Format, shape: tuple[int, ...]) -> Arrangement:
    """The layout of a format at a shape `(rows, columns)` or `(experts, rows, columns)`."""
    experts, rows, columns = (1, *shape)[-3:]
    layout = _LAYOUTS[format.name]
    if layout.kind in ("float", "nested") and columns % layout.group:
        layout = _LAYOUTS["F32"]
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
    return arrange(format, shape).places()[-1][3]


def pack(weight: PackedWeight, out: Bytes) -> None:
    """Write the device layout of a weight into host memory: uint8, of `weight_nbytes` bytes."""
    arrangement = arrange(weight.format, weight.shape)
    out[:] = 0
    arrays = {
        name: out[start : start + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        for name, dtype, shape, start in arrangement.places()[:-1]
    }
    (experts, rows, columns), layout = arrangement.shape, arrangement.layout
    if layout.levels:
        arrays["levels"][:] = layout.levels
    if layout.kind == "nested":
        nested = weight.parts["nested_absmax"]
        arrays["small"][0] = weight.parts["nested_offset"][0]
        arrays["small"][1:257] = nf4.dynamic_map().numpy()
        arrays["small"][257 : 257 + len(nested)] = nested

    def repack(piece: tuple[int, tuple[int, int]]) -> None:
        expert, (start, stop) = piece
        own = {name: array[expert] for name, array in arrays.items() if array.ndim == 3}
        first, last = expert * rows + start, expert * rows + stop
        if layout.kind == "plain":
            own["codes"][start:stop, :columns] = _floats(weight, first, last)
        else:
            _store(_READERS[weight.format.name](weight, first, last), own, arrangement, start, stop)

    from concurrent.futures import ThreadPoolExecutor  # here: plans without a GPU do without

    with ThreadPoolExecutor(THREADS) as pool:  # numpy lets go of the interpreter
        list(pool.map(repack, itertools.product(range(experts), spans(rows, CHUNK // columns))))


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
class Values:
    """Some rows of a weight: codes uint8 `(n, columns)`, scales `(n, groups)`, small scales uint32 `(n, words)`."""

    codes: Bytes
    scales: np.ndarray[Any, Any]
    small: np.ndarray[Any, Any] | None = None


def _store(values: Values, own: Parts, arrangement: Arrangement, start: int, stop: int) -> None:
    layout, width, planes, n = arrangement.layout, arrangement.width, arrangement.layout.planes, stop - start
    padding = arrangement.stored[2] - arrangement.shape[2]
    codes = np.pad(values.codes, ((0, 0), (0, padding))) if padding else values.codes
    by_plane = np.ascontiguousarray(codes.reshape(n, -1, planes, width).transpose(2, 0, 1, 3))
    low = by_plane & ((1 << layout.bits) - 1) if layout.high else by_plane
    in_words, per_byte = own["codes"][start:stop].view(np.uint8).reshape(n, -1, width, 4), 8 // layout.bits
    for byte in range(4):
        value = low[byte * per_byte]
        for i in range(1, per_byte):
            value = value | low[byte * per_byte + i] << layout.bits * i
        in_words[..., byte] = value
    if layout.high:
        upper = (by_plane >> layout.bits).astype(own["high"].dtype)
        own["high"][start:stop] = sum(upper[i] << layout.high * i for i in range(planes)).reshape(n, -1)
    own["scales"][: values.scales.shape[1], start:stop] = values.scales.T.view(own["scales"].dtype)
    if values.small is not None:
        own["small"][:, start:stop] = values.small.T.view(np.int32)


def _floats(weight: PackedWeight, start: int, stop: int) -> np.ndarray[Any, Any]:
    dtype = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}.get(weight.format.name)
    if dtype is None:
        return weight.format.unpack_rows(weight.tensors(), weight.shape, start, stop).numpy()
    rows: np.ndarray[Any, Any] = _rows(weight, "data", start, stop).view(dtype)
    return rows


def _rows(weight: PackedWeight, part: str, start: int, stop: int) -> np.ndarray[Any, Any]:
    return weight.parts[part].reshape(math.prod(weight.shape[:-1]), -1)[start:stop]


def fields(data: Bytes, bits: int, run: int) -> Bytes:
    """Bit fields of runs of bytes `(..., k)` -> `(..., k * 8 / bits)`, as `quant.bits.unpack_fields`."""
    data = np.ascontiguousarray(data)
    values = np.empty((*data.shape[:-1], data.shape[-1] // run, 8 // bits, run), np.uint8)
    for i in range(8 // bits):  # long runs of bytes are what numpy is fast with
        values[..., i, :] = ((data >> bits * i) & ((1 << bits) - 1)).reshape(*data.shape[:-1], -1, run)
    return values.reshape(*data.shape[:-1], -1)


def words(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Numbers of `bits` bits `(..., k)` -> uint32 words `(..., k * bits / 32)`, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % len(shifts))])
    shifted = parts.reshape(*parts.shape[:-1], -1, len(shifts)).astype(np.uint32) << shifts
    total: np.ndarray[Any, np.dtype[np.uint32]] = shifted.sum(-1, dtype=np.uint32)
    return total


def _blocks(read: Callable[[Bytes], tuple[Any, ...]], size: int) -> Callable[[PackedWeight, int, int], Values]:
    """A reader of GGUF blocks: `read` takes them `(n, blocks, bytes)` and returns codes, scales and small scales."""

    def reader(weight: PackedWeight, start: int, stop: int) -> Values:
        data = np.ascontiguousarray(_rows(weight, "data", start, stop)).reshape(stop - start, -1, size)
        codes, scales, *small = (np.ascontiguousarray(part) for part in read(data))
        rest = small[0].reshape(len(data), -1) if small else None
        return Values(codes.reshape(len(data), -1), scales.reshape(len(data), -1), rest)

    return reader


def _half(b: Bytes, at: int) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(b[..., at : at + 2]).view(np.float16)


def _pair(b: Bytes, at: int) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(b[..., at : at + 4]).view(np.int32)


def _six(b: Bytes) -> np.ndarray[Any, Any]:
    """Scales and minimums of Q4_K and Q5_K."""
    first, rest = b[..., 4:12], b[..., 12:16]
    low = np.concatenate((first[..., :4] & 15, rest & 15, first[..., 4:] & 15, rest >> 4), -1)
    high = first & 63, first >> 6
    upper = np.concatenate((high[0][..., :4] >> 4, high[1][..., :4], high[0][..., 4:] >> 4, high[1][..., 4:]), -1)
    return np.concatenate((words(low, 4), words(upper, 2)), -1)


def _fifth(nibbles: Bytes, bits: Bytes) -> Any:
    return nibbles | bits << 4


def _signed(sc: Any) -> np.ndarray[Any, Any]:
    """6-bit scales of Q3_K and IQ4_XS."""
    return np.concatenate((words(sc & 15, 4), words(sc >> 4, 2)), -1)


_READERS: dict[str, Callable[[PackedWeight, int, int], Values]] = {
    "Q4_0": _blocks(lambda b: (fields(b[..., 2:], 4, 16), _half(b, 0)), 18),
    "IQ4_NL": _blocks(lambda b: (fields(b[..., 2:], 4, 16), _half(b, 0)), 18),
    "MXFP4": _blocks(lambda b: (fields(b[..., 1:], 4, 16), b[..., :1]), 17),
    "Q4_1": _blocks(lambda b: (fields(b[..., 4:], 4, 16), _pair(b, 0)), 20),
    "Q5_0": _blocks(lambda b: (_fifth(fields(b[..., 6:], 4, 16), fields(b[..., 2:6], 1, 1)), _half(b, 0)), 22),
    "Q5_1": _blocks(lambda b: (_fifth(fields(b[..., 8:], 4, 16), fields(b[..., 4:8], 1, 1)), _pair(b, 0)), 24),
    "Q8_0": _blocks(lambda b: (b[..., 2:] ^ 0x80, _half(b, 0)), 34),
    "Q2_K": _blocks(
        lambda b: (
            fields(b[..., 16:80], 2, 32),
            _pair(b, 80),
            np.concatenate((words(b[..., :16] & 15, 4), words(b[..., :16] >> 4, 4)), -1),
        ),
        84,
    ),
    "Q3_K": _blocks(
        lambda b: (
            fields(b[..., 32:96], 2, 32) | fields(b[..., :32], 1, 32) << 2,
            _half(b, 108),
            _signed(fields(b[..., 96:104], 4, 8) | fields(b[..., 104:108], 2, 4) << 4),
        ),
        110,
    ),
    "Q4_K": _blocks(lambda b: (fields(b[..., 16:], 4, 32), _pair(b, 0), _six(b)), 144),
    "Q5_K": _blocks(
        lambda b: (_fifth(fields(b[..., 48:], 4, 32), fields(b[..., 16:48], 1, 32)), _pair(b, 0), _six(b)), 176
    ),
    "Q6_K": _blocks(
        lambda b: (
            _fifth(fields(b[..., :128], 4, 64), fields(b[..., 128:192], 2, 32)),
            _half(b, 208),
            words(b[..., 192:208], 8),
        ),
        210,
    ),
    "IQ4_XS": _blocks(
        lambda b: (
            fields(b[..., 8:], 4, 16),
            _half(b, 0),
            _signed(fields(b[..., 4:8], 4, 1) | fields(b[..., 2:4], 2, 1) << 4),
        ),
        136,
    ),
}


def _read_int8(weight: PackedWeight, start: int, stop: int) -> Values:
    codes: Bytes = _rows(weight, "data", start, stop).view(np.uint8) ^ np.uint8(0x80)
    return Values(codes, _rows(weight, "scales", start, stop))


def _read_int4(weight: PackedWeight, start: int, stop: int) -> Values:
    scales, zeros = (_rows(weight, part, start, stop).view(np.uint16).astype(np.uint32) for part in ("scales", "zeros"))
    return Values(fields(_rows(weight, "data", start, stop), 4, 1), (scales | zeros << 16).view(np.int32))


def _read_nf4(weight: PackedWeight, start: int, stop: int) -> Values:
    q = _rows(weight, "data", start, stop)
    codes: Bytes = np.stack((q >> 4, q & 15), -1).reshape(stop - start, -1)
    return Values(codes, _rows(weight, "absmax", start, stop))


_READERS |= {"int8": _read_int8, "nf4": _read_nf4, "nf4-dq": _read_nf4}
_READERS |= {name: _read_int4 for name in _LAYOUTS if name.startswith("int4-")}


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
    views = {}
    for name, dtype, stored, start in arrangement.places()[:-1]:
        kind = {"uint16": "bfloat16" if arrangement.layout.kind == "plain" else "int16"}.get(dtype, dtype)
        end = start + math.prod(stored) * np.dtype(dtype).itemsize
        views[name] = memory[start:end].view(getattr(torch, kind)).view(stored)
    codes = views["codes"]
    return DeviceWeight(arrangement, codes, *(views.get(k, codes) for k in ("high", "scales", "small", "levels")))

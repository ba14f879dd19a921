"""Writing weights in the layouts of `layouts.py`: on the host, in pieces, by several threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from chandra.backends.cuda.layouts import LAYOUTS, ROWS, Arrangement, Array, Bytes, Layout, arrange
from chandra.quant import nf4
from chandra.quant.base import PackedWeight, spans

Parts: TypeAlias = Mapping[str, np.ndarray[Any, Any]]

CHUNK = 1 << 16  # values that a thread repacks at once, in up to 24 bytes each
THREADS = 8  # that repack
STAGE = 4 << 20  # bytes of a weight that are packed at once on their way to a device
PACKING = STAGE + 24 * THREADS * CHUNK  # bytes of the host that this takes, at most


def pack(weight: PackedWeight, out: Bytes) -> None:
    """Write the device layout of a weight into host memory: uint8, of `weight_nbytes` bytes."""
    out[:] = 0
    load(weight, out, lambda nbytes: np.empty(nbytes, np.uint8), lambda host, there: np.copyto(there, host))


def load(
    weight: PackedWeight, memory: Array, passing: Callable[[int], Array], write: Callable[[Bytes, Array], None]
) -> None:
    """Bring the layout of a weight into device memory, in pieces of up to STAGE bytes. `write` copies host bytes to the
    device, and returns when they may change; `passing(n)` is n bytes there to write a piece to."""
    whole = arrange(weight.format, weight.shape)
    there, (experts, rows, columns) = whole.views(memory), whole.shape
    for name, table in _tables(weight, whole.layout).items():
        write(table, there[name][: len(table)])
    step = max(1, STAGE // arrange(weight.format, (ROWS, columns)).nbytes) * ROWS
    largest = arrange(weight.format, (min(rows, step), columns)).nbytes
    stage, on_device = np.empty(largest, np.uint8), passing(largest)
    for expert, (start, stop) in itertools.product(range(experts), spans(rows, step)):
        piece = arrange(weight.format, (stop - start, columns))
        host = stage[: piece.nbytes]
        host[:] = 0
        own = {name: array[0] for name, array in piece.views(host).items() if array.ndim == 3}
        _pack_rows(weight, expert * rows + start, expert * rows + stop, own, piece)
        write(host, on_device[: piece.nbytes])
        for name, array in piece.views(on_device).items():
            if name in own:
                mine = slice(start, start + piece.stored[1])
                there[name][(expert, mine) if name in ("codes", "high") else (expert, slice(None), mine)] = array[0]


def _tables(weight: PackedWeight, layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """What is stored once for all rows."""
    tables: dict[str, np.ndarray[Any, Any]] = {}
    if layout.levels:
        tables["levels"] = np.array(layout.levels, np.float16)
    if layout.kind == "nested":
        parts = weight.parts["nested_offset"][:1], nf4.dynamic_map().numpy(), weight.parts["nested_absmax"]
        tables["small"] = np.concatenate(parts).astype(np.float32)
    return tables


def _pack_rows(weight: PackedWeight, first: int, last: int, own: Parts, arrangement: Arrangement) -> None:
    """Rows first to last, counted through the experts, into the first rows of arrays of an expert."""
    columns, read = arrangement.shape[2], _READERS.get(weight.format.name)

    def repack(piece: tuple[int, int]) -> None:
        start, stop = piece
        if read is None or arrangement.layout.kind == "plain":
            own["codes"][start:stop, :columns] = _floats(weight, first + start, first + stop)
        else:
            _store(read(weight, first + start, first + stop), own, arrangement, start, stop)

    with ThreadPoolExecutor(THREADS) as pool:  # numpy lets go of the interpreter
        list(pool.map(repack, spans(last - first, max(1, CHUNK // columns))))


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
_READERS |= {name: _read_int4 for name in LAYOUTS if name.startswith("int4-")}

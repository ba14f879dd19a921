"""What is done to a stored tensor on its way into memory: rows taken, experts stacked, formats changed.

Packed weights stay packed: a run of rows is a view of the file, anything else a copy of the packed bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chandra.errors import CheckpointError, UnsupportedError
from chandra.models.tensors import Ranges
from chandra.quant import Format, PackedWeight

FLAT_RUN = 1 << 14  # values: a multiple of every block, even of those that formats count without regard to rows
CONVERT = 1 << 20  # values converted at once
TEMPORARIES = 32  # bytes that converting a value takes besides its result: measured, formats need 9 to 28

Float32 = np.ndarray[Any, np.dtype[np.float32]]


def take_rows(weight: PackedWeight, ranges: Ranges) -> PackedWeight:
    """The weight with only these row ranges (of each expert, where it has experts). No ranges: all of it."""
    if not ranges:
        return weight
    *experts, rows, columns = weight.shape
    starts = range(0, math.prod(experts) * rows, rows)
    pieces = [_run(weight, first + start, first + stop) for first in starts for start, stop in ranges]
    shape = (*experts, sum(stop - start for start, stop in ranges), columns)
    return pieces[0] if len(pieces) == 1 and not experts else concatenate(pieces, shape)


def concatenate(pieces: Sequence[PackedWeight], shape: tuple[int, ...]) -> PackedWeight:
    """Weights of one format, joined row after row. Raises UnsupportedError if their formats cannot be joined."""
    form = pieces[0].format
    parts = {}
    for part in form.parts(shape):
        joined = np.concatenate([piece.parts[part.name].reshape(-1) for piece in pieces])
        if any(piece.format.name != form.name for piece in pieces) or joined.size != math.prod(part.shape):
            raise UnsupportedError(
                f"weights in {form.name} that cannot be joined without unpacking them",
                "use a file in another format, for example GGUF",
            )
        parts[part.name] = joined.reshape(part.shape)
    return PackedWeight(form, shape, parts)


def convert(weight: PackedWeight, form: Format) -> PackedWeight:
    """The weight in another format, a few million values at a time (imports torch)."""
    rows = math.prod(weight.shape[:-1])
    step = max(1, CONVERT // weight.shape[-1])
    if step >= rows or not _by_rows(form, weight.shape):
        return PackedWeight.pack(form, weight.unpack())
    parts = {part.name: np.empty(part.shape, part.dtype) for part in form.parts(weight.shape)}
    whole, tensors = PackedWeight(form, weight.shape, parts), weight.tensors()
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = form.pack(weight.format.unpack_rows(tensors, weight.shape, start, stop))
        for name, target in _run(whole, start, stop).parts.items():
            target[...] = piece[name].numpy()
    return whole


def loading_bytes(stored: Format, form: Format, shape: tuple[int, ...], joined: bool = False) -> int:
    """Host bytes that a tensor takes on its way into memory: the pages of the file it is read from; a copy, where it is
    `joined` from pieces; where it is converted, the result and what converting takes."""
    nbytes = stored.nbytes(shape) * (2 if joined else 1)
    if stored.name != form.name:
        at_once = max(CONVERT, shape[-1]) if _by_rows(form, shape) else math.prod(shape)
        nbytes += form.nbytes(shape) + TEMPORARIES * min(math.prod(shape), at_once)
    return nbytes


def floats(weight: PackedWeight, name: str) -> Float32:
    """A small tensor as float32. Raises CheckpointError if it holds NaN or infinity."""
    match weight.format.name:
        case "F32":
            values = weight.parts["data"].view(np.float32)
        case "F16":
            values = weight.parts["data"].view(np.float16).astype(np.float32)
        case "BF16":
            values = (weight.parts["data"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            values = weight.unpack().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{name} holds values that are not finite", "the file is damaged: fetch it again from its source"
        )
    return values.reshape(weight.shape)


def _by_rows(form: Format, shape: tuple[int, ...]) -> bool:
    """Whether every part of the format is laid out row by row."""
    return all(part.shape[: len(shape) - 1] == shape[:-1] for part in form.parts(shape))


def _run(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Consecutive rows, counted through the experts, as a view."""
    rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1]
    shape = (stop - start, columns)
    aligned = start * columns % FLAT_RUN == 0 and (stop * columns % FLAT_RUN == 0 or stop == rows)
    if not aligned and not _by_rows(weight.format, weight.shape):
        raise UnsupportedError(
            f"rows {start} to {stop} of a weight in {weight.format.name} do not begin and end with its blocks",
            "use a file in another format, for example GGUF",
        )
    parts = {}
    for part in weight.format.parts(shape):
        flat, size = weight.parts[part.name].reshape(-1), math.prod(part.shape)
        first = flat.size * start // rows if flat.size > 1 else 0  # what is stored once goes with every row
        parts[part.name] = flat[first : first + size].reshape(part.shape)
    return PackedWeight(weight.format, shape, parts)

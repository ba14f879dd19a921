"""Kernels against float64: every format, odd shapes, every type of cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from chandra.backends.cuda.backend import CudaBackend
from chandra.bench.synthetic import random_weight
from chandra.errors import UnsupportedError
from chandra.kvcache.layout import KV_TYPES, kv_row
from chandra.ops.contracts import AttentionParams, Backend, ForwardBatch, KVLayer, KVTables, Linear, RopeParams
from chandra.ops.reference import ReferenceBackend
from chandra.quant import formats

LIMIT = 0.01  # root mean square of the error, of that of the result
SHAPES = ((96, 256), (33, 320), (257, 1024))
ROWS = (1, 3, 17, 130)


def check_linears(backend: CudaBackend, tiny: bool) -> list[dict[str, Any]]:
    """Products of all formats."""
    out = []
    for form in formats()[::4] if tiny else formats():
        for shape in SHAPES[:1] if tiny else SHAPES:
            try:
                weight = random_weight(form.name, shape)
            except UnsupportedError:  # the format packs more columns at once
                continue
            for rows in (1,) if tiny else ROWS:
                x = np.random.default_rng(rows).standard_normal((rows, shape[1]), np.float32)

                def product(b: Backend, x: Any = x, weight: Any = weight, n: int = rows) -> np.ndarray[Any, Any]:
                    y = b.upload(np.zeros((n, weight.shape[0]), np.float32))
                    b.norm_linear(b.upload(x), None, (Linear(b.load_weight(weight)),), (y,))
                    return b.download(y)

                error = _deviation(product(backend), product(ReferenceBackend()))
                out.append({"op": "linear", "format": form.name, "shape": [rows, *shape], "error": error})
    return out


def check_attention(backend: CudaBackend, tiny: bool) -> list[dict[str, Any]]:
    """A prefill beside a decode, with rope, over all types of cache; also with a window and a soft cap."""
    out = []
    for kv_type in KV_TYPES[:2] if tiny else KV_TYPES:
        for window, softcap in ((None, None),) if tiny else ((None, None), (9, 5.0)):
            results = [_attend(b, kv_type, window, softcap) for b in (backend, ReferenceBackend())]
            shape = [24, window or 0]
            out.append({"op": "attention", "format": kv_type, "shape": shape, "error": _deviation(*results)})
    return out


def _attend(b: Backend, kv_type: str, window: int | None, softcap: float | None) -> np.ndarray[Any, Any]:
    heads, kv_heads, dim, block, rng = 8, 2, 64, 16, np.random.default_rng(1)
    row, dtype = kv_row(kv_type, dim)
    k, v = (b.upload(np.zeros((8, kv_heads, block, row), dtype)) for _ in range(2))
    rope = RopeParams(b.upload((1e4 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)))
    params = AttentionParams(heads, kv_heads, dim, dim**-0.5, window, softcap, rope)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    out = None
    for lens, starts in (((23, 30), (0, 0)), ((23, 1), (23, 30))):
        slots = [64 * i + s + j for i, (n, s) in enumerate(zip(lens, starts, strict=True)) for j in range(n)]
        positions = np.concatenate([np.arange(s, s + n) for n, s in zip(lens, starts, strict=True)])
        query_start = np.cumsum([0, *lens]).astype(np.int32)
        ends = np.add(lens, starts).astype(np.int32)
        batch = ForwardBatch(
            query_start[:0], positions.astype(np.int32), query_start, ends, (query_start[1:] - 1).astype(np.int32)
        )
        q, keys, values = (b.upload(rng.standard_normal((sum(lens), n * dim), np.float32)) for n in (heads, 2, 2))
        out = b.upload(np.zeros((sum(lens), heads * dim), np.float32))
        tables = KVTables(table, np.array(slots, np.int32))
        b.attention(q, keys, values, batch, params, KVLayer(k, v, kv_type, block), tables, out)
    return b.download(out)


def _deviation(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))

"""Kernels against float64: every format, odd shapes, every type of cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
BLOCK = 16  # tokens of a block of the cache


class Check(NamedTuple):
    """`run` gives what is compared."""

    op: str
    format: str
    shape: list[int]
    run: Callable[[Backend], np.ndarray[Any, Any]]


def run_all(backend: CudaBackend, tiny: bool, told: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """All checks, after their kernels have been compiled together. `told` hears of both, and may raise to end it."""
    checks = [*_linears(tiny), *_attentions(tiny)]

    def everything() -> None:
        for check in checks:
            check.run(backend)

    backend.rehearse(everything, told)
    reference, out = ReferenceBackend(), list[dict[str, Any]]()
    for c in checks:
        error = _deviation(c.run(backend), c.run(reference))
        out.append({"op": c.op, "format": c.format, "shape": c.shape, "error": error})
        told(len(out), len(checks))
    return out


def _linears(tiny: bool) -> Iterator[Check]:
    """Products of all formats."""
    for form in formats()[::4] if tiny else formats():
        for shape in SHAPES[:1] if tiny else SHAPES:
            try:
                weight = random_weight(form.name, shape)
            except UnsupportedError:  # the format packs more columns at once
                continue
            for rows in (1,) if tiny else ROWS:
                x = np.random.default_rng(rows).standard_normal((rows, shape[1]), np.float32)

                def product(b: Backend, x: Any = x, weight: Any = weight) -> np.ndarray[Any, Any]:
                    y = b.upload(np.zeros((len(x), weight.shape[0]), np.float32))
                    b.norm_linear(b.upload(x), None, (Linear(b.load_weight(weight)),), (y,))
                    return b.download(y)

                yield Check("linear", form.name, [rows, *shape], product)


def _attentions(tiny: bool) -> Iterator[Check]:
    """Prefills, a chunk that goes on and decodes together, with rope, over all types of cache; with windows and a soft
    cap."""
    steps: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((23, 30), (0, 0)), ((5, 1), (23, 30))]
    if not tiny:
        steps = [((300, 64, 517), (0, 0, 0)), ((77, 1, 1), (300, 64, 517))]
    for kv_type in KV_TYPES[:2] if tiny else KV_TYPES:
        for window, softcap in ((None, None),) if tiny else ((None, None), (9, 5.0), (200, None)):

            def attend(b: Backend, kv_type: str = kv_type, window: int | None = window, cap: Any = softcap) -> Any:
                return _attend(b, kv_type, window, cap, steps)

            yield Check("attention", kv_type, [sum(steps[-1][1]), window or 0], attend)


def _attend(
    b: Backend,
    kv_type: str,
    window: int | None,
    softcap: float | None,
    steps: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
) -> np.ndarray[Any, Any]:
    """What the last of some steps (rows of each sequence, and where they start) gives."""
    heads, kv_heads, dim, rng = 8, 2, 64, np.random.default_rng(1)
    count, blocks = len(steps[0][0]), -(-max(map(sum, zip(*steps[-1], strict=True))) // BLOCK)
    row, dtype = kv_row(kv_type, dim)
    k, v = (b.upload(np.zeros((count * blocks, kv_heads, BLOCK, row), dtype)) for _ in range(2))
    rope = RopeParams(b.upload((1e4 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)))
    params = AttentionParams(heads, kv_heads, dim, dim**-0.5, window, softcap, rope)
    table = rng.permutation(count * blocks).astype(np.int32).reshape(count, blocks)
    for lens, starts in steps:
        at = [(i, s + j) for i, (n, s) in enumerate(zip(lens, starts, strict=True)) for j in range(n)]
        slots = np.array([table[i, p // BLOCK] * BLOCK + p % BLOCK for i, p in at], np.int32)
        positions = np.array([p for _, p in at], np.int32)
        query_start, ends = np.cumsum([0, *lens]).astype(np.int32), np.add(lens, starts).astype(np.int32)
        batch = ForwardBatch(query_start[:0], positions, query_start, ends, query_start[1:] - 1)
        q, keys, values = (b.upload(rng.standard_normal((sum(lens), n * dim), np.float32)) for n in (heads, 2, 2))
        out = b.upload(np.zeros((sum(lens), heads * dim), np.float32))
        b.attention(q, keys, values, batch, params, KVLayer(k, v, kv_type, BLOCK), KVTables(table, slots), out)
    return b.download(out)


def _deviation(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))

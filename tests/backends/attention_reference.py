"""Attention in float64 and the random batches it is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chandra.ops.contracts import AttentionParams, ForwardBatch, KVLayer, KVTables, Norm, RopeParams

F32 = np.ndarray[Any, np.dtype[np.float32]]
ROW_DTYPE = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.uint8, "q4_0": np.uint8}


def row_length(kv_type: str, head_dim: int) -> int:
    return {"q8_0": head_dim // 32 * 34, "q4_0": head_dim // 32 * 18}.get(kv_type, head_dim)


@dataclass
class Case:
    """A batch over a paged cache whose earlier tokens are filled by running their chunks first."""

    params: AttentionParams
    cache: KVLayer
    block_tables: list[list[int]]
    keys: list[F32]  # per sequence (context, K * d), before norm and rope
    values: list[F32]
    queries: list[F32]

    def batch(self, parts: list[tuple[int, int, int]]) -> tuple[ForwardBatch, KVTables, F32, F32, F32]:
        """The rows [begin, end) of some sequences, given as (sequence, begin, end)."""
        positions = np.concatenate([np.arange(b, e, dtype=np.int32) for _, b, e in parts])
        query_start = np.cumsum([0, *(e - b for _, b, e in parts)], dtype=np.int32)
        context_lens = np.array([e for _, _, e in parts], np.int32)
        size = self.cache.block_size
        width = max(len(table) for table in self.block_tables)
        tables = np.full((len(parts), width), -1, np.int32)
        slots = []
        for i, (s, b, e) in enumerate(parts):
            tables[i, : len(self.block_tables[s])] = self.block_tables[s]
            slots += [self.block_tables[s][p // size] * size + p % size for p in range(b, e)]
            if self.params.window is not None:  # blocks no later query can see are released
                tables[i, : max(0, b - self.params.window + 1) // size] = -1
        rows = [np.concatenate([x[s][b:e] for s, b, e in parts]) for x in (self.queries, self.keys, self.values)]
        batch = ForwardBatch(np.zeros_like(positions), positions, query_start, context_lens, np.zeros(0, np.int32))
        return batch, KVTables(tables, np.array(slots, np.int32)), rows[0], rows[1], rows[2]


def random_case(
    rng: np.random.Generator, params: AttentionParams, lengths: list[int], kv_type: str = "f32", block_size: int = 16
) -> Case:
    d, heads = params.head_dim, params.num_kv_heads
    blocks = [-(-n // block_size) for n in lengths]
    order = rng.permutation(sum(blocks) + 3).tolist()
    tables = [[order.pop() for _ in range(n)] for n in blocks]
    shape = (sum(blocks) + 3, heads, block_size, row_length(kv_type, d))
    dtype = np.dtype(ROW_DTYPE[kv_type])
    garbage = np.full(np.prod(shape) * dtype.itemsize, 0xFF, np.uint8)  # NaN, wherever it is read unasked
    cache = KVLayer(garbage.view(dtype).reshape(shape), garbage.copy().view(dtype).reshape(shape), kv_type, block_size)

    def normal(columns: int) -> list[F32]:
        return [rng.standard_normal((n, columns), np.float32) for n in lengths]

    return Case(params, cache, tables, normal(heads * d), normal(heads * d), normal(params.num_heads * d))


def head_norm(norm: Norm | None, x: F32) -> Any:
    if norm is None:
        return x
    weight = norm.weight.astype(np.float64)
    x = x.reshape(len(x), -1, len(weight))
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * weight
    return x + norm.bias if norm.bias is not None else x


def rotate(rope: RopeParams | None, x: Any, positions: Any) -> Any:
    """x (n, heads, d)"""
    if rope is None:
        return x
    half = len(rope.inv_freq)
    angle = positions[:, None].astype(np.float64) * rope.inv_freq.astype(np.float64)
    cos, sin = (np.cos(angle) * rope.scale)[:, None], (np.sin(angle) * rope.scale)[:, None]
    first = slice(0, 2 * half, 2) if rope.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if rope.interleaved else slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def reference(case: Case, sequence: int, first: int = 0) -> Any:
    """The rows from `first` on of one sequence: (n - first, H * d) in float64."""
    p = case.params
    n, d, group = len(case.queries[sequence]), p.head_dim, p.num_heads // p.num_kv_heads
    at = np.arange(n)
    q = head_norm(p.q_norm, case.queries[sequence].astype(np.float64)).reshape(n, -1, d)
    k = head_norm(p.k_norm, case.keys[sequence].astype(np.float64)).reshape(n, -1, d)
    v = case.values[sequence].astype(np.float64).reshape(n, -1, d)
    q, k = rotate(p.rope, q, at)[first:], rotate(p.rope, k, at)
    scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) * p.scale
    if p.softcap is not None:
        scores = p.softcap * np.tanh(scores / p.softcap)
    visible = at[None, :] <= at[first:, None]
    if p.window is not None:
        visible &= at[None, :] > at[first:, None] - p.window
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, np.repeat(v, group, 1)).reshape(n - first, -1)

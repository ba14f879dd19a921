"""Attention of the CUDA backend over the paged cache: split decode and ragged prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chandra.backends.cuda import attention_kernels as kernels
from chandra.backends.cuda.fused import cache_view, padded
from chandra.backends.cuda.launch import launch
from chandra.backends.cuda.linear import chip_of
from chandra.backends.cuda.sizes import num_splits
from chandra.lazy import torch
from chandra.ops.contracts import AttentionParams, KVLayer

if TYPE_CHECKING:
    from torch import Tensor

SMALL_SHARED = (86, 89, 120)  # compute capabilities with less shared memory than 8.0 has
SEQUENCES = 64  # of a prefill, at least: few sizes are compiled
COMBINED = 32  # splits that `combine` reads at once


@dataclass(frozen=True)
class Extent:
    """What the host must know of a batch: grids depend on nothing else. `prefills` counts the sequences of more than
    one row, `prefill_rows` their rows; `max_context` bounds the contexts of the others."""

    sequences: int
    prefills: int
    prefill_rows: int
    max_context: int

    @classmethod
    def of(cls, query_lens: Iterable[int], max_context: int) -> Extent:
        lens = list(query_lens)
        long = [n for n in lens if n > 1]
        return cls(len(lens), len(long), sum(long), max_context)


@dataclass(frozen=True)
class Tiling:
    """Rows (queries times the heads of a kv head) and tokens of a program's tile, warps and stages."""

    rows: int
    tokens: int
    warps: int
    stages: int


def decode_tiling(params: AttentionParams, kv_type: str, capability: int) -> Tiling:
    """On a GPU of this compute capability (75, 80, …)."""
    group, wide = padded(params.num_heads // params.num_kv_heads), padded(params.head_dim) > 128
    if not _tensor_cores(kv_type, capability):
        return Tiling(group, 16 if wide or group > 16 else 32, max(4, group // 8), 1)
    tokens = 32 if wide or _quantized(kv_type) else 64
    return Tiling(max(16, group), tokens, max(4, group // 16), 3 if capability in SMALL_SHARED else 4)


def prefill_tiling(params: AttentionParams, kv_type: str, capability: int) -> Tiling:
    """As `decode_tiling`."""
    group, wide = padded(params.num_heads // params.num_kv_heads), padded(params.head_dim) > 128
    if not _tensor_cores(kv_type, capability):
        rows = max(16 if wide else 32, group)
        return Tiling(rows, 16 if wide or group > 16 else 32, 8 if rows <= 32 else 16, 1)
    rows = max(64 if wide else 128, group)
    return Tiling(rows, 32 if wide or _quantized(kv_type) else 64, rows // (8 if wide else 16), 2)


def _tensor_cores(kv_type: str, capability: int) -> bool:
    """Whether products run on tensor cores; Triton has none of them for 7.5, nor for float32 without rounding."""
    return capability >= 80 and kv_type != "f32"


def _quantized(kv_type: str) -> bool:
    return kv_type in ("q8_0", "q4_0")


def query_dtype(kv_type: str) -> torch.dtype:
    """The dtype of q, in which products are formed. f16 keeps more of a q8_0, q4_0 or f16 cache than bf16."""
    return {"f32": torch.float32, "bf16": torch.bfloat16}.get(kv_type, torch.float16)


def attention(
    q: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    params: AttentionParams,
    cache: KVLayer,
    out: Tensor,
    scratch: Tensor,
    extent: Extent,
) -> None:
    """Causal attention of q `(n, H*d)` (of `query_dtype`, after `fused.rope_write`) over the cache; out `(n, H*d)` of
    any float dtype.

    query_start `(b + 1,)`, context_lens `(b,)` and block_table `(b, blocks)` are int32 on the device and only read
    there; scratch is float32 of at least `sizes.split_bytes`. Sequences of one row are decoded over splits of their
    context, the others are tiled. A sequence of one row without context (filler of a graph's bucket) gives zeros.
    """
    capability = chip_of(q.device).capability
    heads, kv_heads, d = params.num_heads, params.num_kv_heads, params.head_dim
    keys, values = cache_view(cache.k, cache.kv_type), cache_view(cache.v, cache.kv_type)
    arrays = (q, query_start, context_lens, block_table, keys, values)
    numbers = (params.scale, params.softcap, params.window, block_table.shape[1])
    if extent.prefills:
        tiling = prefill_tiling(params, cache.kv_type, capability)
        tiles = extent.prefill_rows // (tiling.rows // (heads // kv_heads)) + extent.prefills
        launch(kernels.prefill, tiles, kv_heads)(
            *arrays,
            out,
            *numbers,
            extent.sequences,
            SEQUENCES=padded(max(SEQUENCES, extent.sequences)),
            **_constants(params, cache, tiling),
        )
    if extent.sequences > extent.prefills:
        splits = num_splits(extent.max_context)
        parts = extent.sequences * splits * heads
        partial = (scratch, scratch[parts * d :], scratch[parts * (d + 1) :])  # outputs, maxima, totals
        tiling = decode_tiling(params, cache.kv_type, capability)
        launch(kernels.decode, splits, kv_heads, extent.sequences)(
            *arrays, *partial, *numbers, splits, **_constants(params, cache, tiling)
        )
        launch(kernels.combine, heads, extent.sequences)(
            query_start, context_lens, *partial, out, params.window, splits, heads, d, padded(d), COMBINED
        )


def _constants(params: AttentionParams, cache: KVLayer, tiling: Tiling) -> dict[str, Any]:
    return {
        **{"HEADS": params.num_heads, "KV_HEADS": params.num_kv_heads, "DIM": params.head_dim},
        **{"HALF": padded(params.head_dim) // 2, "KV_TYPE": cache.kv_type, "BLOCK_SIZE": cache.block_size},
        **{"M": tiling.rows, "TILE": tiling.tokens, "num_warps": tiling.warps, "num_stages": tiling.stages},
    }

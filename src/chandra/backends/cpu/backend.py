"""The CPU backend: numpy arrays and the C++ kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from chandra.backends.cpu import _cpu
from chandra.memory.device import Device
from chandra.ops.contracts import Array, AttentionParams, ForwardBatch, KVLayer, KVTables, Norm, RopeParams


class CpuBackend:
    def __init__(self, device: Device) -> None:
        self.device = device
        self._attention: dict[int, tuple[AttentionParams, Any]] = {}
        self._ropes: dict[int, tuple[RopeParams, Any]] = {}

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        batch: ForwardBatch,
        params: AttentionParams,
        cache: KVLayer,
        tables: KVTables,
        out: Array,
    ) -> None:
        bound = self._attention.get(id(params)) or self._bind_attention(params)
        bound[1](
            q,
            k,
            v,
            batch.positions,
            batch.query_start,
            batch.context_lens,
            cache.k,
            cache.v,
            cache.kv_type,
            cache.block_size,
            tables.block_table,
            tables.slots,
            out,
        )

    def _bind_attention(self, params: AttentionParams) -> tuple[AttentionParams, Any]:
        kernel = _cpu.Attention(
            params.num_heads,
            params.num_kv_heads,
            params.head_dim,
            params.scale,
            params.window,
            params.softcap,
            None if params.rope is None else self._bind_rope(params.rope),
            _head_norm(params.q_norm),
            _head_norm(params.k_norm),
        )
        self._attention[id(params)] = (params, kernel)  # keeps params alive, so that its id stays its own
        return params, kernel

    def _bind_rope(self, rope: RopeParams) -> Any:
        for known, bound in self._ropes.values():
            if known is rope or (
                known.scale == rope.scale
                and known.interleaved == rope.interleaved
                and np.array_equal(known.inv_freq, rope.inv_freq)
            ):
                return bound
        bound = _cpu.Rope(rope.inv_freq, rope.scale, rope.interleaved)
        self._ropes[id(rope)] = (rope, bound)
        return bound


def _head_norm(norm: Norm | None) -> Any:
    return None if norm is None else _cpu.HeadNorm(norm.weight, norm.bias, norm.eps, norm.kind == "layer")

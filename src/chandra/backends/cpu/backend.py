"""The CPU backend: numpy arrays and the C++ kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chandra.backends.cpu import _cpu, plain
from chandra.errors import UsageError
from chandra.memory.device import Device
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
    Backend,
    Experts,
    ForwardBatch,
    IntArray,
    KVLayer,
    KVTables,
    Linear,
    Norm,
    RopeParams,
    Weight,
)
from chandra.quant.base import PackedWeight

_ALIGNMENT = 64


class CpuBackend(Backend):
    """Computes in host memory, on the threads of one pool that all CPU backends of the process share.

    `threads`: None leaves the pool as it is (one thread for each physical core this process may use). `isa`: portable,
    avx2 or avx512; None leaves the best one. Raises UsageError for an instruction set this CPU lacks.
    """

    def __init__(self, device: Device, threads: int | None = None, isa: str | None = None) -> None:
        self.device = device
        if threads is not None:
            _cpu.set_threads(threads)
        if isa is not None:
            try:
                _cpu.set_isa(isa)
            except ValueError as error:
                raise UsageError(
                    f"cannot use {isa} kernels: {error}", f"this CPU's best is {_cpu.best_isa()}"
                ) from error
        self._attention: dict[int, tuple[AttentionParams, Any]] = {}
        self._ropes: list[tuple[RopeParams, Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Aligned to cache lines. The system hands out large arrays as zero pages, which cost memory when written."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + nbytes].view(kind).reshape(shape)

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        return host

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = array
        return result

    def load_weight(self, weight: PackedWeight) -> Weight:
        return plain.load(weight)

    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        plain.embed(batch, table, scale, out)

    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        plain.norm_linear(x, norm, linears, outs)

    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        plain.gate_up(x, norm, gate, up, activation, out)

    def linear_add(self, x: Array, linear: Linear, post_norm: Norm | None, residual: Array) -> None:
        plain.linear_add(x, linear, post_norm, residual)

    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        plain.moe_add(x, norm, experts, post_norm, residual)

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
        _, kernel = self._attention.get(id(params)) or self._bind_attention(params)
        kernel(
            *(q, k, v, batch.positions, batch.query_start, batch.context_lens),
            *(cache.k, cache.v, cache.kv_type, cache.block_size, tables.block_table, tables.slots, out),
        )

    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        plain.logits(x, rows, norm, head, scale, softcap, out)

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
        self._attention[id(params)] = params, kernel  # keeps params alive, so that its id stays its own
        return params, kernel

    def _bind_rope(self, rope: RopeParams) -> Any:
        """One kernel object for all layers with equal parameters, so that a step computes cos and sin once."""
        for known, kernel in self._ropes:
            same = known.scale == rope.scale and known.interleaved == rope.interleaved
            if same and np.array_equal(known.inv_freq, rope.inv_freq):
                return kernel
        kernel = _cpu.Rope(rope.inv_freq, rope.scale, rope.interleaved)
        self._ropes.append((rope, kernel))
        return kernel


def _head_norm(norm: Norm | None) -> Any:
    return None if norm is None else _cpu.HeadNorm(norm.weight, norm.bias, norm.eps, norm.kind == "layer")

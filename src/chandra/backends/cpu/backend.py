"""The CPU backend: numpy arrays and the C++ kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chandra.backends.cpu import _cpu
from chandra.backends.cpu.kernels import make_weight, pack_panels, panel_format
from chandra.errors import UsageError
from chandra.memory.device import Device
from chandra.memory.host import aligned_bytes, give_back, own_pages
from chandra.ops import registry
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
    Backend,
    Experts,
    ForwardBatch,
    HostBytes,
    IntArray,
    KVLayer,
    KVTables,
    Linear,
    Norm,
    RopeParams,
    Weight,
)
from chandra.quant.base import Format, PackedWeight


class CpuBackend(Backend):
    """Computes in host memory, on the threads of one pool that all CPU backends of the process share.

    `threads`: None leaves the pool as it is (one thread for each physical core this process may use). `isa`: portable,
    avx2 or avx512; None leaves the best one. Raises UsageError for an instruction set this CPU lacks.
    """

    _repacks_later = True

    def __init__(self, device: Device, threads: int | None = None, isa: str | None = None) -> None:
        self.device = device
        if threads is not None:
            _cpu.set_threads(threads)
        if isa is not None:
            try:
                _cpu.set_isa(isa)
            except ValueError as error:
                best = _cpu.best_isa()
                raise UsageError(f"cannot use {isa} kernels: {error}", f"the best this CPU has is {best}") from error
        self._attention: dict[int, tuple[AttentionParams, _cpu.Attention]] = {}
        self._ropes: list[tuple[RopeParams, _cpu.Rope]] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        kind = np.dtype(dtype)
        return self._allocate(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)

    def _allocate(self, nbytes: int) -> HostBytes:
        return own_pages(nbytes)

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        return host

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = array
        return result

    def trim(self, array: Array, rows: int) -> bool:
        start = rows * array.strides[0]
        give_back(array.ctypes.data + start, array.nbytes - start)
        return True

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:
        """Repacked into panels, unless only rows are looked up: then it stays where it is. What lies in a
        mapped file is repacked before its second product: the first token need not wait for that."""
        kernel = registry.find("linear", weight.format.name, "cpu", weight.shape)
        handle = make_weight(weight, kernel, repack=not lookup, later=self._repacks_later)
        return Weight(weight.format, weight.shape, handle.nbytes, handle)

    def weight_nbytes(self, format: Format, shape: tuple[int, ...]) -> int:
        return _cpu.repacked_nbytes(panel_format(format, shape), shape)

    def pack_weight(self, weight: PackedWeight, out: HostBytes) -> None:
        pack_panels(weight, out)

    def bind_weight(self, format: Format, shape: tuple[int, ...], memory: Array) -> Weight:
        return Weight(format, shape, memory.nbytes, _cpu.Weight(panel_format(format, shape), shape, memory))

    def host_buffer(self, nbytes: int) -> HostBytes:
        return aligned_bytes(nbytes)

    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        _cpu.embed(batch.token_ids, table.handle, scale, out)

    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        _cpu.norm_linear(x, norm, linears, outs)

    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        _cpu.gate_up(x, norm, gate, up, activation, out)

    def linear_add(self, x: Array, linear: Linear, post_norm: Norm | None, residual: Array) -> None:
        _cpu.linear_add(x, linear, post_norm, residual)

    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        _cpu.moe_add(x, norm, experts, post_norm, residual)

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
        _, kernel = self._attention.get(id(params)) or self._bind_attention(params, cache.kv_type)
        sizes = batch.positions, batch.query_start, batch.context_lens
        kernel(
            q, k, v, *sizes, cache.k, cache.v, cache.kv_type, cache.block_size, tables.block_table, tables.slots, out
        )

    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        _cpu.logits(x, rows, norm, head, scale, softcap, out)

    def _bind_attention(self, params: AttentionParams, kv_type: str) -> tuple[AttentionParams, _cpu.Attention]:
        registry.find("attention", kv_type, "cpu", (params.head_dim,))
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

    def _bind_rope(self, rope: RopeParams) -> _cpu.Rope:
        """One kernel object for all layers with equal parameters, so that a step computes cos and sin once."""
        for known, kernel in self._ropes:
            same = known.scale == rope.scale and known.interleaved == rope.interleaved
            if same and np.array_equal(known.inv_freq, rope.inv_freq):
                return kernel
        kernel = _cpu.Rope(rope.inv_freq, rope.scale, rope.interleaved)
        self._ropes.append((rope, kernel))
        return kernel


def _head_norm(norm: Norm | None) -> _cpu.HeadNorm | None:
    return None if norm is None else _cpu.HeadNorm(norm.weight, norm.bias, norm.eps, norm.kind == "layer")

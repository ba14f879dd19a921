"""The CUDA backend: torch's memory and streams, Triton's kernels.

Activations of the contract are float32 in the decoder's workspace; what the tensor cores read is a 16-bit copy in the
backend's scratch. No op allocates: a step can be recorded and repeated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from chandra.backends.cuda import attention, fused, layouts, linear, moe, packing, sizes
from chandra.backends.cuda.accelerator import Accelerator, CudaAccelerator, guard
from chandra.backends.cuda.graphs import Graphs
from chandra.backends.cuda.launch import rehearsal
from chandra.backends.cuda.sizes import Scratch
from chandra.backends.cuda.steps import StepArrays
from chandra.lazy import torch
from chandra.memory.arena import Arena
from chandra.memory.device import Device
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
    Backend,
    Copy,
    Experts,
    ForwardBatch,
    HostBytes,
    IntArray,
    KVLayer,
    KVTables,
    Linear,
    Norm,
    Weight,
)
from chandra.quant.base import Format, PackedWeight


class CudaBackend(Backend):
    """Computes on one GPU, in memory that counts against `device.cap`: several may share a GPU, each with its cap.

    `scratch`: what is kept for the kernels' own use; it grows if an op needs more.
    `graphs`: bytes that recorded steps may take; 0 records none. Raises DeviceError, BudgetExceeded.
    """

    def __init__(
        self,
        device: Device,
        scratch: Scratch = Scratch(),  # noqa: B008 (immutable)
        graphs: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.device = device
        index = int(device.name.split("/")[0].partition(":")[2] or 0)
        self.accelerator = accelerator or CudaAccelerator(index)
        self.arena = Arena(device)
        self._release = self.accelerator.limit(device.cap)
        weakref.finalize(self, self._release)
        self._splits = self._bytes(sizes.SPLITS).zero_()
        self._scratch = self._bytes(scratch.ops)
        self._steps = StepArrays(self.accelerator, scratch.ints, lambda n: self._bytes(4 * n).view(torch.int32))
        self._graphs = Graphs(self.accelerator, graphs)

    def context_bytes(self) -> int:
        """What torch may allocate is corrected by it."""
        return self.accelerator.context_bytes()

    def recorded_bytes(self) -> int:
        """Bytes of the GPU that recorded steps take."""
        return self._graphs.used

    # memory

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        kind = getattr(torch, dtype)
        return self._bytes(math.prod(shape) * kind.itemsize).view(kind).view(shape)

    def _bytes(self, nbytes: int) -> torch.Tensor:
        """New memory. What was recorded may have had addresses of memory that this replaces."""
        self.arena.take(nbytes)
        try:
            with guard(self.device.name):
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self.accelerator.device)
        except BaseException:
            self.arena.take(-nbytes)
            raise
        weakref.finalize(memory.untyped_storage(), self.arena.take, -nbytes)
        if hasattr(self, "_graphs"):
            self._graphs.clear()
        return memory

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        array = self.empty(host.shape, host.dtype.name)
        self.write(host, array)
        return array

    def write(self, host: np.ndarray[Any, Any], out: Array) -> None:
        """Returns when the host array may change again."""
        with guard(self.device.name):
            self.accelerator.copy(_tensor(host), out).done()

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        with guard(self.device.name):
            host: np.ndarray[Any, Any] = array.to("cpu", copy=True).numpy()
        return host

    def release_unused(self) -> None:
        self.accelerator.release_unused()

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:  # noqa: ARG002 (one layout for all)
        memory = self._bytes(self.weight_nbytes(weight.format, weight.shape))
        packing.load(weight, memory, self._passing, self.write)
        return self.bind_weight(weight.format, weight.shape, memory)

    def _passing(self, nbytes: int) -> torch.Tensor:
        """Memory for a moment: where partial sums of products are, or, for what is wider than usual, new."""
        return self._splits[-nbytes:] if nbytes <= packing.STAGE else self._bytes(nbytes)

    def weight_nbytes(self, format: Format, shape: tuple[int, ...]) -> int:
        return layouts.weight_nbytes(format, shape)

    def pack_weight(self, weight: PackedWeight, out: HostBytes) -> None:
        packing.pack(weight, out)

    def bind_weight(self, format: Format, shape: tuple[int, ...], memory: Array) -> Weight:
        return Weight(format, shape, memory.nbytes, layouts.bind(format, shape, memory))

    def host_buffer(self, nbytes: int) -> HostBytes:
        return self.accelerator.host_buffer(nbytes)

    def fetch(self, host: np.ndarray[Any, Any], out: Array) -> Copy:
        with guard(self.device.name):
            return self.accelerator.copy(_tensor(host), out, beside=True)

    def store(self, array: Array, host: np.ndarray[Any, Any]) -> Copy:
        with guard(self.device.name):
            return self.accelerator.copy(array, torch.from_numpy(host), beside=True)

    # ops

    def step(
        self, segment: Hashable | None, batch: ForwardBatch, tables: Sequence[KVTables], ops: Callable[[], None]
    ) -> None:
        with guard(self.device.name):
            self.accelerator.use()
            self._steps.begin(batch, tables)
            here = self._steps.batch(batch)
            if here.repeats and segment is not None:
                self._graphs.run((segment, here.shape), ops)
            else:
                ops()

    def forget_steps(self) -> None:
        self._graphs.clear()

    def rehearse(self, ops: Callable[[], None], told: Callable[[int, int], None]) -> None:
        with guard(self.device.name), rehearsal(told):
            self.accelerator.use()
            ops()

    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        linear.unpack(table.handle, out, ids=self._steps.batch(batch).token_ids, factor=scale)

    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        (y,) = self._take((x.shape, self.accelerator.half))
        fused.norm(x, norm, y)
        linear.linears(y, list(map(_product, linears, outs)), self._splits)

    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        (y,) = self._take((x.shape, self.accelerator.half))
        fused.norm(x, norm, y)
        products = _product(gate, out) if gate else None, _product(up, out)
        linear.gate_up(y, *products, activation, self._splits)

    def linear_add(self, x: Array, linear_: Linear, post_norm: Norm | None, residual: Array) -> None:
        between = residual.shape if post_norm else (0,)
        y, out = self._take((x.shape, self.accelerator.half), (between, torch.float32))
        fused.norm(x, None, y)
        if post_norm is None:
            linear.product(y, _product(linear_, residual), self._splits, into="add")
        else:
            linear.product(y, _product(linear_, out), self._splits)
            fused.norm(out, post_norm, residual, add=True)

    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        n, (count, ff, hidden) = len(x), experts.up.shape
        y, router, out, rest = self._take(
            (x.shape, self.accelerator.half),
            ((n, count), torch.float32),
            (residual.shape, torch.float32),
            ((sizes.moe_scratch(n, count, experts.top_k, hidden, ff),), torch.uint8),
        )
        fused.norm(x, norm, y)
        linear.product(y, _product(experts.router, router), self._splits)
        weights = experts.gate.handle, experts.up.handle, experts.down.handle
        moe.moe(y, router, *weights, experts.top_k, experts.normalize, experts.activation, out, rest)
        fused.norm(out, post_norm, residual, add=True)

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
        here, table = self._steps.batch(batch), self._steps.tables(batch, tables)
        extent = here.extent
        need = sizes.split_bytes(params.num_heads, params.head_dim, extent.sequences, extent.max_context)
        turned, rest = self._take((q.shape, attention.query_dtype(cache.kv_type)), ((need // 4,), torch.float32))
        fused.rope_write(q, k, v, here.positions, params, cache, table.slots, turned)
        arrays = here.query_start, here.context_lens, table.block_table
        attention.attention(turned, *arrays, params, cache, out, rest, extent)

    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        self.accelerator.use()
        (y,) = self._take(((len(rows), x.shape[1]), self.accelerator.half))
        fused.norm(x, norm, y, self._steps.rows(rows))
        linear.product(y, _product(head, out), self._splits)
        fused.logits_finish(out, scale, softcap)

    def _take(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        """Arrays in the scratch, until the next op."""
        places, total = [], 0
        for shape, dtype in wanted:
            nbytes = math.prod(shape) * dtype.itemsize
            places.append((total, nbytes))
            total += -(-nbytes // layouts.ALIGNMENT) * layouts.ALIGNMENT
        if total > len(self._scratch):
            self._scratch = self._bytes(total)
        return [
            self._scratch[start : start + nbytes].view(dtype).view(shape)
            for (start, nbytes), (shape, dtype) in zip(places, wanted, strict=True)
        ]


def _product(linear_: Linear, out: Array) -> linear.Product:
    return linear.Product(linear_.weight.handle, linear_.bias, out)


def _tensor(host: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the same memory; torch wants none that must not be written."""
    return torch.from_numpy(host if host.flags.writeable else host.copy())

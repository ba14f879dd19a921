"""A device that is only an arena: it has a cap, and if asked a slow link and slow memory, but computes on the CPU.

Every path for several devices can be run and tested on any machine with it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chandra.backends.cpu.backend import CpuBackend
from chandra.memory.arena import Arena
from chandra.memory.device import Device
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
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
from chandra.quant.base import PackedWeight

_SHORTEST_WAIT = 0.0005  # seconds; the system's timers are not finer


class _Pace:
    """Makes work take at least bytes / rate seconds, on average: short waits are put off until they add up, and what
    follows within a moment makes up for timers that wake late."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._due = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def over(self, nbytes: int, began: float | None = None) -> Iterator[None]:
        """Work on `nbytes` happens within; it was asked for at `began` of the performance counter, or now."""
        began = time.perf_counter() if began is None else began
        yield
        if self._rate is not None:
            with self._lock:
                start = began if began > self._due + _SHORTEST_WAIT else self._due
                self._due = due = start + nbytes / self._rate
            ahead = due - time.perf_counter()
            if ahead > _SHORTEST_WAIT:
                time.sleep(ahead)


@dataclass(frozen=True)
class _Copy:
    """A copy in the thread that stands for the device's copy engine."""

    copy: Future[None]

    def wait(self) -> None:
        self.copy.result()

    done = wait


def _copy(link: _Pace, job: list[tuple[Array, Array]], began: float) -> None:
    source, out = job.pop()  # the thread holds on to `job` for a moment after this is done, but to no memory
    with link.over(source.nbytes, began):
        out[...] = source


class VirtualBackend(CpuBackend):
    """The CPU's ops over memory that counts against `device.cap` and is given back when its arrays are dropped.

    With `device.link` set, what comes from or goes to the host takes at least its bytes / link seconds; with
    `device.bandwidth`, an op takes at least as long as reading its weights and cache would.
    """

    _repacks_later = False  # the file is not on the device

    def __init__(self, device: Device, threads: int | None = None, isa: str | None = None) -> None:
        super().__init__(device, threads, isa)
        self.arena = Arena(device)
        self._link, self._memory = _Pace(device.link), _Pace(device.bandwidth)
        self._copies = ThreadPoolExecutor(1)  # the thread ends with this backend

    def _allocate(self, nbytes: int) -> HostBytes:
        self.arena.take(nbytes)
        array = super()._allocate(nbytes)
        weakref.finalize(array.base, self.arena.take, -nbytes)
        return array

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        array = self.empty(host.shape, host.dtype.name)
        self.write(host, array)
        return array

    def write(self, host: np.ndarray[Any, Any], out: Array) -> None:
        with self._link.over(host.nbytes):
            out[...] = host

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        with self._link.over(array.nbytes):
            host: np.ndarray[Any, Any] = array.copy()
        return host

    def trim(self, array: Array, rows: int) -> bool:  # noqa: ARG002 (the arena counts whole arrays)
        return False

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:  # noqa: ARG002 (nothing stays mapped)
        self.arena.take(weight.nbytes)
        try:
            with self._link.over(weight.nbytes):
                loaded = super().load_weight(weight)
                if loaded.handle.in_place:
                    parts = {name: part.copy() for name, part in weight.parts.items()}
                    loaded = super().load_weight(replace(weight, parts=parts))
            self.arena.take(loaded.nbytes - weight.nbytes)
        except BaseException:
            self.arena.take(-weight.nbytes)
            raise
        weakref.finalize(loaded, self.arena.take, -loaded.nbytes)
        return loaded

    def fetch(self, host: np.ndarray[Any, Any], out: Array) -> Copy:
        return _Copy(self._copies.submit(_copy, self._link, [(host, out)], time.perf_counter()))

    def store(self, array: Array, host: np.ndarray[Any, Any]) -> Copy:
        return self.fetch(array, host)

    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        with self._memory.over(out.nbytes):
            super().embed(batch, table, scale, out)

    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        with self._memory.over(sum(linear.weight.nbytes for linear in linears)):
            super().norm_linear(x, norm, linears, outs)

    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        with self._memory.over(up.weight.nbytes + (gate.weight.nbytes if gate else 0)):
            super().gate_up(x, norm, gate, up, activation, out)

    def linear_add(self, x: Array, linear: Linear, post_norm: Norm | None, residual: Array) -> None:
        with self._memory.over(linear.weight.nbytes):
            super().linear_add(x, linear, post_norm, residual)

    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        used = min(1.0, len(x) * experts.top_k / experts.gate.shape[0])
        weights = experts.gate.nbytes + experts.up.nbytes + experts.down.nbytes
        with self._memory.over(int(used * weights)):
            super().moe_add(x, norm, experts, post_norm, residual)

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
        tokens = np.minimum(batch.context_lens, params.window) if params.window else batch.context_lens
        token_bytes = 2 * cache.k.nbytes // (cache.k.shape[0] * cache.block_size)
        with self._memory.over(int(tokens.sum()) * token_bytes):
            super().attention(q, k, v, batch, params, cache, tables, out)

    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        with self._memory.over(head.weight.nbytes):
            super().logits(x, rows, norm, head, scale, softcap, out)

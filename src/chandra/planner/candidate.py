"""One point of the search, without placement: what each layer takes on each device and how long it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np

from chandra.kvcache.layout import LayerGroup
from chandra.memory.device import Device
from chandra.memory.plan import Placement, Workload
from chandra.models.decoder import workspace_bytes
from chandra.planner.cost import Machine, Rate
from chandra.planner.placement import Floats, Mode, Offload, Tier
from chandra.planner.sizes import ModelSizes, Pieces, PlannableModel

BLOCK_SIZE = 16
ANSWER = 256  # tokens of the answer that plans are compared with
HOST = "cpu"
HOP = 2e-5  # seconds to hand the hidden state to the next device


@dataclass(frozen=True, eq=False)
class Candidate:
    """Formats, workload, cache type and chunk. All arrays are over the layers."""

    model: PlannableModel
    sizes: ModelSizes
    workload: Workload
    kv_type: str
    chunk: int
    max_num_seqs: int
    machine: Machine
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_layers(self) -> int:
        return self.model.spec.num_layers

    def rate(self, device: str) -> Rate:
        """What the device's kernels do with these formats."""
        if device not in self._cache:
            self._cache[device] = self.machine.of(device).rate(self.sizes.mix)
        return cast(Rate, self._cache[device])

    @property
    def max_logit_rows(self) -> int:
        return self.max_num_seqs

    def pieces(self, device: str) -> Pieces:
        """Bytes of the weights as this device keeps them."""
        return self.sizes.host if device == HOST or device.startswith("virtual") else self.sizes.packed

    @cached_property
    def kv_token(self) -> Floats:
        """Bytes of one token's keys and values."""
        return self._by_attention(lambda group: group.token_bytes(self.kv_type))

    @cached_property
    def kv_need(self) -> Floats:
        """Bytes of cache with which the workload never runs out."""
        w = self.workload
        blocks = self._by_attention(lambda group: group.max_blocks(w.context, self.chunk, BLOCK_SIZE, w.parallel))
        return blocks * BLOCK_SIZE * self.kv_token

    def _by_attention(self, measure: Callable[[LayerGroup], int]) -> Floats:
        shapes = [(x.attention.num_kv_heads, x.attention.head_dim, x.attention.window) for x in self.model.spec.layers]
        known = {shape: measure(LayerGroup((0,), *shape)) for shape in set(shapes)}
        return np.array([known[shape] for shape in shapes], np.float64)

    def weights(self, device: str) -> Floats:
        return _sum(self.pieces(device))

    @cached_property
    def least_need(self) -> Floats:
        """Bytes of each layer and its cache that no device can do without."""
        return np.minimum(self.weights(HOST), _sum(self.sizes.packed)) + self.kv_need

    def least_rate(self, device: str, gpus: Sequence[Device]) -> float:
        """The least seconds per byte of any layer on a device; on the host, however it is offloaded."""
        seconds = self.request_seconds("resident", device)
        if device == HOST:
            for gpu in gpus:
                seconds = np.minimum(seconds, self.request_seconds("stream", gpu.name))
                if any(self.sizes.packed.experts):
                    seconds = np.minimum(seconds, self.request_seconds("resident", gpu.name, apart=True))
        return float((seconds / self.least_need).min())

    def workspace(self, device: str, head: bool, layers: Sequence[int] | None = None) -> int:
        """Bytes of activation buffers, and of the CPU kernels' own. `layers`: those held; None: any of them."""
        spec, rows = self.model.spec, self.max_logit_rows if head else 0
        held = range(spec.num_layers) if layers is None else layers
        own = self.model.kernels.scratch_bytes(spec, self.chunk, rows) if self.pieces(device) is self.sizes.host else 0
        return own + workspace_bytes(spec, held, self.chunk, rows)

    def step_seconds(
        self, placement: Placement, device: str, rows: int, sequences: int, context: float, apart: bool = False
    ) -> Floats:
        """Seconds of each layer in a step of `rows` tokens of `sequences` sequences that are `context` long.

        `device` computes it; with `apart` the CPU computes the experts.
        """
        sizes, rate, host = self.sizes, self.rate(device), self.rate(HOST)
        dense, experts = np.array(sizes.packed.dense, float), np.array(sizes.packed.experts, float)
        read = experts * (1 - (1 - np.array(sizes.active)) ** rows)
        seen, heads = self._attention_shape(context)
        macs = rows * (np.array(sizes.dense_macs) + 2 * heads * np.minimum(seen, (context + rows) / 2))
        expert_macs = rows * np.array(sizes.expert_macs)
        elsewhere, hops = np.zeros(len(dense)), self.machine.host.layer_overhead + 2 * HOP
        if apart:
            elsewhere = np.maximum(read / host.bandwidth, expert_macs / host.macs) + hops
            elsewhere, read, expert_macs = np.where(experts > 0, elsewhere, 0), 0 * read, 0 * expert_macs
        reads = dense + read + sequences * seen * self.kv_token
        profile = self.machine.of(device)
        compute = np.maximum(reads / rate.bandwidth, (macs + expert_macs) / rate.macs) + profile.layer_overhead
        if placement == "stream" and profile.link is not None:
            compute = np.maximum(compute, (dense + experts) / profile.link)
        elif placement == "disk":
            compute = np.maximum(compute, (dense + experts) / self.machine.disk)
        return cast(Floats, compute + elsewhere)

    def _attention_shape(self, context: float) -> tuple[Floats, Floats]:
        """Tokens a query sees, and width of all query heads."""
        attention = [layer.attention for layer in self.model.spec.layers]
        seen = np.array([min(context, a.window or context) for a in attention])
        return seen, np.array([float(a.num_heads * a.head_dim) for a in attention])

    def request_seconds(self, placement: Placement, device: str, apart: bool = False) -> Floats:
        """Seconds each layer takes for one request (prompt and answer), with `parallel` of them sharing a step."""
        key = (placement, device, apart)
        if key not in self._cache:
            w = self.workload
            rows = min(self.chunk, w.prompt)
            prompt = self.step_seconds(placement, device, rows, 1, w.prompt / 2, apart)
            step = self.step_seconds(placement, device, w.parallel, w.parallel, self.typical_context, apart)
            self._cache[key] = -(-w.prompt // self.chunk) * prompt + ANSWER / w.parallel * step
        return cast(Floats, self._cache[key])

    @property
    def typical_context(self) -> int:
        """Tokens in the cache in the middle of an answer."""
        return min(self.workload.context, self.workload.prompt + ANSWER // 2)

    def head_step(self, device: str, sequences: int) -> float:
        """Seconds to compute one row of logits for each sequence."""
        pieces, rate = self.sizes.packed, self.rate(device)
        read = pieces.embedding if self.sizes.tied else pieces.head
        return max(read / rate.bandwidth, sequences * self.sizes.head_macs / rate.macs)

    def head_seconds(self, device: str) -> float:
        """Seconds the head takes for one request."""
        parallel = self.workload.parallel
        return self.head_step(device, 1) + ANSWER / parallel * self.head_step(device, parallel)

    def outer_weights(self, device: str, head: bool) -> int:
        """Bytes of embedding and head on a device. The embedding lies on the host, unless it is the head as well."""
        pieces = self.pieces(device)
        taken = pieces.head if head else 0
        if head if self.sizes.tied else device == HOST:
            taken += pieces.embedding
        return taken

    def taken(self, device: str, head: bool, computes: bool = True) -> int:
        """Bytes of everything but layers and their cache on a device that computes layers or only passes them on."""
        key = ("workspace", self.pieces(device) is self.sizes.host, head, computes)
        if key not in self._cache:
            self._cache[key] = self.workspace(device, head, None if computes else ())
        return int(self.machine.of(device).runtime + self.outer_weights(device, head) + self._cache[key])

    def tier(self, device: Device, head: bool, room: float, allowed: Sequence[bool]) -> Tier:
        """The device as a place for layers. `room`: bytes left for them."""
        need = np.where(allowed, self.weights(device.name) + self.kv_need, np.inf)
        seconds = self.request_seconds("resident", device.name)
        return Tier(device.name, room, seconds, need, self.head_seconds(device.name) if head else 0.0)

    def offload(self, mode: Mode, gpu: str | None, disk_layers: int) -> Offload:
        """Offloading the first layers in one of the modes; the first `disk_layers` of them are read from disk.

        `gpu`: the device that computes what the CPU does not; None: the CPU computes beside GPUs; "cpu": there is no
        other device, so that what is not on disk shares the room of the layers that follow.
        """
        on_disk = np.arange(self.num_layers) < disk_layers
        device, zeros = gpu or HOST, np.zeros(self.num_layers)
        kept, first_need = self.weights(device), self.kv_need
        if mode == "experts":
            kept = np.array(self.sizes.host.experts, np.float64)
            first_need = self.kv_need + self.pieces(gpu or HOST).dense
        kept = np.where(on_disk, 0.0, kept)
        seconds = self.request_seconds("stream" if mode == "stream" else "host", device, mode == "experts")
        if disk_layers:
            seconds = np.where(on_disk, self.request_seconds("disk", device), seconds)
        staging = 2 * float(self.weights(device).max())
        if gpu == HOST:
            return Offload(mode, HOST, disk_layers, seconds, first_need + kept, zeros, staging, 0.0)
        return Offload(
            mode=mode,
            first=gpu,
            disk_layers=disk_layers,
            seconds=seconds,
            first_need=first_need if gpu else zeros,
            host_need=kept if gpu else kept + self.kv_need,
            fixed_first=staging if mode == "stream" else 0.0,
            fixed_host=staging if mode == "stream" or disk_layers else 0.0,
        )


def _sum(pieces: Pieces) -> Floats:
    return np.add(pieces.dense, pieces.experts, dtype=np.float64)

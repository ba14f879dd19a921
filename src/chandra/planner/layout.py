"""One candidate: what it takes on each device and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from chandra.kvcache.layout import LayerGroup
from chandra.memory.device import Device
from chandra.memory.plan import Workload
from chandra.models.decoder import workspace_bytes
from chandra.models.spec import ModelSpec
from chandra.planner.cost import LayerLoad, Machine, Profile, layer_seconds
from chandra.planner.placement import Floats, Offload, Tier
from chandra.planner.sizes import ModelSizes

BLOCK_SIZE = 16
ANSWER = 256  # tokens of the answer that the objective counts with
HOST = "cpu"


@dataclass(frozen=True)
class Candidate:
    """One point of the search, without placement. Costs below are per layer, as arrays over the layers."""

    spec: ModelSpec
    sizes: ModelSizes
    workload: Workload
    kv_type: str
    chunk: int
    max_num_seqs: int
    machine: Machine

    @property
    def max_logit_rows(self) -> int:
        return self.max_num_seqs

    @cached_property
    def kv_need(self) -> Floats:
        """Bytes of cache that each layer needs so that the workload always fits."""
        need = []
        for layer in self.spec.layers:
            a = layer.attention
            group = LayerGroup((0,), a.num_kv_heads, a.head_dim, a.window)
            blocks = group.max_blocks(self.workload.context, self.chunk, BLOCK_SIZE, self.workload.parallel)
            need.append(blocks * BLOCK_SIZE * group.token_bytes(self.kv_type))
        return np.array(need, np.float64)

    @cached_property
    def weight_need(self) -> Floats:
        return np.array([self.sizes.layer(i) for i in range(self.spec.num_layers)], np.float64)

    @cached_property
    def dense_need(self) -> Floats:
        return np.array(self.sizes.dense, np.float64)

    def workspace(self, layers: bool, head: bool) -> int:
        """Bytes of activation buffers on a device that computes layers, the head, or both."""
        return workspace_bytes(
            self.spec, layers=layers, head=head, max_rows=self.chunk, max_logit_rows=self.max_logit_rows
        )

    def load(self, index: int, rows: int, sequences: int, context: int) -> LayerLoad:
        """What layer `index` does in a step of `rows` tokens of `sequences` sequences that are `context` long."""
        a = self.spec.layers[index].attention
        seen = min(context, a.window or context)
        row = LayerGroup((0,), a.num_kv_heads, a.head_dim, a.window).token_bytes(self.kv_type)
        active = min(1.0, self.sizes.active * rows)
        return LayerLoad(
            weight_bytes=self.sizes.dense[index] + active * self.sizes.experts[index],
            macs=rows * (self.sizes.macs[index] + 2 * a.num_heads * a.head_dim * min(seen, context / 2 + 1)),
            kv_bytes=sequences * seen * row,
        )

    def request_seconds(self, index: int, placement: str, device: Profile) -> float:
        """Seconds layer `index` takes for one request (prompt and answer), with `parallel` of them sharing a step."""
        w = self.workload
        context = min(w.context, w.prompt + ANSWER // 2)
        prompt = self.load(index, min(self.chunk, w.prompt), 1, w.prompt)
        step = self.load(index, w.parallel, w.parallel, context)
        chunks = -(-w.prompt // self.chunk)
        kind = placement if placement in ("stream", "disk") else "resident"
        return chunks * layer_seconds(prompt, kind, device, self.machine) + (  # type: ignore[arg-type]
            ANSWER * layer_seconds(step, kind, device, self.machine) / w.parallel  # type: ignore[arg-type]
        )

    def seconds(self, placement: str, device: Profile) -> Floats:
        return np.array([self.request_seconds(i, placement, device) for i in range(self.spec.num_layers)])

    def tier(self, device: Device, head: bool, reserve: int, allowed: Sequence[bool]) -> Tier:
        """The device as a place for layers, with everything but layers already taken off its room."""
        profile = self.machine.of(device.name)
        taken = profile.runtime + reserve + self.workspace(True, head)
        if head:
            taken += self.sizes.head + (self.sizes.embedding if self.sizes.tied else 0)
        need = self.weight_need + self.kv_need
        need = np.where(np.asarray(allowed), need, np.inf)
        return Tier(device.name, device.cap - taken, self.seconds("resident", profile), need)

    def offload(
        self, mode: str, gpu: Device | None, host_room: int, disk_layers: int, allowed: Sequence[bool]
    ) -> Offload:
        """Offloading the first layers in one of the modes; the first `disk_layers` of them are read from disk."""
        on_disk = np.arange(self.spec.num_layers) < disk_layers
        host = self.machine.host
        compute = host if mode == "host" or gpu is None else self.machine.of(gpu.name)
        seconds = self.seconds("stream" if mode == "stream" else "resident", compute)
        weights, gpu_need = self.weight_need, np.zeros(self.spec.num_layers)
        host_need = np.where(on_disk, 0.0, weights)
        if mode == "host":
            host_need = host_need + self.kv_need
        elif mode == "stream":
            gpu_need = self.kv_need
        else:  # experts on the host, attention on the GPU
            gpu_need = self.dense_need + self.kv_need
            host_need = np.where(on_disk, 0.0, np.array(self.sizes.experts, np.float64))
            share = host_need.sum() / max(weights.sum(), 1.0)
            seconds = (1 - share) * seconds + share * self.seconds("resident", host)
        if disk_layers:
            seconds = np.where(on_disk, self.seconds("disk", compute), seconds)
        staging = 2 * int(weights.max()) if mode == "stream" else 0
        host_need = np.where(np.asarray(allowed), host_need, np.inf)
        return Offload(
            mode=mode,
            seconds=seconds,
            gpu_need=gpu_need,
            host_need=host_need,
            host_room=host_room,
            fixed_gpu=staging,
            fixed_host=staging if mode == "stream" else 2 * int(weights.max()) if disk_layers else 0,
        )


def head_seconds(candidate: Candidate, device: Profile, rows: int = 1) -> float:
    """Seconds to compute the logits of `rows` rows."""
    return max(candidate.sizes.head_read / device.bandwidth, rows * candidate.sizes.head_macs / device.macs)


def allowed_layers(ranges: Mapping[str, Sequence[tuple[int, int]]], device: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers may lie on a device: those the user gave it and those the user gave no one."""
    given = {i: name for name, spans in ranges.items() for first, last in spans for i in range(first, last + 1)}
    return tuple(given.get(i, device if device not in ranges else None) == device for i in range(num_layers))

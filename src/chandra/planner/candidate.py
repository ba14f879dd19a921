"""One point of the search, without placement: what each layer takes on each device and how long it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np

from chandra.kvcache.layout import LayerGroup
from chandra.memory.device import Device
from chandra.memory.plan import Part, Placement, Workload
from chandra.models.decoder import FLOAT, workspace_bytes
from chandra.models.rope import rope_bytes
from chandra.models.weight_stream import lookup_bytes, piece_rows
from chandra.planner.cost import SLOTS, Machine, Rate
from chandra.planner.kernels import Limits, host_workspace
from chandra.planner.placement import Floats, Mode, Offload, Tier, disk_sums, sums
from chandra.planner.sizes import ModelSizes, Pieces, PlannableModel

BLOCK_SIZE = 16
ANSWER = 256  # tokens of the answer that plans are compared with
HOST = "cpu"
TORCH = 200 << 20  # bytes that the process grows by when it imports torch
HOP = 2e-5  # seconds to hand the hidden state to the next device

# 0: everything on the GPUs (or, without any, in host memory); 1: the rest in host memory; 2: and on disk; 3: embedding
# and head on disk as well, computed by the CPU
Spill = int
Number = float | np.ndarray[Any, np.dtype[Any]]


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
    swap: int | None = None  # bytes of swap space asked for
    spill: Spill = 0
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def outer_on_disk(self) -> bool:
        """Whether embedding and head stay in the file."""
        return self.spill == 3

    @property
    def num_layers(self) -> int:
        return self.model.spec.num_layers

    def rate(self, device: str) -> Rate:
        """What the device's kernels do with these formats."""
        if device not in self._cache:
            self._cache[device] = self.machine.of(device).rate(self.sizes.mix)
        return cast(Rate, self._cache[device])

    def pieces(self, device: str) -> Pieces:
        """Bytes of the weights as this device keeps them."""
        return self.sizes.host if self._on_cpu(device) else self.sizes.gpu

    def _on_cpu(self, device: str) -> bool:
        return device == HOST or device.startswith("virtual")

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
        shapes, which, _, _ = self.model.attention
        return np.array([measure(LayerGroup((0,), *shape)) for shape in shapes], np.float64)[which]

    def weights(self, device: str) -> Floats:
        return self.pieces(device).layers

    @cached_property
    def least_need(self) -> Floats:
        """Bytes of each layer and its cache that no device can do without."""
        return np.minimum(self.weights(HOST), self.sizes.gpu.layers) + self.kv_need

    def least_rate(self, device: str, gpus: Sequence[Device]) -> float:
        """The least seconds per byte of any layer on a device; on the host, however it is offloaded."""
        key = ("least", device)
        if key not in self._cache:
            seconds = self.request_seconds(device)
            for gpu in gpus if device == HOST and self.sizes.packed.experts.any() else ():
                seconds = np.minimum(seconds, self.request_seconds(gpu.name, apart=True))
            self._cache[key] = float((seconds / self.least_need).min())
        return cast(float, self._cache[key])

    def layer_seconds(self, device: str) -> float:
        """Seconds of all layers on a device."""
        if ("all", device) not in self._cache:
            self._cache["all", device] = float(self.request_seconds(device).sum())
        return cast(float, self._cache["all", device])

    def workspace(self, device: str, head: bool, layers: Sequence[int] | None = None) -> int:
        """Bytes of the decoder's buffers on a device, and of what a GPU's backend keeps. `layers`: those held; None:
        any of them."""
        spec, rows = self.model.spec, self.max_num_seqs if head else 0
        scratch = None if self._on_cpu(device) else self.model.kernels.gpu_scratch(spec, self.limits, BLOCK_SIZE)
        own = scratch.nbytes if scratch else 0
        return own + workspace_bytes(spec, range(spec.num_layers) if layers is None else layers, self.chunk, rows)

    @property
    def limits(self) -> Limits:
        floats = self.sizes.multiplies_floats
        return Limits(self.chunk, self.max_num_seqs, self.workload.context, self.max_num_seqs, floats)

    def ropes(self, layers: Sequence[int] | None = None) -> int:
        """Bytes of the rotary embedding's frequencies for these layers; None: for all."""
        spec = self.model.spec
        held = range(spec.num_layers) if layers is None else layers
        return rope_bytes(spec.layers[i].attention.rope for i in held)

    def host_workspace(self, devices: Iterable[str], groups: int | None = None) -> int:
        """Bytes of the host that steps on these devices take besides. `groups`: of layers; None: as many as can be."""
        used = set(devices)
        groups = groups or len(used) * len(self.model.attention[0])
        key = (self.limits, groups, BLOCK_SIZE, any(map(self._on_cpu, used)), used != {HOST})
        if key not in self.model.known:
            self.model.known[key] = host_workspace(self.model.kernels, self.model.spec, *key)
        return self.model.known[key]

    def step_seconds(
        self, device: str, rows: Number, sequences: Number, context: Number, apart: bool = False
    ) -> Floats:
        """Seconds of each layer whose weights are at hand in a step of `rows` tokens of `sequences` sequences that are
        `context` long: `(layers,)`, or a row of them for each row of the inputs.

        `device` computes it; with `apart` the CPU computes the experts.
        """
        sizes, rate, host, profile = self.sizes, self.rate(device), self.rate(HOST), self.machine.of(device)
        _, _, windows, heads = self.model.attention
        seen = np.minimum(context, windows)
        macs, read = rows * sizes.dense_macs, sizes.packed.dense
        scored, cached = rows * 2 * heads * np.minimum(seen, (context + rows) / 2), sequences * seen * self.kv_token
        expert_macs: Number = 0.0
        elsewhere: Number = 0.0
        if profile.attention is None:
            macs, read = macs + scored, read + cached
        else:
            elsewhere = np.maximum(cached / profile.attention.bandwidth, scored / profile.attention.macs)
        if sizes.packed.experts.any():
            experts = sizes.packed.layers - read
            used, expert_macs = experts * (1 - sizes.idle**rows), rows * sizes.expert_macs
            if apart:
                hops = self.machine.host.layer_overhead + 2 * HOP
                apart_seconds = np.maximum(used / host.bandwidth, expert_macs / host.macs) + hops
                elsewhere = elsewhere + np.where(experts > 0, apart_seconds, 0)
                expert_macs = 0.0
            else:
                read = read + used
        compute = np.maximum(read / rate.bandwidth, (macs + expert_macs) / rate.macs)
        return cast(Floats, compute + profile.layer_overhead + elsewhere)

    def bringing(self, placement: Placement, device: str) -> tuple[float, float]:
        """Seconds, for each streamed byte in the layout of the device, that a step takes to bring it there: before the
        layer computes, and beside what is computed. The CPU makes of what is on disk what its kernels want before it
        computes; for other devices the thread that reads does that. Pages that the system still has take the CPU's
        own time to bring in."""
        copying = 1 / (self.machine.of(device).link or np.inf)
        if placement != "disk":
            return 0.0, copying if placement == "stream" else 0.0
        packed = self.sizes.packed.streamed.sum() / self.pieces(device).streamed.sum()
        reading, making = packed / self.machine.disk_rate(self.sizes.stored), packed / self.rate(HOST).mapped
        if device != HOST:
            return copying, reading + making
        return (reading + making, 0.0) if self.machine.in_cache(self.sizes.stored) else (making, reading)

    def micro_rows(self, devices: Iterable[str]) -> int:
        """Rows from which on a step takes each of the devices longer the more rows it has, doubled: parts of a step
        that are as large gain by passing through the devices one after another. 0 where only one device computes:
        virtual devices are computed by the CPU, and what is cut from one GPU by that GPU."""
        used = {HOST if self._on_cpu(device) else device for device in devices}
        if len({device.split("/")[0] for device in used}) < 2:
            return 0
        values = self.sizes.bits_per_weight / 8
        return 16 * max(1, *(int(2 * self.rate(d).macs * values / self.rate(d).bandwidth / 16) + 1 for d in used))

    @property
    def steps(self) -> tuple[int, float]:
        """Steps of one request: those of the prompt, and its share of those of the answer."""
        return -(-self.workload.prompt // self.chunk), ANSWER / self.workload.parallel

    def request_seconds(self, device: str, apart: bool = False) -> Floats:
        """Seconds each layer takes for one request (prompt and answer), with `parallel` of them sharing a step, its
        weights at hand."""
        key = (device, apart)
        if key not in self._cache:
            w = self.workload
            rows, sequences = [[min(self.chunk, w.prompt)], [w.parallel]], [[1], [w.parallel]]
            contexts = [[w.prompt / 2], [self.typical_context]]
            computed = self.step_seconds(device, np.array(rows), np.array(sequences), np.array(contexts), apart)
            self._cache[key] = np.array(self.steps) @ computed
        return cast(Floats, self._cache[key])

    @property
    def typical_context(self) -> int:
        """Tokens in the cache in the middle of an answer."""
        return min(self.workload.context, self.workload.prompt + ANSWER // 2)

    def head_step(self, device: str, sequences: int) -> float:
        """Seconds to compute one row of logits for each sequence."""
        rate, read, macs = self.rate(device), self.table_bytes, sequences * self.sizes.head_macs
        if self.outer_on_disk:
            return max(read / self.machine.disk_rate(self.sizes.stored), read / rate.mapped + macs / rate.macs)
        return max(read / rate.bandwidth, macs / rate.macs)

    @property
    def table_bytes(self) -> int:
        """Bytes of the head's weight in the file."""
        pieces = self.sizes.packed
        return pieces.embedding if self.sizes.tied else pieces.head - pieces.small_head

    def outer_staging(self) -> int:
        """Bytes of the host for pieces of the head that pass, their logits, and rows looked up in the file."""
        if not self.outer_on_disk:
            return 0
        rows, vocab = piece_rows(self.model.spec.vocab_size), self.model.spec.vocab_size
        pieces = min(SLOTS * rows, vocab) * (self.table_bytes // vocab) + FLOAT * self.max_num_seqs * rows
        return pieces + lookup_bytes(self.chunk, self.sizes.packed.embedding)

    def head_seconds(self, device: str) -> float:
        """Seconds the head takes for one request."""
        return self.head_step(device, 1) + self.steps[1] * self.head_step(device, self.workload.parallel)

    def outer_weights(self, device: str, head: bool) -> int:
        """Bytes of embedding and head on a device. The embedding lies on the host, unless it is the head as well."""
        pieces = self.pieces(device)
        if self.outer_on_disk:
            return pieces.small_head + self.outer_staging() if head else 0
        taken = pieces.head if head else 0
        if head if self.sizes.tied else device == HOST:
            taken += pieces.embedding
        return taken

    def taken(self, device: str, head: bool, computes: bool = True) -> int:
        """Bytes of everything but layers and their cache on a device that computes layers or only passes them on."""
        known = self.model.known
        key = (self._on_cpu(device), head, computes, self.limits)
        if key not in known:
            own = self.workspace(device, head, None if computes else ())
            known[key] = own + (self.ropes() if computes else 0)
        return self.runtime(device) + self.outer_weights(device, head) + known[key]

    def runtime(self, device: str) -> int:
        """Bytes taken by merely using the device. Conversions are computed by torch."""
        return self.machine.of(device).runtime + (TORCH if device == HOST and self.sizes.convert else 0)

    def tier(self, device: Device, head: bool, room: float, allowed: Sequence[bool]) -> Tier:
        """The device as a place for layers. `room`: bytes left for them."""
        need = np.where(allowed, self.weights(device.name) + self.kv_need, np.inf)
        seconds = self.request_seconds(device.name)
        return Tier(device.name, room, seconds, need, self.head_seconds(device.name) if head else 0.0)

    def offload(self, mode: Mode, gpu: str | None, disk_layers: int) -> Offload:
        """Offloading in one of the modes; `disk_layers` of what is offloaded are read from disk.

        `gpu`: the device that computes what the CPU does not; None: the CPU computes beside GPUs; "cpu": there is no
        other device, so that all that is offloaded is on disk.
        """
        if mode == "stream" or gpu == HOST:
            return self._brought(mode, gpu or HOST, disk_layers)
        experts, packed, host = mode == "experts", self.sizes.packed, self.sizes.host

        def on_disk(values: Floats) -> Floats:
            return disk_sums(values, disk_layers, in_run=False) if disk_layers else np.zeros(1)

        off = np.arange(self.num_layers + 1)
        streamed = packed.streamed_experts if experts else packed.streamed
        staging = np.minimum(min(SLOTS, disk_layers), off) * _largest(streamed)
        before, beside = self.bringing("disk", HOST)
        reading = on_disk(self._request_bytes(HOST, experts))
        seconds = np.maximum(sums(self.request_seconds(gpu or HOST, experts)) + before * reading, beside * reading)
        if gpu is None:
            need = sums(self.weights(HOST) + self.kv_need) - on_disk(host.streamed) + staging
            return Offload(mode, gpu, disk_layers, seconds, np.zeros(1), need, on_disk(packed.layers))
        resident, kept = sums(self.request_seconds(gpu)), sums(self.weights(gpu) + self.kv_need)
        first_need = (sums(self.pieces(gpu).dense + self.kv_need) - kept)[:, None] + kept
        need = sums(host.experts) - on_disk(host.streamed_experts) + staging
        read = on_disk(packed.experts)
        return Offload(
            mode, gpu, disk_layers, (seconds - resident)[:, None] + resident, first_need, need[:, None], read[:, None]
        )

    def _brought(self, mode: Mode, device: str, disk_layers: int) -> Offload:
        """Layers brought to their device for each step, spread through its run: copied, or read from disk."""

        def on_disk(values: Floats) -> Floats:
            return disk_sums(values, disk_layers, in_run=True) if disk_layers else np.zeros(1)

        pieces, off = self.pieces(device), np.arange(self.num_layers + 1)[:, None]
        moved, read = pieces.spread, on_disk(pieces.streamed)
        before, beside = self.bringing("disk", device)
        reading = on_disk(self._request_bytes(device))
        seconds = np.maximum(sums(self.request_seconds(device)) + before * reading, beside * reading)
        seconds = np.maximum(seconds, sum(self.steps) * self.bringing("stream", device)[1] * (moved - read))
        seconds = np.where((off > 0) & (off <= SLOTS), np.inf, seconds)  # they would never leave their slots
        kept, disk_need = sums(self.weights(device) + self.kv_need) - moved, on_disk(self.sizes.packed.layers)
        if device == HOST:
            need = kept + np.minimum(SLOTS, off) * _largest(self.sizes.packed.streamed)
            return Offload(mode, device, disk_layers, seconds, need, np.zeros(1), disk_need)
        largest, reads = _largest(pieces.streamed), np.minimum(off, disk_layers) > 0
        need = kept + (reads + SLOTS * (off > disk_layers)) * largest
        return Offload(mode, device, disk_layers, seconds, need, moved - read + SLOTS * reads * largest, disk_need)

    def brought(self, device: str, rows: Number, experts: bool = False) -> Floats:
        """Bytes of each layer, or of its `experts`, that a step of so many rows brings to a device, in its layout. The
        CPU reads no experts that the rows do not use."""
        pieces = self.pieces(device)
        used = 1 - self.sizes.idle**rows if device == HOST else 1.0
        dense = 0.0 if experts else pieces.streamed - pieces.streamed_experts
        return cast(Floats, dense + used * pieces.streamed_experts)

    def _request_bytes(self, device: str, experts: bool = False) -> Floats:
        """Those of all steps of one request."""
        rows = np.array([[min(self.chunk, self.workload.prompt)], [self.workload.parallel]])
        return np.array(self.steps) @ np.broadcast_to(self.brought(device, rows, experts), (2, self.num_layers))

    def parted(self, part: Part) -> tuple[int, int]:
        """Bytes of a part that is streamed or on disk: those that are brought for each step, but for embedding and
        head, and those that lie where it is computed nevertheless."""
        pieces = self.pieces(part.device)
        if part.name in ("embedding", "head"):
            return 0, pieces.small_head if part.name == "head" else 0
        _, index, *experts = part.name.split(".")
        held = self.sizes.packed if part.device == HOST else pieces
        brought, small = (
            held.streamed_experts if experts else held.streamed,
            pieces.small_experts if experts else pieces.small,
        )
        return int(brought[int(index)]), int(small[int(index)])


def _largest(sizes: Floats) -> Floats:
    """[i]: the largest of the first i."""
    return np.maximum.accumulate(np.append(0.0, sizes))

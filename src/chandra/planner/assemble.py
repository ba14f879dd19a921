"""From a found placement to the `Plan`: parts, predicted bytes of every device and kind, predicted speed, reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from chandra.kvcache.layout import group_layers
from chandra.memory.device import Device, format_size
from chandra.memory.ledger import Kind
from chandra.memory.plan import Part, Placement, Plan, Prediction, Speed
from chandra.planner.cost import layer_seconds
from chandra.planner.layout import ANSWER, BLOCK_SIZE, HOST, Candidate, head_seconds
from chandra.planner.placement import Split


class Found(Protocol):
    """A placed candidate, as `planner.search` finds it."""

    @property
    def split(self) -> Split: ...
    @property
    def mode(self) -> str: ...
    @property
    def disk_layers(self) -> int: ...
    @property
    def head_device(self) -> str: ...


def assemble(name: str, candidate: Candidate, found: Found, devices: Sequence[Device], reserve: int) -> Plan:
    """The plan of a placed candidate."""
    layers, experts = _parts(candidate, found)
    sizes = candidate.sizes
    head = Part("head", "host" if found.head_device == HOST else "resident", found.head_device, sizes.head)
    embedding_device = found.head_device if sizes.tied else HOST
    embedding = Part("embedding", "host" if embedding_device == HOST else "resident", embedding_device, sizes.embedding)
    attention = [layer.attention for layer in candidate.spec.layers]
    groups = group_layers(attention, [part.device for part in layers])
    w = candidate.workload
    predictions = _predictions(candidate, (embedding, *layers, *experts, head), layers)
    return Plan(
        model=name,
        format=sizes.label,
        convert=sizes.convert,
        workload=w,
        devices=tuple(devices),
        embedding=embedding,
        layers=layers,
        head=head,
        kv_type=candidate.kv_type,
        block_size=BLOCK_SIZE,
        num_blocks=tuple(g.max_blocks(w.context, candidate.chunk, BLOCK_SIZE, w.parallel) for g in groups),
        swap_bytes=0,
        chunk=candidate.chunk,
        max_num_seqs=candidate.max_num_seqs,
        max_logit_rows=candidate.max_logit_rows,
        predictions=predictions,
        speed=_speed(candidate, layers, experts, found.head_device),
        experts=experts,
        decisions=_decisions(candidate, layers, experts, found),
        warnings=_warnings(candidate, devices, reserve),
    )


def _parts(candidate: Candidate, found: Found) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Layers, and experts that lie apart from them."""
    sizes, split = candidate.sizes, found.split
    owner = [device for device, count in zip(split.order, split.counts, strict=True) for _ in range(count)]
    layers, experts = [], []
    for index in range(candidate.spec.num_layers):
        label = f"layers.{index}"
        if index >= split.off:
            layers.append(Part(label, "resident", owner[index - split.off], sizes.layer(index)))
            continue
        kept: Placement = "disk" if index < found.disk_layers else "host"
        if found.mode == "host":
            layers.append(Part(label, kept, HOST, sizes.layer(index)))
        elif found.mode == "stream":
            kept = "disk" if kept == "disk" else "stream"
            layers.append(Part(label, kept, split.order[0], sizes.layer(index)))
        else:
            layers.append(Part(label, "resident", split.order[0], sizes.dense[index]))
            experts.append(Part(f"{label}.experts", kept, HOST, sizes.experts[index]))
    return tuple(layers), tuple(experts)


def _predictions(candidate: Candidate, parts: Sequence[Part], layers: Sequence[Part]) -> tuple[Prediction, ...]:
    need: dict[tuple[str, Kind], int] = defaultdict(int)
    largest = max((candidate.sizes.layer(i) for i in range(len(layers))), default=0)
    head_device = parts[-1].device
    for part in parts:
        if part.placement != "disk":
            home = part.device if part.placement == "resident" else HOST
            need[home, Kind.WEIGHTS] += part.nbytes
        if part.placement == "stream":
            need[part.device, Kind.STAGING] = need[HOST, Kind.STAGING] = 2 * largest
        if part.placement == "disk":
            need[HOST, Kind.STAGING] = max(need[HOST, Kind.STAGING], 2 * largest)
    for part, nbytes in zip(layers, candidate.kv_need, strict=True):
        need[part.device, Kind.KV] += int(nbytes)
    for device in {part.device for part in parts} | {HOST}:
        computes = any(part.device == device for part in (*layers, *(p for p in parts if "experts" in p.name)))
        need[device, Kind.WORKSPACE] += candidate.workspace(computes, device == head_device)
        need[device, Kind.RUNTIME] += candidate.machine.of(device).runtime
    return tuple(Prediction(d, k, n) for (d, k), n in sorted(need.items()) if n)


def _speed(candidate: Candidate, layers: Sequence[Part], experts: Sequence[Part], head_device: str) -> Speed:
    machine, w = candidate.machine, candidate.workload
    apart = {int(part.name.split(".")[1]) for part in experts}

    def step(rows: int, sequences: int, context: int) -> float:
        seconds = head_seconds(candidate, machine.of(head_device), sequences)
        for index, part in enumerate(layers):
            load = candidate.load(index, rows, sequences, context)
            device = machine.host if index in apart else machine.of(part.device)
            seconds += layer_seconds(load, part.placement, device, machine)
        return seconds

    chunks, rest = divmod(w.prompt, candidate.chunk)
    first = sum(step(candidate.chunk, 1, (i + 1) * candidate.chunk) for i in range(chunks))
    first += step(rest, 1, w.prompt) if rest else 0.0
    context = min(w.context, w.prompt + ANSWER // 2)
    return Speed(
        load=candidate.sizes.total / machine.disk,
        first_token=first,
        decode=1 / step(1, 1, context),
        total=w.parallel / step(w.parallel, w.parallel, context),
    )


def _decisions(candidate: Candidate, layers: Sequence[Part], experts: Sequence[Part], found: Found) -> tuple[str, ...]:
    """Why it is so, in words."""
    sizes, w = candidate.sizes, candidate.workload
    runs: list[tuple[str, int, int]] = []
    for index, part in enumerate(layers):
        where = {
            "resident": part.device,
            "host": "the CPU",
            "disk": "disk",
            "stream": f"host memory, streamed to {part.device}",
        }
        place = where[part.placement]
        if runs and runs[-1][0] == place:
            runs[-1] = (place, runs[-1][1], index)
        else:
            runs.append((place, index, index))
    text = "; ".join(f"layers {a}-{b} on {place}" for place, a, b in runs)
    out = [
        f"weights as {sizes.label}: {format_size(sizes.total)}, {sizes.bits_per_weight:.2f} bits per weight"
        + (", converted while loading" if sizes.convert else ""),
        text + (f"; experts of {len(experts)} layers on the CPU" if experts else ""),
        f"context {w.context} x {w.parallel} with {candidate.kv_type} cache: {format_size(candidate.kv_need.sum())}",
        f"steps of at most {candidate.chunk} tokens",
    ]
    if found.split.off and found.split.order:
        out.append(
            {
                "host": "offloaded layers are computed where they lie: reading them in host memory beats copying them",
                "stream": "offloaded layers are copied to the GPU for each step: the link beats the CPU",
                "experts": "experts stay in host memory: a token reads few of them, attention and cache stay on the GPU",
            }[found.mode]
        )
    return tuple(out)


def _warnings(candidate: Candidate, devices: Sequence[Device], reserve: int) -> tuple[str, ...]:
    out = []
    for device in devices:
        if device.kind == "assumed":
            out.append(f"{device.name} is assumed, not measured: its speed is from datasheets")
    if not candidate.machine.measured:
        out.append("this machine is not calibrated: run `chandra calibrate` for true speeds")
    if reserve:
        out.append(f"{format_size(reserve)} of every GPU left alone, as asked")
    return tuple(out)

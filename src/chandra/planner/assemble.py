"""From a found placement to the `Plan`: parts, predicted bytes of every device and kind, predicted speed, reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from chandra.kvcache.layout import group_layers
from chandra.kvcache.swap import swap_slots
from chandra.memory.device import Device, format_size
from chandra.memory.ledger import Kind
from chandra.memory.plan import Part, Placement, Plan, Prediction, Speed
from chandra.models.pipeline import MOST
from chandra.planner.candidate import BLOCK_SIZE, HOP, HOST, Candidate
from chandra.planner.cost import SLOTS, crossover_tokens, waiting
from chandra.planner.kernels import packing, repacking
from chandra.planner.planner import Found

GPUS = ("cuda", "assumed")
GRAPHS = 32 << 20  # bytes of a GPU for recorded steps
SWAP_SHARE = 4  # one part in so many of the host memory that is left


def assemble(found: Found, devices: Sequence[Device], reserve: int) -> Plan:
    """The plan of a placed candidate."""
    candidate, head_device = found.candidate, found.head
    layers, experts = _parts(found)
    pieces = candidate.pieces(head_device)
    head = Part("head", _at(head_device), head_device, pieces.head)
    table = head_device if candidate.sizes.tied else HOST
    embedding = Part("embedding", _at(table), table, candidate.pieces(table).embedding)
    if candidate.outer_on_disk:
        packed = candidate.sizes.packed
        head = replace(head, placement="disk", nbytes=packed.head)
        embedding = replace(embedding, placement="disk", nbytes=packed.embedding)
    parts = (embedding, *layers, *experts, head)
    w = candidate.workload
    groups = group_layers([x.attention for x in candidate.model.spec.layers], [part.device for part in layers])
    num_blocks = tuple(g.max_blocks(w.context, candidate.chunk, BLOCK_SIZE, w.parallel) for g in groups)
    predictions = _predictions(found, parts, layers, len(groups))
    predictions += _graphs(predictions, devices, reserve)
    moved = experts or any(part.placement in ("stream", "disk") for part in layers)  # not more often than it must be
    micro_rows = 0 if moved else candidate.micro_rows(part.device for part in layers)
    speed = _speed(candidate, layers, experts, head_device, micro_rows)
    host = next(device for device in devices if device.name == HOST)
    left = host.cap - reserve - sum(p.nbytes for p in predictions if p.device == HOST and p.kind != Kind.LOADING)
    swap = _swap_bytes(candidate, layers, left, speed)
    slots = swap_slots(groups, num_blocks, candidate.kv_type, BLOCK_SIZE, swap)
    swapped = sum(n * BLOCK_SIZE * g.token_bytes(candidate.kv_type) for g, n in zip(groups, slots, strict=True))
    plan = Plan(
        model=candidate.model.name,
        format=candidate.sizes.label,
        convert=candidate.sizes.convert,
        workload=w,
        devices=tuple(devices),
        embedding=embedding,
        layers=layers,
        head=head,
        kv_type=candidate.kv_type,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        swap_bytes=swap,
        chunk=candidate.chunk,
        micro_rows=micro_rows,
        max_num_seqs=candidate.max_num_seqs,
        max_logit_rows=candidate.max_num_seqs,
        multiplies_floats=candidate.sizes.multiplies_floats,
        predictions=(*predictions, *([Prediction(HOST, Kind.SWAP, swapped)] if swapped else [])),
        loading=_loading(candidate, parts, predictions),
        speed=speed,
        experts=experts,
        decisions=_decisions(found, layers, experts, head),
        warnings=_warnings(candidate, devices, reserve),
    )
    for device in devices:  # the search has seen to it; a plan that breaks its promise must not leave this place
        used = plan.predicted(device.name)
        assert not used or used + reserve <= device.cap, f"{device.name} is over its cap"
    return plan


def _swap_bytes(candidate: Candidate, layers: Sequence[Part], left: int, speed: Speed) -> int:
    """Swap space as asked for. Otherwise, if copying a token's keys and values to the host and back takes less time
    than computing them again: as much as the cache on other devices has, within a quarter of what is left there."""
    if candidate.swap is not None:
        return candidate.swap
    away = [i for i, part in enumerate(layers) if part.device != HOST]
    links = [candidate.machine.of(layers[i].device).link or float("inf") for i in away]
    copies = sum(2 * candidate.kv_token[i] / link for i, link in zip(away, links, strict=True))
    pays = copies < speed.first_token / candidate.workload.prompt
    return min(int(candidate.kv_need.sum()), left // SWAP_SHARE) if away and pays else 0


def _at(device: str) -> Placement:
    return "host" if device == HOST else "resident"


def _parts(found: Found) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Layers, and experts that lie apart from them."""
    candidate, split, offload = found.candidate, found.split, found.offload
    owner = [offload.first or HOST if offload else ""] * split.off
    owner += [device for device, count in zip(split.order, split.counts, strict=True) for _ in range(count)]
    end = split.off + split.counts[0] if offload and offload.first else split.off
    moved, read = offload.moved(split.off, end) if offload else ((), ())
    layers, experts = [], []
    for index, device in enumerate(owner):
        label, on_disk = f"layers.{index}", index in read
        if offload is None or index not in moved:
            layers.append(Part(label, _at(device), device, int(candidate.pieces(device).layers[index])))
            continue
        if offload.mode == "experts":
            layers.append(Part(label, "resident", device, int(candidate.pieces(device).dense[index])))
            nbytes = int((candidate.sizes.packed if on_disk else candidate.sizes.host).experts[index])
            experts.append(Part(f"{label}.experts", "disk" if on_disk else "host", HOST, nbytes))
        else:
            kept: Placement = "disk" if on_disk else offload.mode
            pieces = candidate.sizes.packed if on_disk else candidate.pieces(device)
            layers.append(Part(label, kept, device, int(pieces.layers[index])))
    return tuple(layers), tuple(experts)


def _loading(candidate: Candidate, parts: Sequence[Part], predictions: Sequence[Prediction]) -> int:
    """Bytes of the host at the highest while loading: the process, staging buffers, weights so far, a tensor."""
    before = sum(p.nbytes for p in predictions if p.device == HOST and p.kind in (Kind.RUNTIME, Kind.STAGING))
    return before - repacking(parts) + candidate.sizes.loading({part.name: part.placement for part in parts})[1]


def _predictions(found: Found, parts: Sequence[Part], layers: Sequence[Part], groups: int) -> tuple[Prediction, ...]:
    candidate = found.candidate
    need: dict[tuple[str, Kind], int] = defaultdict(int)
    need[HOST, Kind.LOADING] = candidate.sizes.loading({part.name: part.placement for part in parts})[0]
    need[HOST, Kind.STAGING] = repacking(parts) + packing(p.device for p in parts) + candidate.outer_staging()
    for part in parts:
        mapped = part.name == "embedding" and part.placement == "host" and candidate.sizes.mapped
        kept = candidate.parted(part)[1] if part.placement in ("stream", "disk") else part.nbytes
        need[part.device, Kind.PAGE_CACHE if mapped else Kind.WEIGHTS] += kept
        if part.placement == "stream":
            need[HOST, Kind.WEIGHTS] += part.nbytes - kept
    for where, nbytes in _staging(candidate, parts):
        need[where, Kind.STAGING] += nbytes
    for part, nbytes in zip(layers, candidate.kv_need, strict=True):
        need[part.device, Kind.KV] += int(nbytes)
    need[HOST, Kind.WORKSPACE] = candidate.host_workspace((part.device for part in parts), groups)
    for device in {part.device for part in parts} | {HOST}:
        held = [i for i, part in enumerate(layers) if part.device == device]
        need[device, Kind.WEIGHTS] += candidate.ropes(held)
        if held or any(part.device == device for part in parts):
            need[device, Kind.WORKSPACE] += candidate.workspace(device, device == parts[-1].device, held)
        need[device, Kind.RUNTIME] += candidate.runtime(device)
    return tuple(Prediction(d, k, n) for (d, k), n in sorted(need.items()) if n)


def _staging(candidate: Candidate, parts: Sequence[Part]) -> Iterator[tuple[str, int]]:
    """Bytes of devices for what is brought to them for each step."""
    brought: dict[tuple[str, str], list[int]] = defaultdict(list)
    for part in parts:
        if part.placement in ("stream", "disk"):
            brought[part.placement, part.device].append(candidate.parted(part)[0])
    for (placement, device), sizes in brought.items():
        if device == HOST:
            yield HOST, min(SLOTS, sum(map(bool, sizes))) * max(sizes)
        else:
            yield device, (SLOTS if placement == "stream" else 1) * max(sizes)
            yield HOST, 0 if placement == "stream" else SLOTS * max(sizes)


def _graphs(predictions: Sequence[Prediction], devices: Sequence[Device], reserve: int) -> tuple[Prediction, ...]:
    """Memory to record steps in, on the GPUs that have it left."""
    used = {d.name: sum(p.nbytes for p in predictions if p.device == d.name) for d in devices if d.kind in GPUS}
    caps = {d.name: d.cap for d in devices}
    return tuple(Prediction(d, Kind.GRAPHS, GRAPHS) for d, n in used.items() if n and n + GRAPHS + reserve <= caps[d])


def _speed(
    candidate: Candidate, layers: Sequence[Part], experts: Sequence[Part], head_device: str, micro_rows: int
) -> Speed:
    machine, w = candidate.machine, candidate.workload
    apart = {int(part.name.split(".")[1]): part for part in experts}
    places = [part.device for part in layers] + [head_device]
    hops = sum(a != b for a, b in pairwise(places))
    stages = [(apart.get(i, part).placement, part.device, i in apart) for i, part in enumerate(layers)]

    def step(rows: int, sequences: int, context: float) -> float:
        """All stages take a part of the step one after another, the slowest one the others as well."""
        parts = max(1, min(MOST, rows // micro_rows)) if micro_rows else 1
        each = {}
        for placement, device, split in set(stages):
            seconds = candidate.step_seconds(device, rows // parts, -(-sequences // parts), context, split)
            reader = HOST if split else device
            before, beside = candidate.bringing(placement, reader)
            brought = candidate.brought(reader, rows, split)
            each[placement, device, split] = seconds + before * brought, beside * brought
        of_device: dict[str, float] = defaultdict(float)
        layers = []
        for i, stage in enumerate(stages):
            busy, beside = (float(seconds[i]) for seconds in each[stage])
            of_device[stage[1]] += busy
            layers.append((f"{stage[0]} {stage[1]}", busy, beside))
        rest = candidate.head_step(head_device, sequences) + hops * parts * HOP
        return sum(of_device.values()) + (parts - 1) * max(of_device.values()) + rest + waiting(layers, rest)

    chunks, rest = divmod(w.prompt, candidate.chunk)
    first = sum(step(candidate.chunk, 1, (i + 1) * candidate.chunk) for i in range(chunks))
    first += step(rest, 1, w.prompt) if rest else 0.0
    context = candidate.typical_context
    pieces = candidate.sizes.packed
    copied = sum(part.nbytes / (machine.of(part.device).link or 1e12) for part in layers if part.device != HOST)
    packing = 8 * pieces.total / candidate.sizes.bits_per_weight / machine.convert if candidate.sizes.convert else 0.0
    return Speed(
        load=candidate.sizes.stored / machine.disk + packing + copied,
        first_token=first,
        decode=1 / step(1, 1, context),
        total=w.parallel / step(w.parallel, w.parallel, context),
    )


def _places(layers: Sequence[Part]) -> Iterator[str]:
    """Where runs of layers lie, in words."""
    start = 0
    for device, group in groupby(layers, lambda part: part.device):
        run = list(group)
        text = f"layers {start}-{start + len(run) - 1} on {'the CPU' if device == HOST else device}"
        for placement, how in (("stream", "in host memory, copied there for each step"), ("disk", "read from disk")):
            count = sum(part.placement == placement for part in run)
            text += f", {count if count < len(run) else 'all'} of them {how}" if count else ""
        yield text
        start += len(run)


def _decisions(found: Found, layers: Sequence[Part], experts: Sequence[Part], head: Part) -> tuple[str, ...]:
    """Why it is so, in words."""
    candidate, machine = found.candidate, found.candidate.machine
    sizes, w = candidate.sizes, candidate.workload
    where = {"resident": f"on {head.device}", "host": "on the CPU", "disk": "on disk"}
    places = list(_places(layers))
    if experts:
        places.append(f"the experts of {len(experts)} layers on the CPU")
    places.append(f"head {where[head.placement]}")
    out = [
        f"weights as {sizes.label}: {format_size(sizes.packed.total)}, {sizes.bits_per_weight:.2f} bits per weight"
        + (", converted while loading" if sizes.convert else ""),
        "; ".join(places),
        f"context {w.context} x {w.parallel} with {candidate.kv_type} cache: {format_size(candidate.kv_need.sum())}",
        f"steps of at most {candidate.chunk} tokens, up to {candidate.max_num_seqs} sequences that share the cache",
    ]
    if machine.actuals:
        out.append(f"what the process itself takes is corrected by {machine.actuals}")
    if found.offload is not None and found.split.off:
        out.append(
            {
                "host": "what is offloaded is computed where it lies: reading it there beats copying it",
                "stream": "what is offloaded is copied for each step: the link beats the CPU",
                "experts": "experts stay in host memory, of which a token reads few; attention and cache on the GPU",
            }[found.offload.mode]
        )
    gpu = next((part.device for part in layers if part.device != HOST), None)
    if gpu and any(part.placement == "host" for part in layers):
        tokens = crossover_tokens(candidate.rate(HOST), machine.of(gpu).link, sizes.bits_per_weight / 8)
        if tokens > 1:
            out.append(f"steps of more than {tokens} tokens would be faster copied to {gpu} than on the CPU")
    return tuple(out)


def _warnings(candidate: Candidate, devices: Sequence[Device], reserve: int) -> tuple[str, ...]:
    out = []
    assumed = [device.name for device in devices if device.kind == "assumed"]
    if assumed:
        out.append(f"{', '.join(assumed)}: assumed, not measured; speeds are from datasheets")
    if not candidate.machine.measured:
        out.append("the speed of this machine is a guess: run `chandra calibrate`")
    if candidate.sizes.low_quality:
        out.append(f"{candidate.sizes.label} loses quality that shows")
    if reserve:
        out.append(f"{format_size(reserve)} of every device left alone, as asked")
    return tuple(out)

"""The planner: from headers, devices and a workload to a `Plan`. Pure: it reads no weights and allocates nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from chandra.errors import DoesNotFit, UsageError
from chandra.memory.device import Device, format_size
from chandra.memory.plan import Objective, Plan, Workload
from chandra.models.spec import ModelSpec
from chandra.planner.assemble import assemble
from chandra.planner.cost import Machine
from chandra.planner.layout import HOST, Candidate, allowed_layers
from chandra.planner.mixes import LOW_QUALITY
from chandra.planner.placement import Offload, Split, best_split
from chandra.planner.sizes import ModelSizes

CONTEXTS = (8192, 4096, 2048, 1024, 512)  # tried in this order when the user names none
SHORT_CONTEXT = 4096  # below it a better format is not worth the loss
KV_TYPES = ("f16", "q8_0")
CHUNKS = (512, 256, 128, 64, 32)
PARALLEL = (1, 2, 4, 8, 16, 32)
BALANCE = 0.25  # weight of the slowest stage against the sum of stages


@dataclass(frozen=True)
class PlannableModel:
    """A model as the planner sees it. `variants`: the formats the user has or can make, best quality first."""

    name: str
    spec: ModelSpec
    variants: tuple[ModelSizes, ...]


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None is the planner's choice. `layers`: device -> inclusive ranges of layers."""

    context: int | None = None
    parallel: int | None = None
    objective: Objective = "quality"
    kv_type: str | None = None
    format: str | None = None
    chunk: int | None = None
    layers: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    reserve: int = 0  # bytes of every GPU to leave alone
    disk: int | None = None  # bytes of weights that may be read from disk for each step; None: as many as needed
    prompt: int = 512


@dataclass(frozen=True)
class Found:
    """A feasible candidate with its placement. Smaller `score` is better."""

    candidate: Candidate
    split: Split
    mode: str  # how the first layers are offloaded: resident (not at all), host, stream, experts
    disk_layers: int
    head_device: str
    score: tuple[float, ...]


def plan(model: PlannableModel, devices: Sequence[Device], machine: Machine, constraints: Constraints) -> Plan:
    """The best plan. `devices` includes the host, named "cpu".

    Raises UsageError for a constraint that contradicts itself and DoesNotFit, with the smallest change that would fit.
    """
    check(model, devices, constraints)
    found = search(model, devices, machine, constraints)
    if found is None:
        raise DoesNotFit(*_why_not(model, devices, machine, constraints))
    return assemble(model.name, found.candidate, found, devices, constraints.reserve)


def check(model: PlannableModel, devices: Sequence[Device], constraints: Constraints) -> None:
    """Refuse constraints that no plan could keep. Raises UsageError."""
    names = {device.name for device in devices}
    owner: dict[int, str] = {}
    for name, spans in constraints.layers.items():
        if name not in names:
            raise UsageError(f"--layers names {name}, which is not a device", f"devices: {', '.join(sorted(names))}")
        for first, last in spans:
            if not 0 <= first <= last < model.spec.num_layers:
                raise UsageError(f"--layers {name}={first}-{last}: the model has layers 0-{model.spec.num_layers - 1}")
            for index in range(first, last + 1):
                if owner.setdefault(index, name) != name:
                    raise UsageError(f"--layers puts layer {index} on both {owner[index]} and {name}")
    if constraints.context is not None and not 0 < constraints.context <= model.spec.max_position:
        raise UsageError(
            f"a context of {constraints.context} tokens was asked for",
            f"{model.name} was trained for contexts from 1 to {model.spec.max_position}",
        )
    if constraints.format is not None and not any(v.label == constraints.format for v in model.variants):
        raise UsageError(
            f"{model.name} is not to be had as {constraints.format}",
            f"formats: {', '.join(v.label for v in model.variants)}",
        )


def search(
    model: PlannableModel, devices: Sequence[Device], machine: Machine, constraints: Constraints
) -> Found | None:
    """The feasible candidate with the smallest score, or None."""
    best: Found | None = None
    for offloading in (False, True):
        for candidate, rank in _candidates(model, machine, constraints):
            # Within one class of placements the rank comes first: what ranks worse than what was found can't win.
            if best is not None and (*rank[:1], float(offloading), *rank[1:]) >= best.score[:-1]:
                continue
            found = _place(candidate, devices, constraints, offloading)
            if found is None:
                continue
            split, mode, disk_layers, head = found
            score = (*rank[:1], float(offloading), *rank[1:], split.cost)
            if best is None or score < best.score:
                best = Found(candidate, split, mode, disk_layers, head, score)
    return best


def _candidates(
    model: PlannableModel, machine: Machine, c: Constraints
) -> Iterator[tuple[Candidate, tuple[float, ...]]]:
    """Every combination that keeps the constraints, best rank first.

    quality: the best format, then the longer context, then the richer cache; latency: the smallest format that is not
    of low quality; throughput: as latency, with as many sequences as fit.
    """
    longest = model.spec.max_position
    contexts = [c.context] if c.context else sorted({min(longest, n) for n in CONTEXTS}, reverse=True)
    ranked: list[tuple[tuple[float, ...], Candidate]] = []
    variants = [v for v in model.variants if c.format in (None, v.label)]
    for v_rank, sizes in enumerate(variants):
        low = float(sizes.label in LOW_QUALITY and len(variants) > 1)
        preference = float(v_rank) if c.objective == "quality" else sizes.bits_per_weight
        for x_rank, context in enumerate(contexts):
            short = float(context < min(SHORT_CONTEXT, longest) and c.context is None)
            for kv_rank, kv_type in enumerate([c.kv_type] if c.kv_type else KV_TYPES):
                for chunk_rank, chunk in enumerate([c.chunk] if c.chunk else CHUNKS):
                    for parallel in _parallel_choices(c):
                        crowd = -float(parallel) if c.objective == "throughput" else 0.0
                        rank = (low, short, preference, crowd, float(x_rank), float(kv_rank), float(chunk_rank))
                        workload = Workload(context, parallel, c.objective, min(c.prompt, context))
                        seqs = max(parallel, 8)
                        ranked.append((rank, Candidate(model.spec, sizes, workload, kv_type, chunk, seqs, machine)))
    ranked.sort(key=lambda pair: pair[0])
    for rank, candidate in ranked:
        yield candidate, rank


def _parallel_choices(c: Constraints) -> Sequence[int]:
    if c.parallel is not None:
        return (c.parallel,)
    return PARALLEL if c.objective == "throughput" else (1,)


def _place(
    candidate: Candidate, devices: Sequence[Device], c: Constraints, offloading: bool
) -> tuple[Split, str, int, str] | None:
    """The best placement of a candidate: (split, offload mode, layers on disk, device of the head)."""
    host = next(device for device in devices if device.name == HOST)
    gpus = [device for device in devices if device.name != HOST]
    best: tuple[Split, str, int, str] | None = None
    for head in [*(gpu.name for gpu in gpus), HOST]:
        room = _host_room(candidate, host, head)
        if room < 0:
            continue
        tiers = [
            candidate.tier(g, g.name == head, c.reserve, allowed_layers(c.layers, g.name, len(candidate.spec.layers)))
            for g in gpus
        ]
        for mode, disk_layers, offload in _offloads(candidate, gpus, room, c, offloading):
            split = best_split(tiers, offload, candidate.spec.num_layers, BALANCE)
            if split is None:
                continue
            extra = _head_cost(candidate, head)
            split = replace(split, cost=split.cost + extra)
            if best is None or split.cost < best[0].cost:
                best = (split, mode, disk_layers, head)
    return best


def _offloads(
    candidate: Candidate, gpus: Sequence[Device], room: int, c: Constraints, offloading: bool
) -> Iterator[tuple[str, int, Offload | None]]:
    """Ways to hold what does not lie on a GPU: none, then each mode with the fewest layers on disk that fits."""
    count = candidate.spec.num_layers
    allowed = allowed_layers(c.layers, HOST, count)
    if gpus and not offloading:
        yield "resident", 0, None
        return
    if not gpus:
        if not offloading:
            yield "host", 0, candidate.offload("host", None, room, 0, allowed)
        else:
            for disk_layers in range(1, count + 1):
                offload = candidate.offload("host", None, room, disk_layers, allowed)
                if offload.host_need.sum() + offload.fixed_host <= room:
                    yield "host", disk_layers, offload
                    return
        return
    modes = ["host", "stream", *(["experts"] if any(candidate.sizes.experts) else [])]
    for mode in modes:
        for disk_layers in (0, *(n for n in (count // 4, count // 2, count) if n)):
            yield mode, disk_layers, candidate.offload(mode, gpus[0], room, disk_layers, allowed)


def _host_room(candidate: Candidate, host: Device, head: str) -> int:
    """Bytes of the host left for layers: without the process itself, the embedding, and the head if it is there."""
    profile = candidate.machine.host
    sizes = candidate.sizes
    taken = profile.runtime + candidate.workspace(True, head == HOST)
    if head == HOST:
        taken += sizes.embedding + sizes.head
    elif not sizes.tied:
        taken += sizes.embedding
    return host.cap - taken


def _head_cost(candidate: Candidate, head: str) -> float:
    from chandra.planner.layout import ANSWER, head_seconds

    w = candidate.workload
    return ANSWER / w.parallel * head_seconds(candidate, candidate.machine.of(head), w.parallel)


def _why_not(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> tuple[str, str]:
    """The message and the smallest change that would fit."""
    asked = ", ".join(f"{d.name} {format_size(d.cap)}" for d in devices)
    looser = [
        ("--ctx", replace(c, context=None)),
        ("--kv-type", replace(c, kv_type=None)),
        ("--parallel", replace(c, parallel=1)),
        ("--quant", replace(c, format=None)),
        ("--layers", replace(c, layers={})),
        ("--reserve", replace(c, reserve=0)),
    ]
    for option, constraints in looser:
        if constraints != c and (found := search(model, devices, machine, constraints)):
            w = found.candidate
            return (
                f"{model.name} does not fit in {asked} as asked",
                f"without {option} it would: {w.sizes.label}, context {w.workload.context},"
                f" {w.workload.parallel} at once, {w.kv_type} cache",
            )
    target = next(i for i, d in enumerate(devices) if d.name == HOST) if len(devices) == 1 else 0
    cap = devices[target].cap
    for _ in range(48):
        cap = int(cap * 1.1) + (64 << 20)
        larger = [replace(d, cap=cap) if i == target else d for i, d in enumerate(devices)]
        if search(model, larger, machine, c):
            return (
                f"{model.name} does not fit in {asked}",
                f"it would with about {format_size(cap)} on {devices[target].name}",
            )
    return f"{model.name} does not fit in {asked}", "choose a smaller model"

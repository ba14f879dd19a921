"""The planner: from headers, devices and a workload to a `Plan`. Pure: it reads no weights and allocates nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from chandra.errors import UsageError
from chandra.memory.device import Device
from chandra.memory.plan import Objective, Workload
from chandra.planner.candidate import HOP, HOST, Candidate
from chandra.planner.cost import Machine
from chandra.planner.placement import Mode, Offload, Split, Splitter
from chandra.planner.sizes import ModelSizes, PlannableModel

CONTEXTS = (8192, 4096, 2048, 1024, 512)  # tried when the user names none
SHORT_CONTEXT = 4096  # below it a better format is not worth the loss
KV_TYPES = ("f16", "q8_0")
CHUNKS = (512, 128, 32)
PARALLEL = (1, 2, 4, 8, 16, 32)
SEQUENCES = 8  # shorter ones share the cache of `parallel` long ones, up to so many
DISK_STEPS = 16

Spill = int  # 0: everything on the GPUs (or, without any, in host memory); 1: the rest in host memory; 2: and on disk


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None is the planner's choice. `layers`: device -> inclusive ranges of layers, which then
    hold these and no others."""

    context: int | None = None
    parallel: int | None = None
    objective: Objective = "quality"
    kv_type: str | None = None
    format: str | None = None
    chunk: int | None = None
    layers: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    reserve: int = 0  # bytes of every device to leave alone
    disk: int = 0  # bytes of weights that may be read from disk for each step
    prompt: int = 512
    modes: tuple[Mode, ...] = ("host", "stream", "experts")  # ways to offload that may be used


@dataclass(frozen=True, eq=False)
class Found:
    """A feasible candidate with its placement. A smaller `score` is better; its last part is `Split.cost`."""

    candidate: Candidate
    split: Split
    offload: Offload | None
    head: str
    score: tuple[float, ...]


@dataclass(frozen=True)
class _Option:
    """A candidate to be, and where its layers may lie."""

    sizes: ModelSizes
    context: int
    kv_type: str
    chunk: int
    parallel: int
    spill: Spill


def check(model: PlannableModel, devices: Sequence[Device], c: Constraints) -> None:
    """Refuse constraints that no plan could keep. Raises UsageError."""
    names, count = {device.name for device in devices}, model.spec.num_layers
    owner: dict[int, str] = {}
    for name, spans in c.layers.items():
        if name not in names:
            raise UsageError(f"--layers names {name}, which is not a device", f"devices: {', '.join(sorted(names))}")
        for first, last in spans:
            if not 0 <= first <= last < count:
                raise UsageError(f"--layers {name}={first}-{last}: the model has layers 0-{count - 1}")
            for index in range(first, last + 1):
                if owner.setdefault(index, name) != name:
                    raise UsageError(f"--layers puts layer {index} on both {owner[index]} and {name}")
        held = sorted(index for index, device in owner.items() if device == name)
        if held and held[-1] - held[0] >= len(held):
            raise UsageError(f"--layers gives {name} layers with a gap", "a device holds one run of layers")
    if len(owner) < count and names <= c.layers.keys():
        raise UsageError(f"--layers leaves out {count - len(owner)} layers", "name all layers, or fewer devices")
    if c.context is not None and not 0 < c.context <= model.spec.max_position:
        raise UsageError(
            f"a context of {c.context} tokens was asked for",
            f"{model.name} was trained for contexts from 1 to {model.spec.max_position}",
        )
    if c.format is not None and not any(v.label.lower() == c.format.lower() for v in model.variants):
        labels = ", ".join(v.label for v in model.variants)
        raise UsageError(f"{model.name} is not to be had as {c.format}", f"formats: {labels}")
    if c.chunk is not None and c.chunk < (c.parallel or 1):
        raise UsageError(f"steps of {c.chunk} tokens cannot serve {c.parallel} sequences", "raise --chunk")


def search(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> Found | None:
    """The feasible candidate with the smallest score, or None. `devices` includes the host, named "cpu"."""
    groups: dict[tuple[float, ...], list[_Option]] = defaultdict(list)
    for option in _options(model, c, len(devices) > 1):
        groups[_rank(option, model, c)].append(option)
    for rank in sorted(groups):
        best: Found | None = None
        bounded = []
        for option in groups[rank]:
            candidate = _candidate(model, option, machine, c)
            bounded.append((_lower_bound(candidate, devices, option.spill), candidate, option.spill))
        for bound, candidate, spill in sorted(bounded, key=lambda entry: entry[0]):
            if bound >= (best.score[-1] if best else float("inf")):
                break
            for split, offload, head in _placements(candidate, devices, c, spill):
                if best is None or split.cost < best.score[-1]:
                    best = Found(candidate, split, offload, head, (*rank, split.cost))
        if best is not None:
            return best
    return None


def _options(model: PlannableModel, c: Constraints, has_gpus: bool) -> Iterator[_Option]:
    """Every combination that keeps the constraints."""
    longest = model.spec.max_position
    contexts = [c.context] if c.context else sorted({min(longest, n) for n in CONTEXTS}, reverse=True)
    enough = [n for n in contexts if n >= min(SHORT_CONTEXT, longest)]
    parallels = (c.parallel,) if c.parallel else PARALLEL if c.objective == "throughput" else (1,)
    chunks = (c.chunk,) if c.chunk else tuple(n for n in CHUNKS if n >= max(parallels)) or (max(parallels),)
    spills: list[Spill] = [0] if not has_gpus else [0, 1] if c.objective == "quality" else [1]
    for sizes in model.variants:
        if c.format is not None and sizes.label.lower() != c.format.lower():
            continue
        for spill in [*spills, *([2] if c.disk else [])]:
            for context in contexts:
                if (spill or c.objective != "quality") and context in enough[:-1]:
                    continue  # what does not fit, or is to be fast, does not get more context than it needs
                for kv_type in (c.kv_type,) if c.kv_type else KV_TYPES:
                    if kv_type == "q8_0" and any(layer.attention.head_dim % 32 for layer in model.spec.layers):
                        continue
                    for chunk in chunks:
                        for parallel in parallels:
                            yield _Option(sizes, context, kv_type, chunk, parallel, spill)


def _rank(option: _Option, model: PlannableModel, c: Constraints) -> tuple[float, ...]:
    """What comes before speed. For quality: the best format that lies on the GPUs as a whole, then the longer context,
    the richer cache, the larger chunk; what does not fit as a whole is ranked by speed, and so are the other
    objectives. Formats of low quality, short contexts and the disk come last."""
    low = option.sizes.low_quality and len(model.variants) > 1 and c.format is None
    short = option.context < min(SHORT_CONTEXT, model.spec.max_position) and c.context is None
    kind = 8 * (option.spill == 2) + 4 * low + 2 * short
    if c.objective != "quality":
        return (kind, 0, -option.context if short else 0, 0, 0)
    kv_rank = KV_TYPES.index(option.kv_type) if option.kv_type in KV_TYPES else 0
    if option.spill:
        return (kind + 1, 0, -option.context, kv_rank, 0)
    return (kind, model.variants.index(option.sizes), -option.context, kv_rank, -option.chunk)


def _candidate(model: PlannableModel, option: _Option, machine: Machine, c: Constraints) -> Candidate:
    workload = Workload(option.context, option.parallel, c.objective, min(c.prompt, option.context))
    sequences = min(max(option.parallel, SEQUENCES), option.chunk)
    return Candidate(model, option.sizes, workload, option.kv_type, option.chunk, sequences, machine)


def _lower_bound(candidate: Candidate, devices: Sequence[Device], spill: Spill) -> float:
    """A cost that no placement can be below: bytes are poured into the devices, those with the least time per byte
    first. Infinite if they cannot hold them."""
    gpus = [device for device in devices if device.name != HOST]
    places = [device for device in devices if device.name != HOST or spill or not gpus]
    need = np.minimum.reduce([candidate.weights(device.name) for device in places]) + candidate.kv_need
    if spill < 2 and need.sum() > sum(device.cap for device in places):
        return float("inf")
    rates = []
    for device in places:
        seconds = candidate.request_seconds("resident", device.name)
        room = float(device.cap)
        if device.name == HOST and gpus:  # what is offloaded may be streamed, or lie apart
            room = float("inf")
            for gpu in gpus:
                for apart in (False, True) if any(candidate.sizes.packed.experts) else (False,):
                    seconds = np.minimum(seconds, candidate.request_seconds("stream", gpu.name, apart))
        if spill == 2:
            room = float("inf")
        rates.append((float((seconds / need).min()), room))
    left, cost = float(need.sum()), 0.0
    for rate, room in sorted(rates):
        part = min(left, room)
        left, cost = left - part, cost + rate * part
    return cost + min(candidate.head_seconds(device.name) for device in places)


def _placements(
    candidate: Candidate, devices: Sequence[Device], c: Constraints, spill: Spill
) -> Iterator[tuple[Split, Offload | None, str]]:
    """The best placement for each device of the head and each way to offload."""
    host = next(device for device in devices if device.name == HOST)
    gpus = [device for device in devices if device.name != HOST]
    named = [*gpus, *([host] if c.layers or not gpus else [])]
    allowed = {device.name: _allowed(c.layers, device.name, candidate.num_layers) for device in devices}
    for head in [*_distinct(candidate, gpus, allowed), *([host] if spill or not gpus else [])]:
        room = {}
        for device in devices:
            computes = device.name != HOST or spill > 0 or not gpus
            taken = candidate.taken(device, device is head, computes) + c.reserve
            room[device.name] = device.cap - taken - (loading_bytes(candidate, devices) if device is host else 0)
        if room[HOST] < 0:
            continue
        tiers = [candidate.tier(d, d is head, room[d.name], allowed[d.name]) for d in named]
        splitter = Splitter(tiers, candidate.num_layers, head.name, HOP)
        for offload in _offloads(candidate, splitter, c, spill, bool(gpus)):
            split = splitter.best(offload, room[HOST])
            if split is not None:
                cost = split.cost + candidate.head_seconds(head.name)
                yield Split(split.off, split.order, split.counts, cost), offload, head.name


def loading_bytes(candidate: Candidate, devices: Sequence[Device]) -> int:
    """Bytes of the host that loading needs besides the result: a tensor, unless it only maps the file."""
    copies = any(device.kind in ("cuda", "assumed") for device in devices)
    return candidate.sizes.largest if copies or candidate.sizes.convert else 0


def _offloads(
    candidate: Candidate, splitter: Splitter, c: Constraints, spill: Spill, has_gpus: bool
) -> Iterator[Offload | None]:
    """Ways to hold what does not lie on a device. The user's own ranges leave nothing to offload."""
    if spill < 2:
        yield None
    if not spill or c.layers:
        return
    modes: list[tuple[Mode, str | None]] = []
    for mode in c.modes if has_gpus else ("host",):
        if mode != "experts" or any(candidate.sizes.packed.experts):
            modes += [(mode, name) for name in splitter.firsts()] if mode != "host" or not has_gpus else [(mode, None)]
    steps: list[int] = [0]
    if spill == 2:
        count = candidate.num_layers
        steps = sorted({-(-count * step // DISK_STEPS) for step in range(1, DISK_STEPS + 1)})
        sums = np.cumsum(candidate.weights("disk"))
        steps = [n for n in steps if sums[n - 1] <= c.disk]
    for mode, name in modes:
        for disk_layers in steps:
            yield candidate.offload(mode, name, disk_layers)


def _distinct(candidate: Candidate, gpus: Sequence[Device], allowed: Mapping[str, Sequence[bool]]) -> list[Device]:
    """Devices that differ in more than names; of equal ones the last, where the last layers will lie."""
    return list({(d.cap, d.kind, candidate.machine.of(d.name), tuple(allowed[d.name])): d for d in gpus}.values())


def _allowed(ranges: Mapping[str, Sequence[tuple[int, int]]], device: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers may lie on a device: those the user gave it, or else those the user gave no one."""
    given = {i: name for name, spans in ranges.items() for first, last in spans for i in range(first, last + 1)}
    return tuple(given.get(i, None if device in ranges else device) == device for i in range(num_layers))

"""The planner: from headers, devices and a workload to a `Plan`. Pure: it reads no weights and allocates nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from chandra.errors import UsageError
from chandra.memory.device import Device
from chandra.memory.plan import Objective, Workload
from chandra.models.spec import ModelSpec
from chandra.planner.candidate import HOP, HOST, Candidate, Spill
from chandra.planner.cost import Machine
from chandra.planner.kernels import PIECE, packing
from chandra.planner.placement import BALANCE, Floats, Mode, Offload, Place, Split, Splitter, least_cost, stage_bounds
from chandra.planner.sizes import PlannableModel

CONTEXTS = (8192, 4096, 2048, 1024, 512)  # tried when the user names none
SHORT_CONTEXT = 4096  # below it a better format is not worth the loss
KV_TYPES = ("f16", "q8_0")
CHUNKS = (512, 128, 32)
PARALLEL = (1, 2, 4, 8, 16, 32)
SEQUENCES = 8  # shorter ones share the cache of `parallel` long ones, up to so many
DISK_STEPS = 16
_INF = float("inf")


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
    swap: int | None = None  # bytes of the host for blocks of preempted sequences
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

    @property
    def whole(self) -> bool:
        """Whether nothing is offloaded."""
        return self.score[0] % 2 == 0 and not self.split.off


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
    gaps = sum(index not in owner and (index == 0 or index - 1 in owner) for index in range(count))
    if gaps > len(names - c.layers.keys()):
        raise UsageError(
            f"--layers leaves {gaps} runs of layers to {len(names - c.layers.keys())} devices",
            "a device holds one run of layers: name all of them, or fewer devices",
        )
    if c.context is not None and not 0 < c.context <= model.spec.max_position:
        raise UsageError(
            f"a context of {c.context} tokens was asked for",
            f"{model.name} was trained for contexts from 1 to {model.spec.max_position}",
        )
    if c.format is not None and not any(v.label.lower() == c.format.lower() for v in model.variants):
        labels = ", ".join(v.label for v in model.variants)
        raise UsageError(f"{model.name} is not to be had as {c.format}", f"formats: {labels}")
    wanted = [v for v in model.variants if c.format is None or v.label.lower() == c.format.lower()]
    if c.disk and not any(v.on_disk for v in wanted):
        raise UsageError(
            f"--disk: {model.name} cannot be computed from its file, where weights lie in pieces or in another format",
            "leave --disk out, or take the model as a GGUF file in the format you want",
        )
    if c.chunk is not None and c.chunk < (c.parallel or 1):
        raise UsageError(f"steps of {c.chunk} tokens cannot serve {c.parallel} sequences", "raise --chunk")


def search(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> Found | None:
    """The feasible candidate with the smallest score, or None. `devices` includes the host, named "cpu"."""
    groups: dict[tuple[float, ...], list[Candidate]] = defaultdict(list)
    for candidate in _candidates(model, machine, c, len(devices) > 1):
        groups[_rank(candidate, c)].append(candidate)
    allowed = {device.name: _allowed(c.layers, device.name, model.spec.num_layers) for device in devices}
    for rank in sorted(groups):
        sites = [site for candidate in groups[rank] for site in _sites(candidate, devices, c, allowed)]
        best: Found | None = None
        for site in sorted(sites, key=lambda site: site.floor):
            least = best.score[-1] if best else float("inf")
            if site.floor >= least:
                break
            splitter = site.splitter(least)
            for offload in site.offloads(c, splitter):
                split = splitter.best(offload, site.room[HOST], c.disk - site.outer, least - site.head_seconds)
                if split is not None:
                    least = split.cost + site.head_seconds
                    best = Found(site.candidate, split, offload, site.head.name, (*rank, least))
        if best is not None:
            return best
    return None


def _candidates(model: PlannableModel, machine: Machine, c: Constraints, has_gpus: bool) -> Iterator[Candidate]:
    """Every combination that keeps the constraints."""
    longest = model.spec.max_position
    contexts = [c.context] if c.context else sorted({min(longest, n) for n in CONTEXTS}, reverse=True)
    enough = [n for n in contexts if n >= min(SHORT_CONTEXT, longest)]
    parallels = (c.parallel,) if c.parallel else PARALLEL if c.objective == "throughput" else (1,)
    chunks = (c.chunk,) if c.chunk else tuple(n for n in CHUNKS if n >= min(parallels)) or parallels
    kv_types = (c.kv_type,) if c.kv_type else KV_TYPES
    spills: list[Spill] = [0] if not has_gpus else [0, 1] if c.objective == "quality" else [1]
    for sizes in model.variants:
        if c.format is not None and sizes.label.lower() != c.format.lower():
            continue
        for spill in [*spills, *([2, 3] if c.disk and sizes.on_disk else [])]:
            for context, kv_type, chunk, parallel in product(contexts, kv_types, chunks, parallels):
                if (spill or c.objective != "quality") and context in enough[:-1]:
                    continue  # what does not fit, or is to be fast, does not get more context than it needs
                if packs(kv_type, model.spec) and parallel <= chunk:
                    w = Workload(context, parallel, c.objective, min(c.prompt, context))
                    sequences = min(max(parallel, SEQUENCES), chunk)
                    yield Candidate(model, sizes, w, kv_type, chunk, sequences, machine, c.swap, spill)


def packs(kv_type: str, spec: ModelSpec) -> bool:
    """Whether the cache can be of a type that the planner chooses."""
    return kv_type != "q8_0" or not any(layer.attention.head_dim % 32 for layer in spec.layers)


def _rank(candidate: Candidate, c: Constraints) -> tuple[float, ...]:
    """What comes before speed. For quality: the best format that lies on the GPUs as a whole, then the longer context,
    the richer cache, the larger chunk; what does not fit as a whole is ranked by speed, and so are the other
    objectives. Formats of low quality, short contexts and the disk come last."""
    variants, spill, context = candidate.model.variants, candidate.spill, candidate.workload.context
    low = candidate.sizes.low_quality and len(variants) > 1 and c.format is None
    short = context < min(SHORT_CONTEXT, candidate.model.spec.max_position) and c.context is None
    kind = 8 * max(0, spill - 1) + 4 * low + 2 * short
    if c.objective != "quality":
        return (kind, 0, -context if short else 0, 0, 0)
    kv_rank = KV_TYPES.index(candidate.kv_type) if candidate.kv_type in KV_TYPES else 0
    if spill:
        return (kind + 1, 0, -context, kv_rank, 0)
    return (kind, variants.index(candidate.sizes), -context, kv_rank, -candidate.chunk)


@dataclass(frozen=True, eq=False)
class _Site:
    """A candidate with the device of its head: where its layers may lie."""

    candidate: Candidate
    devices: Sequence[Device]
    head: Device
    room: Mapping[str, float]  # bytes of each device for layers and their cache
    allowed: Mapping[str, Sequence[bool]]
    hosted: bool  # runs of layers may lie on the host as on any device

    @cached_property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.name != HOST]

    @property
    def outer(self) -> int:
        """Bytes outside the layers that are read from disk."""
        pieces = self.candidate.sizes.packed
        return pieces.embedding + pieces.head if self.candidate.outer_on_disk else 0

    @cached_property
    def head_seconds(self) -> float:
        return self.candidate.head_seconds(self.head.name)

    @cached_property
    def floors(self) -> tuple[Floats, Floats]:
        """Bounds on the slowest stage, and for each of them a cost that no placement can be below."""
        candidate, stages = self.candidate, []
        places: list[Place] = []
        for device in self.devices:
            rate, room = candidate.least_rate(device.name, self.gpus), self.room[device.name]
            fixed = self.head_seconds if device is self.head else 0.0
            if device.name != HOST or self.hosted:
                stages.append((candidate.layer_seconds(device.name), fixed))
            if device.name == HOST and self.candidate.spill:
                places.append((rate, _INF, -_INF))
            elif device.name != HOST or self.hosted:
                places.append((rate, room, fixed))
        bounds, total = stage_bounds(stages), float(candidate.least_need.sum())
        cost = least_cost(total, places, bounds)
        if self.candidate.spill and self.gpus:
            cost = np.minimum(cost, self._streamed_floor(total, [p for p in places if p[1] < _INF], bounds))
        return bounds, cost + self.head_seconds

    def _streamed_floor(self, total: float, places: list[Place], bounds: Floats) -> Floats:
        """The same where a device streams layers: it computes any number of them, and what has no room on GPUs comes
        over its link."""
        floors = []
        for first in set(places):
            (rate, *_), others = first, places.copy()
            others.remove(first)
            slowest = rate * (1 + BALANCE), _INF, -_INF  # beyond the bound, which it raises
            floors.append(least_cost(total, [*others, (rate, _INF, 0.0), slowest], bounds))
        link = min(self.candidate.bringing("stream", gpu.name)[1] for gpu in self.gpus) * sum(self.candidate.steps)
        excess = max(0.0, total - sum(room for _, room, _ in places))
        return np.maximum(np.minimum.reduce(floors), least_cost(excess, [(link, _INF, -_INF)], bounds))

    @cached_property
    def floor(self) -> float:
        return float(self.floors[1].min())

    def splitter(self, below: float) -> Splitter:
        """Of the placements that may cost less than `below`."""
        bounds, floors = self.floors
        named = [device for device in self.devices if device.name != HOST or self.hosted]
        tiers = [self.candidate.tier(d, d is self.head, self.room[d.name], self.allowed[d.name]) for d in named]
        return Splitter(tiers, bounds[floors < below], self.candidate.num_layers, self.head.name, HOP)

    def offloads(self, c: Constraints, splitter: Splitter) -> Iterator[Offload | None]:
        """Ways to hold what does not lie on a device. The user's own ranges leave nothing to offload."""
        candidate, count = self.candidate, self.candidate.num_layers
        if self.candidate.spill < 2 or 0 < self.outer <= c.disk:
            yield None
        if not self.candidate.spill or c.layers:
            return
        if not self.gpus:
            yield candidate.offload("host", HOST, count)
            return
        steps = range(3 - candidate.spill, DISK_STEPS + 1) if candidate.spill > 1 else (0,)
        for n in sorted({-(-count * step // DISK_STEPS) for step in steps}):
            if "host" in c.modes:
                yield candidate.offload("host", None, n)
            for name in splitter.firsts():
                if "stream" in c.modes:
                    yield candidate.offload("stream", name, n)
                if "experts" in c.modes and candidate.sizes.packed.experts.any():
                    yield candidate.offload("experts", name, n)


def _sites(
    candidate: Candidate, devices: Sequence[Device], c: Constraints, allowed: Mapping[str, Sequence[bool]]
) -> Iterator[_Site]:
    """The candidate with each device that may have the head; of devices that differ in nothing but their names the last
    one, where the last layers will lie."""
    alone, spill, machine = len(devices) == 1, candidate.spill, candidate.machine
    if spill < 2 and candidate.least_need.sum() > sum(device.cap for device in devices):
        return
    steps = candidate.host_workspace(device.name for device in devices)
    heads = {
        (d.cap, d.kind, machine.of(d.name), allowed[d.name]): d
        for d in devices
        if ((spill or alone) if d.name == HOST else spill < 3)
    }
    hosted = alone or HOST in c.layers or bool(spill and c.layers)
    for head in heads.values():
        room = {}
        for device in devices:
            computes = device.name != HOST or spill > 0 or hosted
            taken = candidate.taken(device.name, device is head, computes) + c.reserve
            room[device.name] = float(device.cap - taken)
        room[HOST] -= steps + (PIECE if spill or hosted else 0) + packing(device.name for device in devices)
        room[HOST] -= _loading(candidate, devices, spill >= 2, steps) + (c.swap or 0)
        if min(room[HOST], room[head.name]) >= 0:
            yield _Site(candidate, devices, head, room, allowed, hosted)


def _loading(candidate: Candidate, devices: Sequence[Device], disk: bool, steps: int) -> int:
    """Bytes of the host that loading may need beyond those of all that will be there. Without other devices it has what
    the cache and the workspace (`steps`: beside the decoder's) will take."""
    sizes = candidate.sizes
    passing = sizes.passing_layers if candidate.outer_on_disk else sizes.passing
    if len(devices) > 1:
        return passing
    needed = passing if disk else sizes.loading_whole
    return max(0, needed - int(candidate.kv_need.sum()) - candidate.workspace(HOST, True) - steps)


def _allowed(ranges: Mapping[str, Sequence[tuple[int, int]]], device: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers may lie on a device: those the user gave it, or else those the user gave no one."""
    given = {i: name for name, spans in ranges.items() for first, last in spans for i in range(first, last + 1)}
    return tuple(given.get(i, None if device in ranges else device) == device for i in range(num_layers))

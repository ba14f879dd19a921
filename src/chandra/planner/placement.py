"""Where the layers go: an exact search over contiguous runs of layers on devices.

The first `off` layers may be offloaded (computed by the CPU, streamed, or with their experts on the CPU); the rest lie
in contiguous runs, one for each device, in any order of the devices. For every `off` and every bound on the slowest
stage, a dynamic program over sets of devices finds the least summed time; the best `sum + BALANCE * bound` wins. The
bounds depend on times alone, so a larger device only adds splits to choose from: more memory never makes the result
worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ends = np.ndarray[Any, np.dtype[np.intp]]
State = tuple[int, ...]  # how many devices of each class are left
Run = tuple[float, int, int, State]  # time from its start to the end of the model, class, end, devices left
Mode = Literal["host", "stream", "experts"]

STAGE_BOUNDS = 24  # how finely the time of the slowest stage is searched
_STEPS = np.linspace(0, 1, STAGE_BOUNDS) ** 2
BALANCE = 0.25  # weight of the slowest stage against the sum of stages


@dataclass(frozen=True, eq=False)
class Tier:
    """A device that layers can lie on. `room`: bytes for layers, everything else already taken off; `seconds[i]` and
    `need[i]`: time and bytes of layer i there; `fixed`: seconds it is busy besides (the head)."""

    name: str
    room: float
    seconds: Floats
    need: Floats
    fixed: float = 0.0


@dataclass(frozen=True, eq=False)
class Offload:
    """What it costs to offload layer i: its time, its bytes on the device that computes or caches for it, and on the
    host. The `fixed_` bytes are taken once if any layer is offloaded (staging buffers).

    `first` is that device, which then takes the first run of the rest; None: the CPU does it all.
    """

    mode: Mode
    first: str | None
    disk_layers: int
    seconds: Floats
    first_need: Floats
    host_need: Floats
    fixed_first: float
    fixed_host: float


@dataclass(frozen=True)
class Split:
    """The first `off` layers are offloaded; then `counts[d]` layers lie on `order[d]`. `cost` is what was minimized."""

    off: int
    order: tuple[str, ...]
    counts: tuple[int, ...]
    cost: float


class Splitter:
    """All splits of a model's layers over some devices. `bounds`: on the slowest stage. `last`: the device that should
    come last (it has the head), or `hop` seconds are lost."""

    def __init__(self, tiers: Sequence[Tier], bounds: Floats, num_layers: int, last: str, hop: float) -> None:
        self.bounds, self.num_layers, self.last, self.hop = bounds, num_layers, last, hop
        self.classes = _classes(tiers, last)
        self._rest: dict[State, Floats] = {}
        self._limits: dict[str, tuple[Floats, Ends]] = {}

    def best(self, offload: Offload | None = None, host_room: float = 0.0, below: float = float("inf")) -> Split | None:
        """The cheapest feasible split: nothing offloaded, or any number of layers as `offload` says. None if there is
        none that costs less than `below`."""
        everything = tuple(len(tiers) for tiers in self.classes)
        if offload is None:
            score = self._cost_from(everything)[:, :1] + BALANCE * self.bounds[:, None]
            return self._trace(score, everything, None, below)
        seconds, on_host = _sums(offload.seconds, 0.0), _sums(offload.host_need, offload.fixed_host)
        rest = self._cost_from(everything)
        if offload.first is not None:
            index, left = self._choice_of(offload.first, everything)
            tier, on_first = self.classes[index][0], _sums(offload.first_need, offload.fixed_first)
            idle = np.where(on_first <= tier.room, self._cost_from(left), np.inf)  # it only works for the others
            rest = np.minimum(idle, self._run(tier, tier.room - on_first, self._cost_from(left)))
        total = rest + np.where(on_host <= host_room, seconds, np.inf)
        return self._trace(total + BALANCE * np.maximum(self.bounds[:, None], seconds), everything, offload, below)

    def firsts(self) -> list[str]:
        """One device of each class."""
        return [tiers[0].name for tiers in self.classes]

    def _choice_of(self, name: str, state: State) -> tuple[int, State]:
        index = self.firsts().index(name)
        return index, (*state[:index], state[index] - 1, *state[index + 1 :])

    def _choices(self, state: State) -> Iterator[tuple[int, State]]:
        """Each class of which a device is left, and the state once it is taken."""
        for index, count in enumerate(state):
            if count:
                yield index, (*state[:index], count - 1, *state[index + 1 :])

    def _cost_from(self, state: State) -> Floats:
        """[bound, i]: least time of layers i.. on the devices of `state`, no stage above the bound."""
        if state not in self._rest:
            cost = np.full((len(self.bounds), self.num_layers + 1), np.inf)
            cost[:, self.num_layers] = 0.0
            for index, left in self._choices(state):
                tier = self.classes[index][0]
                np.minimum(cost, self._run(tier, tier.room, self._cost_from(left)), out=cost)
            self._rest[state] = cost
        return self._rest[state]

    def _run(self, tier: Tier, room: float | Floats, after: Floats) -> Floats:
        """[bound, i]: least time when a run of at least one layer starts at i on `tier` and `after` follows."""
        n = self.num_layers
        time, ends = self._ends(tier, room)
        goal = time + after
        goal[:, n] = time[n] + self._end_cost(tier)
        # The least of goal[i + 1 .. end] by a sparse table: level k holds the least of 2^k values from each place on.
        levels = [goal]
        for k in range(n.bit_length() - 1):
            shifted = np.full_like(goal, np.inf)
            step = 1 << k
            shifted[:, : n + 1 - step] = levels[-1][:, step:]
            levels.append(np.minimum(levels[-1], shifted))
        table = np.stack(levels)
        length = ends - np.arange(n + 1)
        level = np.frexp(np.maximum(length, 1))[1] - 1
        bound, first = np.arange(len(self.bounds))[:, None], np.minimum(np.arange(n + 1) + 1, n)
        least = np.minimum(table[level, bound, first], table[level, bound, np.maximum(ends + 1 - (1 << level), 0)])
        return np.where(length > 0, least - time, np.inf)

    def _ends(self, tier: Tier, room: float | Floats) -> tuple[Floats, Ends]:
        """Summed times, and [bound, i]: where a run that starts at i must end at the latest."""
        if tier.name not in self._limits:
            time = _sums(tier.seconds, 0.0)
            in_time = np.searchsorted(time, (time + (self.bounds[:, None] - tier.fixed)).ravel(), side="right") - 1
            self._limits[tier.name] = time, in_time.reshape(len(self.bounds), -1)
        time, in_time = self._limits[tier.name]
        need = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(tier.need), tier.need, 0.0))])
        barred = np.append(np.flatnonzero(~np.isfinite(tier.need)), self.num_layers)
        ends = np.searchsorted(need, need + room, side="right") - 1
        ends = np.minimum(ends, barred[np.searchsorted(barred, np.arange(self.num_layers + 1))])
        return time, np.minimum(ends, in_time)

    def _trace(self, score: Floats, state: State, offload: Offload | None, below: float) -> Split | None:
        """Follow the choices that made the best score."""
        bound, off = (int(x) for x in np.unravel_index(int(np.argmin(score)), score.shape))
        if not score[bound, off] < below:
            return None
        order: list[str] = []
        counts: list[int] = []
        start, used = off, [0] * len(self.classes)
        runs = self._first_runs(state, bound, off, offload) if offload and offload.first else None
        while start < self.num_layers or runs is not None:
            _, index, end, state = min(runs or self._runs(state, bound, start))
            order.append(self.classes[index][used[index]].name)
            counts.append(end - start)
            used[index] += 1
            start, runs = end, None
        return Split(off, tuple(order), tuple(counts), float(score[bound, off]))

    def _runs(self, state: State, bound: int, start: int) -> Iterator[Run]:
        """Every run that can start at a layer."""
        for index, left in self._choices(state):
            yield from self._runs_on(index, left, self.classes[index][0].room, bound, start)

    def _first_runs(self, state: State, bound: int, start: int, offload: Offload) -> list[Run]:
        """The runs of the device that works for the offloaded layers; an empty one, too."""
        assert offload.first is not None
        index, left = self._choice_of(offload.first, state)
        room = self.classes[index][0].room - _sums(offload.first_need, offload.fixed_first)[start]
        idle = [(float(self._cost_from(left)[bound, start]), index, start, left)] if room >= 0 else []
        return [*idle, *self._runs_on(index, left, room, bound, start)]

    def _runs_on(self, index: int, left: State, room: float, bound: int, start: int) -> Iterator[Run]:
        tier, after = self.classes[index][0], self._cost_from(left)
        time, ends = self._ends(tier, room)
        for end in range(start + 1, int(ends[bound, start]) + 1):
            rest = after[bound, end] if end < self.num_layers else self._end_cost(tier)
            yield float(time[end] - time[start] + rest), index, end, left

    def _end_cost(self, tier: Tier) -> float:
        return 0.0 if tier.name == self.last else self.hop


def _sums(values: Floats, fixed: float) -> Floats:
    """[i]: the first i values, and `fixed` if i > 0."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    sums[1:] += fixed
    return sums


def _classes(tiers: Sequence[Tier], last: str) -> list[list[Tier]]:
    """Devices grouped so that those of a group differ in nothing but their names."""
    groups: dict[tuple[Any, ...], list[Tier]] = {}
    for tier in tiers:
        key = (tier.name == last, tier.room, tier.fixed, tier.seconds.tobytes(), tier.need.tobytes())
        groups.setdefault(key, []).append(tier)
    return list(groups.values())


def stage_bounds(stages: Sequence[tuple[float, float]]) -> Floats:
    """Bounds on the slowest stage worth trying, closer together where balance is near. `stages`: for each device the
    seconds of all layers there, and those that it is busy besides."""
    most = max((total + fixed for total, fixed in stages), default=0.0) * 1.000001
    if len(stages) < 2:
        return np.array([most])
    ideal = 1.000001 / sum(1 / max(total, 1e-12) for total, _ in stages)
    return ideal + (most - ideal) * _STEPS


def least_cost(total: float, places: Iterable[tuple[float, float, float]], bounds: Floats) -> Floats:
    """A cost, for each bound on the slowest stage, that no placement of `total` bytes is below: they are poured into
    the places, which are (least seconds per byte, room, seconds that it is busy besides or -inf if no bound holds
    there), the fastest first. Infinite if they cannot hold them."""
    left, cost = np.full(len(bounds), total), BALANCE * bounds
    for rate, room, fixed in sorted(places):
        part = np.minimum(left, np.maximum(0.0, np.minimum(room, (bounds - fixed) / rate)))
        left, cost = left - part, cost + rate * part
    return np.where(left > 1e-9 * total, np.inf, (1 - 1e-9) * cost)

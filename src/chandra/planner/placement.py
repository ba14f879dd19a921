"""Where the layers go: an exact search over contiguous runs of layers on devices.

`off` layers may be offloaded: the first ones, which the CPU computes as a whole or but for their experts; or as many of
the first run, evenly spread through it, which are brought to its device for each step. The rest lie in contiguous runs,
one for each device, in any order of the devices. For every `off` and every bound on the slowest
stage, a dynamic program over sets of devices finds the least summed time; the best `sum + BALANCE * bound` wins. The
bounds depend on times alone, so a larger device only adds splits to choose from: more memory never makes the result
worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from chandra.memory.plan import spread

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ends = np.ndarray[Any, np.dtype[np.intp]]
State = tuple[int, ...]  # how many devices of each class are left
Run = tuple[float, int, int, State]  # time from its start to the end of the model, class, end, devices left
Place = tuple[float, float, float]  # of `least_cost`
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
    """What it costs to offload `off` layers: their time, and bytes on the device that computes or caches for them, on
    the host and on disk.

    `first` is that device, which then takes the first run of the rest: all arrays are over `[off, end of the run]` and
    count that run in. None: the CPU does it all, and they are over `[off]`. `disk_layers`: at most so many are on disk,
    evenly spread among them.
    """

    mode: Mode
    first: str | None
    disk_layers: int
    seconds: Floats
    first_need: Floats
    host_need: Floats
    disk_need: Floats

    def moved(self, off: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers that are offloaded, and those of them that are on disk, if the first run ends at `end`."""
        layers = spread(off, end) if self.first and self.mode != "experts" else tuple(range(off))
        return layers, tuple(layers[i] for i in spread(min(off, self.disk_layers), off))


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

    def best(
        self, offload: Offload | None = None, host_room: float = 0.0, disk: float = 0.0, below: float = float("inf")
    ) -> Split | None:
        """The cheapest feasible split: nothing offloaded, or any number of layers as `offload` says. None if there is
        none that costs less than `below`."""
        everything = tuple(len(tiers) for tiers in self.classes)
        if offload is None:
            score = self._cost_from(everything)[:, :1] + BALANCE * self.bounds[:, None]
            return self._trace(score, everything, None, below)
        fits = (offload.host_need <= host_room) & (offload.disk_need <= disk)
        if offload.first is None:
            seconds = np.where(fits, offload.seconds, np.inf)
            score = self._cost_from(everything) + seconds + BALANCE * np.maximum(self.bounds[:, None], seconds)
            return self._trace(score, everything, None, below)
        index, left = self._choice_of(offload.first, everything)
        tier, after, end = self.classes[index][0], self._cost_from(left).copy(), np.arange(self.num_layers + 1)
        after[:, -1] = self._end_cost(tier)
        fits = fits & (offload.first_need <= tier.room) & (end[:, None] <= end)
        seconds = np.where(fits, offload.seconds, np.inf)
        rows = np.flatnonzero((seconds + after.min(axis=0) + BALANCE * self.bounds.min() < below).any(axis=1))
        if not rows.size:
            return None
        cost = seconds[rows] + after[:, None] + BALANCE * np.maximum(self.bounds[:, None, None], seconds[rows])
        in_time = self._ends(tier, np.inf)[1][:, rows, None] >= end  # of the layers that stay there
        score = np.full((len(self.bounds), *seconds.shape), np.inf)
        score[:, rows] = np.where(in_time, cost, np.inf)
        return self._trace(score, left, tier, below)

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

    def _run(self, tier: Tier, room: float, after: Floats) -> Floats:
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

    def _ends(self, tier: Tier, room: float) -> tuple[Floats, Ends]:
        """Summed times, and [bound, i]: where a run that starts at i must end at the latest."""
        if tier.name not in self._limits:
            time = sums(tier.seconds)
            in_time = np.searchsorted(time, (time + (self.bounds[:, None] - tier.fixed)).ravel(), side="right") - 1
            self._limits[tier.name] = time, in_time.reshape(len(self.bounds), -1)
        time, in_time = self._limits[tier.name]
        need = sums(np.where(np.isfinite(tier.need), tier.need, 0.0))
        barred = np.append(np.flatnonzero(~np.isfinite(tier.need)), self.num_layers)
        ends = np.searchsorted(need, need + room, side="right") - 1
        ends = np.minimum(ends, barred[np.searchsorted(barred, np.arange(self.num_layers + 1))])
        return time, np.minimum(ends, in_time)

    def _trace(self, score: Floats, state: State, first: Tier | None, below: float) -> Split | None:
        """Follow the choices that made the best score, which is over bounds, `off` and the end of a run on `first`."""
        best = int(np.argmin(score))
        bound, off, *ends = (int(x) for x in np.unravel_index(best, score.shape))
        if not score.flat[best] < below:
            return None
        start, order = ends[0] if ends else off, [first.name] if first else []
        counts = [start - off] if first else []
        used = [int(tiers[0] is first) for tiers in self.classes]
        while start < self.num_layers:
            _, index, end, state = min(self._runs(state, bound, start))
            order.append(self.classes[index][used[index]].name)
            counts.append(end - start)
            used[index] += 1
            start = end
        return Split(off, tuple(order), tuple(counts), float(score.flat[best]))

    def _runs(self, state: State, bound: int, start: int) -> Iterator[Run]:
        """Every run that can start at a layer."""
        for index, left in self._choices(state):
            tier, after = self.classes[index][0], self._cost_from(left)
            time, ends = self._ends(tier, tier.room)
            for end in range(start + 1, int(ends[bound, start]) + 1):
                rest = after[bound, end] if end < self.num_layers else self._end_cost(tier)
                yield float(time[end] - time[start] + rest), index, end, left

    def _end_cost(self, tier: Tier) -> float:
        return 0.0 if tier.name == self.last else self.hop


def sums(values: Floats) -> Floats:
    """[i]: the first i values together."""
    return np.concatenate([[0.0], np.cumsum(values)])


@lru_cache(maxsize=2)
def _spread_places(among: int) -> Ends:
    """[count, n, k]: the k-th of `count` layers spread through n of them; `among` where there is none."""
    count, n, k = np.ogrid[: among + 1, : among + 1, : among + 1]
    gaps = np.maximum(count - 1, 1)
    return np.where((k < count) & (count <= n), (2 * k * (n - 1) + gaps) // (2 * gaps), among).astype(np.int16)


def spread_sums(values: Floats) -> Floats:
    """[off, end]: the values of `off` layers spread through the first `end`, together."""
    found: Floats = np.append(values, 0.0)[_spread_places(len(values))].sum(axis=2)
    return found


def disk_sums(values: Floats, disk_layers: int, in_run: bool) -> Floats:
    """[off, end]: the values of those `disk_layers` of `off` layers that are on disk, together; the `off` layers are
    spread through the first `end` if they are `in_run`, or else they are the first ones: `[off]`."""
    places, off = _spread_places(len(values)), np.arange(len(values) + 1)
    chosen = places[np.minimum(disk_layers, off), off, : max(disk_layers, 1)]
    if in_run:
        chosen = places[off[:, None, None], off[:, None], chosen[:, None]]
    found: Floats = np.append(values, 0.0)[chosen].sum(axis=-1)
    return found


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


def least_cost(total: float, places: Iterable[Place], bounds: Floats) -> Floats:
    """A cost, for each bound on the slowest stage, that no placement of `total` bytes is below: they are poured into
    the places, which are (least seconds per byte, room, seconds that it is busy besides or -inf if no bound holds
    there), the fastest first. Infinite if they cannot hold them."""
    left, cost = np.full(len(bounds), total), BALANCE * bounds
    for rate, room, fixed in sorted(places):
        part = np.minimum(left, np.maximum(0.0, np.minimum(room, (bounds - fixed) / rate)))
        left, cost = left - part, cost + rate * part
    return np.where(left > 1e-9 * total, np.inf, (1 - 1e-9) * cost)

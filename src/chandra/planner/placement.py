"""Where the layers go: an exact search over contiguous runs of layers on devices.

The first `off` layers may be offloaded (computed by the CPU, streamed, or with their experts on the CPU); the rest lie
on the GPUs in contiguous runs. For every order of the GPUs, every `off` and every bound on the slowest stage, a dynamic
program finds the split with the least summed time; the best of `sum + balance * slowest stage` wins. Enlarging a
device only adds splits to choose from, so more memory never makes the result worse.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
STAGE_BOUNDS = 24  # how finely the time of the slowest stage is searched


@dataclass(frozen=True)
class Tier:
    """A GPU that layers can lie on. `room`: bytes for layers, everything else already taken off; `seconds[i]` and
    `need[i]`: time and bytes of layer i there."""

    name: str
    room: int
    seconds: Floats
    need: Floats


@dataclass(frozen=True)
class Offload:
    """What it costs to offload layer i: bytes on the first GPU and on the host, and time. `fixed_gpu` and `fixed_host`
    are taken once if any layer is offloaded (staging buffers, the host's share of a step)."""

    mode: str
    seconds: Floats
    gpu_need: Floats
    host_need: Floats
    host_room: int
    fixed_gpu: int = 0
    fixed_host: int = 0


@dataclass(frozen=True)
class Split:
    """The first `off` layers are offloaded; then `counts[d]` layers lie on `order[d]`. `cost` is what was minimized."""

    off: int
    order: tuple[str, ...]
    counts: tuple[int, ...]
    cost: float


def best_split(tiers: Sequence[Tier], offload: Offload | None, num_layers: int, balance: float) -> Split | None:
    """The cheapest feasible split, or None. With no tiers, all layers are offloaded."""
    best: Split | None = None
    for order in _orders(tiers):
        found = _split_in_order(order, offload, num_layers, balance)
        if found is not None and (best is None or found.cost < best.cost):
            best = found
    return best


def _orders(tiers: Sequence[Tier]) -> list[tuple[Tier, ...]]:
    """Orders of the devices that differ in more than names."""
    seen: dict[tuple[Any, ...], tuple[Tier, ...]] = {}
    for order in itertools.permutations(tiers):
        key = tuple((tier.room, float(tier.seconds.sum())) for tier in order)
        seen.setdefault(key, order)
    return list(seen.values())


def _split_in_order(order: tuple[Tier, ...], offload: Offload | None, num_layers: int, balance: float) -> Split | None:
    seconds_off, feasible_off = _offload_prefix(offload, num_layers)
    if not order:
        feasible = offload is not None and feasible_off[num_layers]
        return Split(num_layers, (), (), float(seconds_off[num_layers])) if feasible else None
    bounds = _stage_bounds(order, num_layers)
    # cost_from[t, i]: least time of layers i.. on the devices after the current one, no stage above bounds[t]
    cost_from = np.full((len(bounds), num_layers + 1), np.inf)
    cost_from[:, num_layers] = 0.0
    choices: list[np.ndarray[Any, np.dtype[np.intp]]] = []
    for tier in reversed(order[1:]):
        cost_from, ends = _runs(tier, tier.room, cost_from, bounds, num_layers)
        choices.insert(0, ends)
    first = order[0]
    taken = _first_gpu_taken(offload, num_layers)
    cost_first, ends_first = _runs(first, first.room - taken, cost_from, bounds, num_layers)
    choices.insert(0, ends_first)
    total = cost_first + np.where(feasible_off, seconds_off, np.inf)[None, :]
    score = total + balance * bounds[:, None]
    t, off = np.unravel_index(int(np.argmin(score)), score.shape)
    if not np.isfinite(score[t, off]):
        return None
    counts, start = [], int(off)
    for ends in choices:
        end = int(ends[t, start])
        counts.append(end - start)
        start = end
    return Split(int(off), tuple(tier.name for tier in order), tuple(counts), float(score[t, off]))


def _runs(
    tier: Tier, room: int | Floats, cost_after: Floats, bounds: Floats, num_layers: int
) -> tuple[Floats, np.ndarray[Any, np.dtype[np.intp]]]:
    """Least time of layers i.. when the run starting at i lies on `tier`, and where that run ends; `[bound, i]`."""
    time = np.concatenate([[0.0], np.cumsum(tier.seconds)])
    need = np.concatenate([[0.0], np.cumsum(tier.need)])
    run_time = time[None, :] - time[:, None]  # [start, end]
    run_need = need[None, :] - need[:, None]
    ends_after_start = np.arange(num_layers + 1)[None, :] >= np.arange(num_layers + 1)[:, None]
    limit = np.broadcast_to(np.asarray(room, np.float64), (num_layers + 1,))[:, None]
    fits = ends_after_start & ((run_need <= limit) | (run_need == 0)) & (limit >= 0)
    fits = fits[None] & (run_time[None] <= bounds[:, None, None])
    cost = np.where(fits, run_time[None] + cost_after[:, None, :], np.inf)
    ends = cost.argmin(axis=2)
    return np.take_along_axis(cost, ends[:, :, None], axis=2)[:, :, 0], ends


def _offload_prefix(offload: Offload | None, num_layers: int) -> tuple[Floats, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Time of offloading the first i layers, and whether the host has room for them."""
    if offload is None:
        return np.zeros(num_layers + 1), np.arange(num_layers + 1) == 0
    seconds = np.concatenate([[0.0], np.cumsum(offload.seconds)])
    need = np.concatenate([[0.0], np.cumsum(offload.host_need)])
    feasible = need + offload.fixed_host * (np.arange(num_layers + 1) > 0) <= offload.host_room
    feasible[0] = True
    return seconds, feasible


def _first_gpu_taken(offload: Offload | None, num_layers: int) -> Floats:
    """Bytes that the first i offloaded layers take on the first GPU."""
    if offload is None:
        return np.zeros(num_layers + 1)
    taken = np.concatenate([[0.0], np.cumsum(offload.gpu_need)])
    taken[1:] += offload.fixed_gpu
    return taken


def _stage_bounds(order: tuple[Tier, ...], num_layers: int) -> Floats:
    """Bounds on the slowest stage worth trying. They depend on times only, never on how much memory there is."""
    if len(order) == 1:
        return np.array([np.inf]) if num_layers == 0 else np.array([float(order[0].seconds.sum()) + 1e-12])
    totals = [float(tier.seconds.sum()) for tier in order]
    ideal = 1 / sum(1 / max(total, 1e-12) for total in totals)
    return np.linspace(ideal * 1.0000001, max(totals) + 1e-12, STAGE_BOUNDS)

"""The speed model: what devices do per second, measured or assumed.

A step that reads weights for few rows is bound by memory bandwidth, one with many rows by arithmetic; its time is the
larger of the two. Copies overlap compute, so a streamed layer takes the larger of its copy and its computation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from chandra.memory.device import Device
from chandra.quant import get_format

ASSUMED_BANDWIDTH, ASSUMED_LINK = 300e9, 12e9  # bytes/s of a GPU nothing is known of
SLOTS = 2  # layers that a stream holds at a time
GPU_RUNTIME = 400 << 20  # bytes of a CUDA context and its libraries, loaded lazily


@dataclass(frozen=True)
class Rate:
    """What kernels do with weights of one format: `bandwidth`, bytes/s of weights read to decode one token; `macs`,
    multiply-adds/s in a long prefill; `mapped`, bytes/s that the CPU can use as they are stored, in a file."""

    bandwidth: float
    macs: float
    mapped: float = 1e9


@dataclass(frozen=True)
class Profile:
    """What a device does, measured by `calibrate` or taken from its datasheet.

    `rates` by weight format; one that is not there is taken to be like the one of the nearest size. `layer_overhead`:
    seconds per layer and step that rates do not explain. `link`: bytes/s from the host; None: the host. `runtime`:
    bytes taken by merely using the device (context, libraries, interpreter). `attention`: the same for the cache and
    the products with it; None: as for weights, and at the same time.
    """

    rates: tuple[tuple[str, Rate], ...]
    layer_overhead: float = 0.0
    link: float | None = None
    runtime: int = 0
    attention: Rate | None = None

    def rate(self, mix: tuple[tuple[str, int], ...]) -> Rate:
        """The rate for weights with these bytes in each format."""
        known = {name: (bits(name), rate) for name, rate in self.rates}
        seconds = work = values = total = stored = 0.0
        for name, nbytes in mix:
            rate = min(known.values(), key=lambda entry: abs(entry[0] - bits(name)))[1]
            count = 8 * nbytes / bits(name)
            total, values = total + nbytes, values + count
            seconds, work = seconds + nbytes / rate.bandwidth, work + count / rate.macs
            stored += nbytes / rate.mapped
        return Rate(total / seconds, values / work, total / stored)


@cache
def bits(format: str) -> float:
    return get_format(format).bits_per_weight


@dataclass(frozen=True)
class Machine:
    """Profiles by device name, the host as "cpu". `disk`: bytes/s read; `convert`: values/s packed into another format;
    `measured`: whether the host's profile was measured here. The system keeps files of up to `cache` bytes in memory
    that nobody else wants, from where they come with `cached` bytes/s. `actuals`: the runs that have corrected what a
    process takes, in words."""

    profiles: Mapping[str, Profile]
    disk: float
    convert: float = 3e7
    measured: bool = True
    cache: int = 0
    cached: float = 4e9
    actuals: str = ""

    def in_cache(self, nbytes: int) -> bool:
        """Whether a file of so many bytes that is read over and over stays in the system's memory."""
        return nbytes <= self.cache

    def disk_rate(self, nbytes: int) -> float:
        return self.cached if self.in_cache(nbytes) else self.disk

    @property
    def host(self) -> Profile:
        return self.profiles["cpu"]

    def of(self, device: str) -> Profile:
        return self.profiles[device]


# A desktop processor of 2020: 8 cores, two channels of DDR4, a SATA SSD.
ASSUMED_HOST = Machine({"cpu": Profile((("F16", Rate(3e10, 2e11)),), 3e-5, None, 80 << 20)}, disk=5e8, measured=False)


def machine_with(host: Machine, devices: Sequence[Device]) -> Machine:
    """The machine with profiles for all of these devices; those it has are kept.

    A GPU gets 80 % of its bandwidth for decode, and arithmetic in proportion to it, as GPUs are built (about 60
    multiply-adds for each byte of bandwidth), at 45 % of the peak. A virtual device computes as the host does.
    """
    profiles, base = dict(host.profiles), host.host
    for device in devices:
        if device.name in profiles:
            continue
        if device.kind == "virtual":
            most = device.bandwidth or float("inf")
            rates = tuple((name, replace(rate, bandwidth=min(rate.bandwidth, most))) for name, rate in base.rates)
            attention = base.attention and replace(base.attention, bandwidth=min(base.attention.bandwidth, most))
            profiles[device.name] = Profile(rates, base.layer_overhead, device.link, attention=attention)
        else:
            bandwidth, link = device.bandwidth or ASSUMED_BANDWIDTH, device.link or ASSUMED_LINK
            rate = Rate(0.8 * bandwidth, 27 * bandwidth)
            profiles[device.name] = Profile((("F16", rate),), 4e-6, link, GPU_RUNTIME)
    return replace(host, profiles=profiles)


def waiting(layers: Sequence[tuple[str, float, float]], rest: float) -> float:
    """Seconds that a step waits for weights that are brought beside the computation, step after step.

    `layers`: of each layer, in order, the way that its weights come by, seconds until it has computed once they are
    there, and seconds that they need on that way: 0 for what is there. Things come one at a time by each way, ahead, to
    one of SLOTS places, each of which is free again once its layer has computed. `rest`: seconds of a step besides.
    """
    clock = began = 0.0
    arrived: dict[str, float] = defaultdict(float)
    free: dict[str, list[float]] = defaultdict(lambda: [0.0] * SLOTS)
    for _ in range(3):  # until it is the same in every step
        began = clock
        for way, busy, bringing in layers:
            if bringing:
                arrived[way] = max(arrived[way], free[way].pop(0)) + bringing
                clock = max(clock, arrived[way])
                free[way].append(clock + busy)
            clock += busy
        clock += rest
    return max(0.0, clock - began - rest - sum(busy for _, busy, _ in layers))


def crossover_tokens(host: Rate, link: float | None, bytes_per_value: float) -> int:
    """Tokens of a step from which copying a layer over the link beats computing it on the CPU; 0: no such step."""
    if link is None:
        return 0
    copy = bytes_per_value / link
    return 1 if copy <= bytes_per_value / host.bandwidth else int(copy * host.macs) + 1

"""The speed model: what devices do per second, measured or assumed.

A step that reads weights for few rows is bound by memory bandwidth, one with many rows by arithmetic; its time is the
larger of the two. Copies overlap compute, so a streamed layer takes the larger of its copy and its computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chandra.memory.device import Device

ASSUMED_BANDWIDTH, ASSUMED_LINK = 300e9, 12e9  # bytes/s of a GPU nothing is known of
GPU_RUNTIME = 400 << 20  # bytes of a CUDA context and its libraries, loaded lazily


@dataclass(frozen=True)
class Profile:
    """What a device does, measured by `calibrate` or taken from its datasheet.

    `bandwidth`: bytes/s of weights read by the decode kernels. `macs`: multiply-adds/s of the prefill kernels.
    `layer_overhead`: seconds per layer and step that neither explains. `link`: bytes/s from the host; None: the host.
    `runtime`: bytes taken by merely using the device (context, libraries, interpreter).
    """

    bandwidth: float
    macs: float
    layer_overhead: float = 0.0
    link: float | None = None
    runtime: int = 0


@dataclass(frozen=True)
class Machine:
    """Profiles by device name, the host as "cpu". `disk`: bytes/s read; `convert`: values/s packed into another format;
    `measured`: whether the host's profile was measured here."""

    profiles: Mapping[str, Profile]
    disk: float
    convert: float = 3e7
    measured: bool = True

    @property
    def host(self) -> Profile:
        return self.profiles["cpu"]

    def of(self, device: str) -> Profile:
        return self.profiles[device]


# A desktop processor of 2020: 8 cores, two channels of DDR4, a SATA SSD.
ASSUMED_HOST = Machine({"cpu": Profile(3e10, 2e11, 3e-5, None, 80 << 20)}, disk=5e8, measured=False)


def machine_with(host: Machine, devices: Sequence[Device]) -> Machine:
    """The machine with profiles for all of these devices.

    A GPU gets 80 % of its bandwidth for decode, and arithmetic in proportion to it, as GPUs are built (about 60
    multiply-adds for each byte of bandwidth), at 45 % of the peak. A virtual device computes as the host does.
    """
    profiles = dict(host.profiles)
    for device in devices:
        bandwidth = device.bandwidth or ASSUMED_BANDWIDTH
        if device.name in profiles:
            continue
        if device.kind == "virtual":
            base = host.host
            read = min(base.bandwidth, device.bandwidth or base.bandwidth)
            profiles[device.name] = Profile(read, base.macs, base.layer_overhead, device.link)
        else:
            link = device.link or ASSUMED_LINK
            profiles[device.name] = Profile(0.8 * bandwidth, 27 * bandwidth, 4e-6, link, GPU_RUNTIME)
    return Machine(profiles, host.disk, host.convert, host.measured)


def crossover_tokens(machine: Machine, device: str, bytes_per_value: float) -> int:
    """Tokens of a step from which copying a layer to `device` beats computing it on the CPU."""
    link = machine.of(device).link
    if link is None:
        return 1
    copy = bytes_per_value / link
    if copy <= bytes_per_value / machine.host.bandwidth:
        return 1
    return int(copy * machine.host.macs) + 1

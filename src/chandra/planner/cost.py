"""The speed model: seconds for the pieces of a step, from bytes, multiply-adds and measured constants.

A step that reads weights for few rows is bound by memory bandwidth, one with many rows by arithmetic; the time is the
larger of the two. Copies overlap compute, so a streamed layer takes the larger of its copy and its computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from chandra.memory.device import Device
from chandra.memory.plan import Placement

ASSUMED_BANDWIDTH, ASSUMED_LINK = 300e9, 12e9  # bytes/s of a GPU nothing is known of


@dataclass(frozen=True)
class Profile:
    """What a device does, measured by `calibrate` or taken from its datasheet.

    `bandwidth`: bytes/s of weights read by the decode kernels. `macs`: multiply-adds/s of the prefill kernels.
    `layer_overhead`: seconds per layer and step that neither explains. `link`: bytes/s from the host; None: the host.
    `runtime`: bytes taken by merely using the device (context, libraries).
    """

    bandwidth: float
    macs: float
    layer_overhead: float = 0.0
    link: float | None = None
    runtime: int = 0


@dataclass(frozen=True)
class Machine:
    """Profiles of all devices by name, the host as "cpu", and the disk's bytes/s."""

    profiles: Mapping[str, Profile]
    disk: float
    measured: bool = True
    overheads: Mapping[str, int] = field(default_factory=dict)  # bytes a run was seen to take beyond its plan

    def of(self, device: str) -> Profile:
        return self.profiles[device]

    @property
    def host(self) -> Profile:
        return self.profiles["cpu"]


def assumed_profile(device: Device) -> Profile:
    """A profile from datasheet numbers: 80 % of the bandwidth for decode; arithmetic in proportion to it, as GPUs are
    built (about 60 multiply-adds per byte of bandwidth), at 45 % of the peak."""
    bandwidth = device.bandwidth or ASSUMED_BANDWIDTH
    runtime = 400 << 20 if device.kind in ("cuda", "assumed") else 0
    return Profile(0.8 * bandwidth, 60 * 0.45 * bandwidth, 4e-6, device.link or ASSUMED_LINK, runtime)


@dataclass(frozen=True)
class LayerLoad:
    """What one layer does in one step with `rows` tokens: bytes of weights read, multiply-adds, bytes of KV read."""

    weight_bytes: float
    macs: float
    kv_bytes: float


def layer_seconds(load: LayerLoad, placement: Placement, device: Profile, machine: Machine) -> float:
    """Seconds of one layer in one step. `device` computes it (the host's profile for `host`)."""
    reads = (load.weight_bytes + load.kv_bytes) / device.bandwidth
    compute = max(reads, load.macs / device.macs) + device.layer_overhead
    if placement == "stream":
        return max(compute, load.weight_bytes / (device.link or machine.host.bandwidth))
    if placement == "disk":
        return max(compute, load.weight_bytes / machine.disk)
    return compute

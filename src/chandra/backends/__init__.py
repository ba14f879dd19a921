"""Where layers are computed. A backend implements `ops.contracts.Backend` for one kind of device."""

from __future__ import annotations

from chandra.backends.cpu.backend import CpuBackend
from chandra.errors import DeviceError
from chandra.memory.device import Device
from chandra.ops.contracts import Backend


def make_backend(device: Device, threads: int | None = None, isa: str | None = None) -> Backend:
    """The backend of a device. `threads` and `isa` are for the CPU's kernels. Raises DeviceError, UsageError."""
    if device.kind == "cpu":
        return CpuBackend(device, threads, isa)
    if device.kind == "virtual":
        from chandra.backends.virtual.backend import VirtualBackend

        return VirtualBackend(device, threads, isa)
    raise DeviceError(
        f"{device.name}: this build has no kernels for {device.kind} devices",
        "leave the device out, and the model runs on the CPU",
    )

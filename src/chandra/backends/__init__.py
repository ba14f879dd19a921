"""Where layers are computed. A backend implements `ops.contracts.Backend` for one kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chandra.backends.cpu.backend import CpuBackend
from chandra.errors import DeviceError
from chandra.memory.device import Device
from chandra.ops.contracts import Backend

if TYPE_CHECKING:
    from chandra.backends.cuda.sizes import Scratch


def make_backend(
    device: Device, threads: int | None = None, isa: str | None = None, scratch: Scratch | None = None, graphs: int = 0
) -> Backend:
    """The backend of a device. `threads` and `isa` are for the CPU's kernels; `scratch` is what a GPU's backend keeps
    for its kernels, `graphs` the bytes that it may take for recorded steps.

    Raises DeviceError, UsageError, BudgetExceeded.
    """
    if device.kind == "cpu":
        return CpuBackend(device, threads, isa)
    if device.kind == "virtual":
        from chandra.backends.virtual.backend import VirtualBackend

        return VirtualBackend(device, threads, isa)
    if device.kind == "cuda":
        from chandra.backends.cuda.backend import CudaBackend  # imports Triton
        from chandra.backends.cuda.sizes import Scratch

        return CudaBackend(device, scratch or Scratch(), graphs)
    raise DeviceError(
        f"{device.name} is only assumed: this machine does not have it",
        "plan for it with `chandra plan`; to run, name devices that are here",
    )

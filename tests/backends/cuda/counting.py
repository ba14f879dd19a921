"""Models of true shapes on GPUs without memory: what would be allocated is counted, and nothing is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.backend import CudaBackend
from chandra.bench import synthetic
from chandra.memory.device import Device
from chandra.memory.ledger import Kind
from chandra.memory.plan import Plan
from chandra.models import ModelSpec
from chandra.ops.contracts import Backend, Copied, Copy, HostBytes, Weight
from chandra.planner.kernels import BuiltKernels
from chandra.quant import PackedWeight, get_format


class Nowhere(Accelerator):
    """Tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")

    def copy(self, source: torch.Tensor, out: torch.Tensor, beside: bool = False) -> Copy:  # noqa: ARG002
        return Copied()


class CountingBackend(CudaBackend):
    """A GPU that is not there."""

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:  # noqa: ARG002
        memory = self.empty((self.weight_nbytes(weight.format, weight.shape),), "uint8")
        return self.bind_weight(weight.format, weight.shape, memory)

    def pack_weight(self, weight: PackedWeight, out: HostBytes) -> None:
        pass


class CountingHost(CpuBackend):
    """A host that has room for every model."""

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:
        nbytes = weight.nbytes if lookup else BuiltKernels().weight_bytes(weight.format.name, weight.shape)
        return Weight(weight.format, weight.shape, nbytes, None)


def blank(form: str, shape: tuple[int, ...]) -> PackedWeight:
    """Zeros that take no memory; for norms, ones."""
    if len(shape) == 1:
        return synthetic.random_weight(form, shape)
    parts = {p.name: np.broadcast_to(np.zeros((), p.dtype), p.shape) for p in get_format(form).parts(shape)}
    return PackedWeight(get_format(form), shape, parts)


def make(device: Device, **sizes: Any) -> Backend:
    return CountingBackend(device, **sizes, accelerator=Nowhere()) if sizes else CountingHost(device)


def load(made: Plan, spec: ModelSpec) -> synthetic.Loaded:
    """All of loading but the weights themselves: every byte is reserved and counted."""
    return synthetic.load(made, spec, make, blank)


def difference(loaded: synthetic.Loaded) -> list[str]:
    """Where what is reserved, and allocated on GPUs, is not what was planned; nothing has been computed yet."""
    rows = {(row.device, row.kind): row.peak for row in loaded.ledger.rows()}
    planned = {(p.device, p.kind): p.nbytes for p in loaded.plan.predictions}
    out = [
        f"{device} {kind}: planned {planned.get((device, kind), 0)}, reserved {rows.get((device, kind), 0)}"
        for device, kind in sorted(rows.keys() | planned.keys())
        if rows.get((device, kind), 0) != planned.get((device, kind), 0)
    ]
    for gpu in loaded.gpus:
        name = gpu.device.name
        held = sum(n for (d, kind), n in planned.items() if d == name and kind not in (Kind.RUNTIME, Kind.GRAPHS))
        if gpu.arena.peak != held:
            out.append(f"{name}: planned {held}, allocated {gpu.arena.peak}")
    return out

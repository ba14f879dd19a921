"""Which kernel computes with which format on which kind of device.

Backends register their kernels when they are imported and look them up when something is loaded, never during a step;
`chandra doctor` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from chandra.errors import UnsupportedError
from chandra.memory.device import DeviceKind

Op = Literal["linear", "attention"]


@dataclass(frozen=True)
class Kernel:
    """A kernel. `format` is that of the weight, or the type of the KV cache; `target` names the instruction set or GPU
    architecture it runs with now. `supports` is asked for the shape of the weight, or `(head_dim,)`."""

    op: Op
    format: str
    device: DeviceKind
    name: str
    target: Callable[[], str]
    supports: Callable[[tuple[int, ...]], bool] = lambda _: True


_TABLE: dict[tuple[Op, str, DeviceKind], list[Kernel]] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel behind those that were registered before it for the same format."""
    _TABLE.setdefault((kernel.op, kernel.format, kernel.device), []).append(kernel)


def find(op: Op, format_name: str, device: DeviceKind, shape: tuple[int, ...]) -> Kernel:
    """The first kernel that supports the shape. Raises UnsupportedError."""
    for kernel in _TABLE.get((op, format_name, device), ()):
        if kernel.supports(shape):
            return kernel
    raise UnsupportedError(
        f"no {op} kernel for {format_name} of shape {shape} on a {device} device",
        "choose another format; `chandra doctor` lists those with kernels",
    )


def kernels() -> tuple[Kernel, ...]:
    """All kernels, by op, device and format."""
    return tuple(k for key in sorted(_TABLE, key=lambda key: (key[0], key[2], key[1])) for k in _TABLE[key])

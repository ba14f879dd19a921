"""What the CPU backend takes for itself."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from chandra.models.spec import ModelSpec
from chandra.quant import get_format


class HostKernels(Protocol):
    """Bytes of the host that no tensor table knows."""

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the layout its kernel wants."""
        ...

    def scratch_bytes(self, spec: ModelSpec, rows: int, logit_rows: int) -> int:
        """Bytes the kernels keep for themselves in steps of so many rows."""
        ...


class PlainKernels:
    """A CPU that computes with weights as they are stored."""

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        return packed_bytes(format, shape)

    def scratch_bytes(self, spec: ModelSpec, rows: int, logit_rows: int) -> int:  # noqa: ARG002
        return 0


PLAIN = PlainKernels()


@cache
def packed_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight as files store it."""
    return get_format(format).nbytes(shape)

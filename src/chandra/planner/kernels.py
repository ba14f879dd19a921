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


class CpuKernels:
    """The C++ kernels of this build."""

    def __init__(self) -> None:
        from chandra.backends.cpu import _cpu  # the compiled module

        self._cpu = _cpu

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        try:
            return self._cpu.repacked_nbytes(format, shape)
        except ValueError:  # no kernel for this format or shape: unpacked
            return self._cpu.repacked_nbytes("F32", shape)

    def scratch_bytes(self, spec: ModelSpec, rows: int, logit_rows: int) -> int:
        hidden = spec.hidden_size
        most = self._cpu.linear_scratch_bytes(logit_rows, hidden, 0)
        for layer in set(spec.layers):
            a, mlp = layer.attention, layer.mlp
            widest = max(hidden, a.num_heads * a.head_dim, 0 if mlp.num_experts else mlp.intermediate_size)
            most = max(most, self._cpu.linear_scratch_bytes(rows, widest, hidden if layer.post_norms else 0))
            if mlp.num_experts:
                expert = rows, hidden, mlp.intermediate_size, mlp.num_experts, mlp.experts_per_token
                most = max(most, self._cpu.moe_scratch_bytes(*expert))
        return most


PLAIN = PlainKernels()


@cache
def host_kernels() -> HostKernels:
    """What this build computes with on the CPU."""
    return CpuKernels()


@cache
def packed_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight as files store it."""
    return get_format(format).nbytes(shape)

"""What the CPU backend takes for itself."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, Protocol

from chandra.config import SAMPLING
from chandra.kvcache.view import index_bytes
from chandra.models.decoder import FLOAT
from chandra.models.spec import ModelSpec
from chandra.quant import get_format


class Limits(NamedTuple):
    """The most that one step takes: tokens, sequences, tokens in the cache of one of them, rows of logits."""

    rows: int
    sequences: int
    context: int
    logit_rows: int


class HostKernels(Protocol):
    """Bytes of the host that no tensor table knows."""

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the layout its kernel wants."""
        ...

    def scratch_bytes(self, spec: ModelSpec, limits: Limits) -> int:
        """Bytes the kernels keep for themselves in such steps."""
        ...


class PlainKernels:
    """A CPU that computes with weights as they are stored."""

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        return packed_bytes(format, shape)

    def scratch_bytes(self, spec: ModelSpec, limits: Limits) -> int:  # noqa: ARG002
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

    def scratch_bytes(self, spec: ModelSpec, limits: Limits) -> int:
        hidden, rows = spec.hidden_size, limits.rows
        most, attention = self._cpu.linear_scratch_bytes(limits.logit_rows, hidden, 0), 0
        for layer in set(spec.layers):
            a, mlp = layer.attention, layer.mlp
            batch = rows, limits.sequences, min(limits.context, a.window or limits.context)
            attention = max(
                attention, self._cpu.attention_scratch_bytes(a.num_heads, a.num_kv_heads, a.head_dim, *batch)
            )
            widest = max(hidden, a.num_heads * a.head_dim, 0 if mlp.num_experts else mlp.intermediate_size)
            most = max(most, self._cpu.linear_scratch_bytes(rows, widest, hidden if layer.post_norms else 0))
            if mlp.num_experts:
                expert = rows, hidden, mlp.intermediate_size, mlp.num_experts, mlp.experts_per_token
                most = max(most, self._cpu.moe_scratch_bytes(*expert))
        return most + attention


def host_workspace(
    kernels: HostKernels, spec: ModelSpec, limits: Limits, groups: int, block_size: int, computes: bool, away: bool
) -> int:
    """Bytes of the host that steps take besides the decoder's buffers: index arrays and choosing tokens; what the
    kernels keep, if the CPU `computes` (for itself or as a virtual device); activations and logits that pass through,
    if other devices have any (`away`)."""
    indices = index_bytes(groups, limits.sequences, limits.context, block_size, limits.rows, limits.logit_rows)
    passing = FLOAT * (limits.rows * spec.hidden_size + limits.logit_rows * spec.vocab_size) if away else 0
    scratch = kernels.scratch_bytes(spec, limits) if computes else 0
    return indices + SAMPLING * spec.vocab_size + passing + scratch


PLAIN = PlainKernels()


@cache
def host_kernels() -> HostKernels:
    """What this build computes with on the CPU."""
    return CpuKernels()


@cache
def packed_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight as files store it."""
    return get_format(format).nbytes(shape)

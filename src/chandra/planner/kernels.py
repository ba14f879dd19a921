"""What the backends take for themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from chandra.config import SAMPLING
from chandra.errors import BudgetExceeded
from chandra.kvcache.view import index_bytes
from chandra.memory.device import format_size
from chandra.memory.plan import Part
from chandra.models.decoder import FLOAT
from chandra.models.spec import ModelSpec
from chandra.quant import get_format

if TYPE_CHECKING:
    from chandra.backends.cuda.sizes import Scratch

PIECE = 2 << 20  # bytes of the file that the CPU repacks before it drops their pages


def repacking(parts: Sequence[Part]) -> int:
    """Bytes of the host that weights take when they are repacked out of the file, while they are first used."""
    return PIECE if any(part.placement == "host" and part.name != "embedding" for part in parts) else 0


def packing(devices: Iterable[str]) -> int:
    """Bytes of the host in which weights are packed for these devices: GPUs have layouts of their own."""
    gpus = {name for name in devices if name != "cpu" and not name.startswith("virtual")}
    if not gpus:
        return 0
    from chandra.backends.cuda.packing import PACKING  # here: not needed without a GPU

    return PACKING * len(gpus)


class Limits(NamedTuple):
    """The most that one step takes: tokens, sequences, tokens in the cache of one of them, rows of logits. `floats`:
    the CPU multiplies some weights as floats, which takes more memory."""

    rows: int
    sequences: int
    context: int
    logit_rows: int
    floats: bool


_promised = 0  # bytes of scratch memory that the CPU's kernels may keep, by the plans of this process


def promise_scratch(spec: ModelSpec, limits: Limits) -> None:
    """Note what a plan says of the memory that the CPU's kernels keep, beyond what they have by now."""
    global _promised
    _promised = max(_promised, scratch_held() + BuiltKernels().scratch_bytes(spec, limits))


def scratch_held() -> int:
    """Bytes that the CPU's kernels keep."""
    from chandra.backends.cpu import _cpu

    return _cpu.scratch_held()


def check_scratch() -> None:
    """Raise BudgetExceeded if the CPU's kernels keep more than was promised."""
    held = scratch_held()
    if held > _promised:
        raise BudgetExceeded(
            f"cpu: the kernels keep {format_size(held)} of workspace, {format_size(_promised)} were planned",
            hint="this is a fault in Chandra: please report it with the model and its plan",
        )


class Kernels:
    """Bytes that no tensor table knows: here of devices that compute with weights as they are stored."""

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the layout that the CPU's kernels want."""
        return packed_bytes(format, shape)

    def in_place(self, format: str, shape: tuple[int, ...]) -> bool:  # noqa: ARG002
        """Whether a weight can be used as it is stored, in a file."""
        return True

    def floats(self, format: str, shape: tuple[int, ...]) -> bool:  # noqa: ARG002
        """Whether the CPU multiplies a weight as floats."""
        return False

    def scratch_bytes(self, spec: ModelSpec, limits: Limits) -> int:  # noqa: ARG002
        """Bytes the CPU's kernels keep for themselves in such steps."""
        return 0

    def gpu_weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the layout that a GPU's kernels want."""
        return packed_bytes(format, shape)

    def gpu_scratch(self, spec: ModelSpec, limits: Limits, block_size: int) -> Scratch | None:  # noqa: ARG002
        """What the backend of a GPU keeps for itself in such steps."""
        return None


class BuiltKernels(Kernels):
    """The C++ and Triton kernels of this build."""

    def __init__(self) -> None:
        from chandra.backends.cpu import _cpu  # the compiled module

        self._cpu = _cpu

    def weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        try:
            return self._cpu.repacked_nbytes(format, shape)
        except ValueError:  # no kernel for this format or shape: unpacked
            return self._cpu.repacked_nbytes("F32", shape)

    def in_place(self, format: str, shape: tuple[int, ...]) -> bool:
        try:
            return self._cpu.repacked_nbytes(format, shape) > 0
        except ValueError:
            return False

    def floats(self, format: str, shape: tuple[int, ...]) -> bool:
        try:
            return self._cpu.multiplies_floats(format, shape)
        except ValueError:
            return True

    def scratch_bytes(self, spec: ModelSpec, limits: Limits) -> int:
        hidden, rows, linear = spec.hidden_size, limits.rows, self._cpu.linear_scratch_bytes
        most, attention = linear(limits.logit_rows, hidden, 0, limits.floats), 0
        for layer in set(spec.layers):
            a, mlp = layer.attention, layer.mlp
            batch = rows, limits.sequences, min(limits.context, a.window or limits.context)
            attention = max(
                attention, self._cpu.attention_scratch_bytes(a.num_heads, a.num_kv_heads, a.head_dim, *batch)
            )
            widest = max(hidden, a.num_heads * a.head_dim, 0 if mlp.num_experts else mlp.intermediate_size)
            most = max(most, linear(rows, widest, hidden if layer.post_norms else 0, limits.floats))
            if mlp.num_experts:
                expert = rows, hidden, mlp.intermediate_size, mlp.num_experts, mlp.experts_per_token
                most = max(most, self._cpu.moe_scratch_bytes(*expert))
        return most + attention

    def gpu_weight_bytes(self, format: str, shape: tuple[int, ...]) -> int:
        return _gpu_bytes(format, shape)

    def gpu_scratch(self, spec: ModelSpec, limits: Limits, block_size: int) -> Scratch:
        from chandra.backends.cuda import sizes as cuda

        rows, sequences, context, logit_rows, _ = limits
        hidden, most = spec.hidden_size, cuda.linear_bytes(logit_rows, spec.hidden_size, 0)
        for layer in set(spec.layers):
            a, mlp = layer.attention, layer.mlp
            widest = max(hidden, a.num_heads * a.head_dim, 0 if mlp.num_experts else mlp.intermediate_size)
            most = max(
                most,
                cuda.linear_bytes(rows, widest, hidden if layer.post_norms else 0),
                cuda.attention_bytes(rows, a.num_heads, a.head_dim, sequences, context),
            )
            if mlp.num_experts:
                expert = mlp.num_experts, mlp.experts_per_token, hidden, mlp.intermediate_size
                most = max(most, cuda.moe_bytes(rows, *expert))
        groups = len({(a.num_kv_heads, a.head_dim, a.window) for a in (layer.attention for layer in spec.layers)})
        return cuda.Scratch(most, cuda.step_ints(rows, sequences, -(-context // block_size), groups, logit_rows))


def host_workspace(
    kernels: Kernels, spec: ModelSpec, limits: Limits, groups: int, block_size: int, computes: bool, away: bool
) -> int:
    """Bytes of the host that steps take besides the decoder's buffers: index arrays and choosing tokens; what the
    kernels keep, if the CPU `computes` (for itself or as a virtual device); activations and logits that pass through,
    if other devices have any (`away`)."""
    indices = index_bytes(groups, limits.sequences, limits.context, block_size, limits.rows, limits.logit_rows)
    passing = FLOAT * (limits.rows * spec.hidden_size + limits.logit_rows * spec.vocab_size) if away else 0
    scratch = kernels.scratch_bytes(spec, limits) if computes else 0
    return indices + SAMPLING * spec.vocab_size + passing + scratch


PLAIN = Kernels()


@cache
def built_kernels() -> Kernels:
    """What this build computes with."""
    return BuiltKernels()


@cache
def packed_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight as files store it."""
    return get_format(format).nbytes(shape)


@cache
def _gpu_bytes(format: str, shape: tuple[int, ...]) -> int:
    from chandra.backends.cuda.layouts import weight_nbytes  # here: not needed without a GPU

    return weight_nbytes(get_format(format), shape)

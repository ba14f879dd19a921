"""The kernels of GPUs, for the registry. Importing it needs neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Callable

from chandra.backends.cuda.driver import MIN_CAPABILITY
from chandra.ops import registry
from chandra.ops.registry import Kernel
from chandra.quant import formats, get_format


def _target() -> str:
    return "sm_{}{}+".format(*MIN_CAPABILITY)


def _whole_blocks(kv_type: str) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: shape[0] % getattr(get_format(kv_type), "block_size", 1) == 0


for _form in formats():
    registry.register(Kernel("linear", _form.name, "cuda", "triton", _target))
for _kv_type in ("f32", "f16", "bf16", "q8_0", "q4_0"):
    registry.register(Kernel("attention", _kv_type, "cuda", "triton", _target, _whole_blocks(_kv_type)))

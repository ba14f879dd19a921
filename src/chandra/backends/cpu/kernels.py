"""The kernels of the compiled module, for the registry."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from chandra.backends.cpu import _cpu
from chandra.ops import registry
from chandra.ops.registry import Kernel
from chandra.quant import Format, formats, get_format
from chandra.quant.base import PackedWeight

PANELS, UNPACKED = "panels", "unpacked to F32"


def panel_format(form: Format, shape: tuple[int, ...]) -> str:
    """The format whose panels hold a weight: its own, or F32 where that has none."""
    return "F32" if registry.find("linear", form.name, "cpu", shape).name == UNPACKED else form.name


def pack_panels(weight: PackedWeight, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Write the weight's panels to memory aligned to 64."""
    form, parts = panel_format(weight.format, weight.shape), dict(weight.parts)
    if form != weight.format.name:
        parts = {"data": weight.unpack().numpy().view(np.uint8)}
    _cpu.pack_weight(form, weight.shape, parts, out)


def make_weight(weight: PackedWeight, kernel: Kernel, repack: bool, later: bool = True) -> _cpu.Weight:
    """The weight as its kernel wants it: in memory of its own, or (not `repack`) where it is if that can be. `later`:
    what lies in a mapped file may stay there until its second product."""
    if kernel.name == UNPACKED:
        return _cpu.Weight("F32", weight.shape, {"data": weight.unpack().numpy().view(np.uint8)}, True)
    mapped = later and all(map(_is_mapped, weight.parts.values()))
    return _cpu.Weight(weight.format.name, weight.shape, dict(weight.parts), repack, mapped)


def _is_mapped(array: np.ndarray[Any, Any]) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)


def _has_panels(form: Format) -> Any:
    def supports(shape: tuple[int, ...]) -> bool:
        try:
            _cpu.repacked_nbytes(form.name, shape)
        except ValueError:
            return False
        return True

    return supports


def _whole_blocks(kv_type: str) -> Any:
    return lambda shape: shape[0] % getattr(get_format(kv_type), "block_size", 1) == 0


for _form in formats():
    registry.register(Kernel("linear", _form.name, "cpu", PANELS, _cpu.isa, _has_panels(_form)))
    registry.register(Kernel("linear", _form.name, "cpu", UNPACKED, _cpu.isa))
for _kv_type in ("f32", "f16", "bf16", "q8_0", "q4_0"):
    registry.register(Kernel("attention", _kv_type, "cpu", "paged", _cpu.isa, _whole_blocks(_kv_type)))

"""Prints what the product kernels take on GPUs, as JSON: `aot_linear.py FORMATS ROWS CAPABILITIES`, each `a,b,…`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import aot
import torch

from chandra.backends.cuda import layouts, linear, moe, sizes
from chandra.quant import get_format

MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


def weight(name: str, *shape: int) -> layouts.DeviceWeight:
    memory = torch.zeros(layouts.weight_nbytes(get_format(name), shape), dtype=torch.uint8)
    return layouts.bind(get_format(name), shape, memory)


def launch(name: str, n: int, dtype: torch.dtype, scratch: torch.Tensor) -> list[aot.Launch]:
    """Everything for n rows."""
    x, out, router = torch.zeros(n, 1024, dtype=dtype), torch.zeros(n, 1024), torch.zeros(n, 4)
    dense, experts = weight(name, 1024, 1024), weight(name, 4, 1024, 1024)
    memory = torch.zeros(sizes.moe_scratch(n, 4, 2, 1024, 1024), dtype=torch.uint8)
    with aot.launches() as recorded:
        linear.product(x, linear.Product(dense, torch.zeros(1024), out), scratch)
        linear.linears(x, [linear.Product(dense, None, out)] * 3, scratch)
        linear.gate_up(x, linear.Product(dense, None, out), linear.Product(dense, None, out), "silu", scratch)
        linear.unpack(dense, out, ids=torch.zeros(n, dtype=torch.int32))
        moe.moe(x, router, experts, experts, experts, 2, True, "silu", out, memory)
    return recorded


def main(names: str, rows: str, capabilities: str) -> None:
    figures = []
    for capability in map(int, capabilities.split(",")):
        limit = (aot.SHARED_LIMITS | {100: 227})[capability] * 1024
        chip = linear.Chip(capability, MULTIPROCESSORS[capability], limit)
        linear.chip_of = moe.chip_of = lambda _, chip=chip: chip
        dtype = torch.float16 if capability < 80 else torch.bfloat16
        scratch = torch.zeros(sizes.SPLITS, dtype=torch.uint8)
        for name in names.split(","):
            for n in map(int, rows.split(",")):
                for one in launch(name, n, dtype, scratch):
                    figure = asdict(aot.compiled(one, capability))
                    figures.append(figure | {"limit": limit, "format": name, "rows": n})
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])

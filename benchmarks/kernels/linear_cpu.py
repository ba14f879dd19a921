"""Times the CPU matrix products: every format at several batch sizes.

    python benchmarks/kernels/linear_cpu.py [--formats Q4_K Q8_0] [--isa avx512] [--threads 2] [--out results.json]

Each figure is the fastest of many runs, with the median beside it. Up to 16 rows the weight is larger than the caches,
so that it comes from memory; GB/s count its bytes once. The limits are measured in the same run: reading memory, and
multiplying bytes that are in registers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chandra.backends.cpu import _cpu
from chandra.ops.contracts import Linear, Weight
from chandra.quant import Format, formats, get_format

COLUMNS = 2048
FEW, MANY = (1, 2, 4, 8, 16), (32, 128, 512)
LARGE, SMALL = 128 << 20, 4 << 20  # bytes of the weight


def times(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """The fastest and the median run, in seconds."""
    found: list[float] = []
    run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(found) < 3:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found), statistics.median(found)


def limits(seconds: float) -> dict[str, float]:
    memory = np.ones(LARGE, np.uint8)
    rounds = 100_000
    return {
        "read_GBps": LARGE / times(lambda: _cpu.probe_read(memory), seconds)[0] / 1e9,
        "dot_GOPps": _cpu.probe_dot(1) * rounds / times(lambda: _cpu.probe_dot(rounds), seconds)[0] / 1e9,
    }


def make(fmt: Format, nbytes: int) -> tuple[Linear, float]:
    """A weight of about so many bytes, its rows repeated, and the GB/s at which it was repacked."""
    packed = fmt.pack(torch.randn(64, COLUMNS) * 0.05)
    rows = nbytes // sum(part.nbytes for part in fmt.parts((64, COLUMNS))) * 64
    parts = {
        part.name: np.resize(
            packed[part.name].numpy().reshape(-1), part.nbytes // np.dtype(part.dtype).itemsize
        ).reshape(part.shape)
        for part in fmt.parts((rows, COLUMNS))
    }
    begin = time.perf_counter()
    handle = _cpu.Weight(fmt.name, (rows, COLUMNS), parts)
    rate = sum(part.nbytes for part in parts.values()) / (time.perf_counter() - begin) / 1e9
    return Linear(Weight(fmt, (rows, COLUMNS), handle.nbytes, handle)), rate


def measure(fmt: Format, limit: dict[str, float], seconds: float) -> dict[str, Any]:
    rows: list[dict[str, float]] = []
    repack = 0.0
    for nbytes, batches in ((LARGE, FEW), (SMALL, MANY)):
        linear, rate = make(fmt, nbytes)
        repack = repack or rate
        for n in batches:
            x = np.random.default_rng(n).standard_normal((n, COLUMNS), np.float32)
            out = np.empty((n, linear.weight.shape[0]), np.float32)
            best, median = times(
                lambda x=x, out=out, linear=linear: _cpu.norm_linear(x, None, (linear,), (out,)), seconds
            )  # type: ignore[misc]
            ops = 2 * n * linear.weight.shape[0] * COLUMNS
            figures = {"n": n, "GBps": linear.weight.nbytes / best / 1e9, "GOPps": ops / best / 1e9, "median_s": median}
            shares = {"of_read": figures["GBps"] / limit["read_GBps"], "of_dot": figures["GOPps"] / limit["dot_GOPps"]}
            rows.append({key: round(value, 6 if key == "median_s" else 3) for key, value in (figures | shares).items()})
    kernel = linear.weight.handle.kernel
    return {"format": fmt.name, "kernel": kernel, "repack_GBps": round(repack, 2), "batches": rows}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=[fmt.name for fmt in formats()])
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    _cpu.set_isa(args.isa)
    _cpu.set_threads(args.threads)
    limit = limits(args.seconds)
    results = [measure(get_format(name), limit, args.seconds) for name in args.formats]
    for result in results:
        line = "  ".join(f"n={row['n']}: {row['GBps']:.1f} GB/s {row['GOPps']:.0f} GOP/s" for row in result["batches"])
        print(f"{result['format']:10} repack {result['repack_GBps']:.1f} GB/s  {line}")
    rounded = {key: round(value, 1) for key, value in limit.items()}
    document = {"cpu": cpu_name(), "threads": _cpu.threads(), "isa": _cpu.isa(), "limits": rounded, "results": results}
    print(f"limits: {rounded}")
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

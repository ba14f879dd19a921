"""How far each CPU kernel is from what the machine allows: shares of limits measured in the same breath.

    python benchmarks/kernels/limits_cpu.py [--isa avx2] [--formats Q4_K …] [--seconds 0.2] [--out result.json]

Products of one row and of 8 rows and attention at decode read weights and caches larger than the CPU's caches: their
limit is reading memory. Products of 512 rows are told against multiplying bytes that are in registers, products of
float formats and attention at prefill against numpy's float32 matrix product (OpenBLAS needs an idle machine). Limit
and kernel alternate, and a share is the median of the pairs' ratios: other load slows both. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attention_cpu import MODELS, ROW, prepare
from linear_cpu import COLUMNS, LARGE, SMALL, cpu_name, make

from chandra.backends.cpu import _cpu
from chandra.backends.cpu.backend import CpuBackend
from chandra.memory.device import Device
from chandra.quant import formats, get_format

Limit = Callable[[], float]  # the rate of one run, per second
FLOATS = ("F32", "F16", "BF16", "nf4", "nf4-dq")


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def limits() -> dict[str, Limit]:
    memory, square, rounds = np.ones(LARGE, np.uint8), np.ones((512, 512), np.float32), 20_000
    out = np.empty_like(square)

    def dots() -> float:
        begin = time.perf_counter()
        return _cpu.probe_dot(rounds) / (time.perf_counter() - begin)

    return {
        "read": lambda: memory.nbytes / seconds_of(lambda: _cpu.probe_read(memory)),
        "int8": dots,
        "float32": lambda: 2 * 512**3 / seconds_of(lambda: np.matmul(square, square, out=out)),
    }


def compare(run: Callable[[], object], work: float, limit: Limit, seconds: float) -> dict[str, Any]:
    """The rate at which `run` does `work`, and its share of the limit: median, smallest, largest."""
    run()
    rates, shares = [], []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 5:
        most = limit()
        rates.append(work / seconds_of(run))
        shares.append(rates[-1] / most)
    return {
        "rate": round(statistics.median(rates) / 1e9, 2),
        "rate_range": [round(f(rates) / 1e9, 2) for f in (min, max)],
        "share": round(statistics.median(shares), 3),
        "share_range": [round(f(shares), 3) for f in (min, max)],
    }


class Table:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.limits = seconds, limits()
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, case: str, limit: str, unit: str, run: Callable[[], object], work: float) -> None:
        found = compare(run, work, self.limits[limit], self.seconds)
        row = {"kernel": name, "case": case, "threads": _cpu.threads(), "limit": limit, "unit": unit} | found
        self.rows.append(row)
        low, high = found["share_range"]
        print(
            f"{name:22} {case:16} {row['threads']} threads {found['rate']:8.1f} {unit:6}"
            f" {found['share']:7.0%} of {limit} ({low:.0%} to {high:.0%})",
            flush=True,
        )


def products(table: Table, name: str, threads: int) -> None:
    fmt = get_format(name)
    for nbytes, cases in ((LARGE, ((1, 1), (1, threads), (8, threads))), (SMALL, ((512, threads),))):
        linear, _ = make(fmt, nbytes)
        rows = linear.weight.shape[0]
        for n, count in cases:
            _cpu.set_threads(count)
            x = np.random.default_rng(n).standard_normal((n, COLUMNS), np.float32)
            out = np.empty((n, rows), np.float32)

            def run(x: Any = x, out: Any = out, linear: Any = linear) -> None:
                _cpu.norm_linear(x, None, (linear,), (out,))

            if n < 512:
                table.add(name, f"{n} rows", "read", "GB/s", run, linear.weight.nbytes)
            else:
                table.add(
                    name, f"{n} rows", "float32" if name in FLOATS else "int8", "GOP/s", run, 2 * n * rows * COLUMNS
                )


def attention(table: Table, backend: CpuBackend, model: str, kv_type: str, threads: int) -> None:
    for context, count in ((2048, 1), (2048, threads), (8192, threads)):
        _cpu.set_threads(count)
        call = prepare(backend, MODELS[model], kv_type, 1, context)
        work = call.layers * call.layer_bytes
        table.add(f"{model} {kv_type}", f"decode at {context}", "read", "GB/s", call.run, work)
    call = prepare(backend, MODELS[model], kv_type, 512, 512)
    table.add(f"{model} {kv_type}", "prefill 512", "float32", "GFLOP/s", call.run, call.layers * call.layer_flop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=[fmt.name for fmt in formats()])
    parser.add_argument("--kv", nargs="*", default=list(ROW), choices=list(ROW))
    parser.add_argument("--models", nargs="*", default=["qwen2.5-0.5b", "llama3-8b"], choices=list(MODELS))
    parser.add_argument("--isa")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backend = CpuBackend(Device("cpu", "cpu", 1 << 40), None, args.isa)
    threads = _cpu.threads()
    table = Table(args.seconds)
    steps = len(args.formats) + len(args.models) * len(args.kv)
    for done, name in enumerate(args.formats):
        print(f"[{done + 1}/{steps}]", file=sys.stderr)
        products(table, name, threads)
    for done, (model, kv_type) in enumerate((m, k) for m in args.models for k in args.kv):
        print(f"[{len(args.formats) + done + 1}/{steps}]", file=sys.stderr)
        attention(table, backend, model, kv_type, threads)
    _cpu.set_threads(threads)
    most = {name: round(statistics.median(limit() for _ in range(5)) / 1e9, 1) for name, limit in table.limits.items()}
    print(f"limits with {threads} threads: {most}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    document = {
        "commit": commit.stdout.strip(),
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "threads": threads, "isa": _cpu.isa()},
        "limits": most,
        "rows": table.rows,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

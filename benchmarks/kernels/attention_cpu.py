"""Times the CPU attention kernel: decode at several contexts, and prefill.

    python benchmarks/kernels/attention_cpu.py [--kv f16] [--isa avx512] [--threads 2] [--out results.json]

Decode reads every key and value once, so it is told as GB/s of cache read; prefill as GFLOP/s of the products below
the diagonal. Each figure is the median of several runs, with the fastest and slowest beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends.cpu import _cpu
from chandra.backends.cpu.backend import CpuBackend
from chandra.memory.device import Device
from chandra.ops.contracts import AttentionParams, ForwardBatch, KVLayer, KVTables, RopeParams

ROW = {"f32": ("float32", 1, 1), "f16": ("float16", 1, 1), "bf16": ("uint16", 1, 1)}
ROW |= {"q8_0": ("uint8", 34, 32), "q4_0": ("uint8", 18, 32)}
BLOCK = 16


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "smollm2-135m": Model(9, 3, 64),
    "qwen2.5-0.5b": Model(14, 2, 64),
    "gemma3-270m": Model(4, 1, 256),
    "llama3-8b": Model(32, 8, 128),
}


def spread(run: Callable[[], None], layers: int, seconds: float = 0.6) -> tuple[float, float, float]:
    """Seconds per layer: median, fastest, slowest."""
    times: list[float] = []
    run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 5:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) / layers)
    return statistics.median(times), min(times), max(times)


@dataclass(frozen=True)
class Call:
    run: Callable[[], None]  # of all layers
    layers: int
    layer_bytes: int  # of the cache
    layer_flop: int  # below the diagonal


def prepare(backend: CpuBackend, model: Model, kv_type: str, queries: int, context: int, sequences: int = 1) -> Call:
    """One call per layer, as many layers as keep the cache out of reach of the CPU's caches (128 MiB) in decode."""
    dtype, numerator, denominator = ROW[kv_type]
    row, blocks = model.head_dim * numerator // denominator, -(-context // BLOCK) * sequences
    shape = (blocks, model.kv_heads, BLOCK, row)
    layer_bytes = 2 * int(np.prod(shape)) * np.dtype(dtype).itemsize
    layers = max(1, min(64, (128 << 20) // layer_bytes)) if queries == 1 else 1
    caches = []
    for _ in range(layers):
        pair = [backend.empty(shape, dtype) for _ in "kv"]
        for array in pair:
            array.view(np.uint8).fill(0)
        caches.append(KVLayer(pair[0], pair[1], kv_type, BLOCK))
    params = AttentionParams(
        model.heads, model.kv_heads, model.head_dim, model.head_dim**-0.5,
        rope=RopeParams((1e4 ** -(np.arange(model.head_dim // 2) * 2 / model.head_dim)).astype(np.float32)),
    )  # fmt: skip
    positions = np.tile(np.arange(context - queries, context, dtype=np.int32), sequences)
    starts = np.arange(sequences + 1, dtype=np.int32) * queries
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32).reshape(sequences, -1)
    owners = np.repeat(np.arange(sequences), queries)
    tables = KVTables(table, (table[owners, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32))
    batch = ForwardBatch(positions, positions, starts, np.full(sequences, context, np.int32), positions[:0])
    n = len(positions)
    q, k, v = (np.random.rand(n, h * model.head_dim).astype(np.float32) for h in (model.heads, *[model.kv_heads] * 2))
    out = np.empty_like(q)

    def run() -> None:
        for cache in caches:
            backend.attention(q, k, v, batch, params, cache, tables, out)

    pairs = sequences * (queries * (context - queries) + queries * (queries + 1) // 2)
    return Call(run, layers, layer_bytes, 4 * pairs * model.heads * model.head_dim)


def measure(backend: CpuBackend, model: Model, kv_type: str, queries: int, context: int, sequences: int = 1) -> Any:
    call = prepare(backend, model, kv_type, queries, context, sequences)
    median, fastest, slowest = spread(call.run, call.layers)
    return {
        "us": round(median * 1e6, 2),
        "us_range": [round(fastest * 1e6, 2), round(slowest * 1e6, 2)],
        "read_gb_s": round(call.layer_bytes / median / 1e9, 2),
        "gflop_s": round(call.layer_flop / median / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="f16", choices=sorted(ROW))
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backend = CpuBackend(Device("cpu", "cpu", 1 << 40), args.threads, args.isa)
    result: dict[str, Any] = {"kv": args.kv, "isa": _cpu.isa(), "threads": _cpu.threads(), "models": {}}
    for name in args.models:
        model, rows = MODELS[name], {}
        for context in (128, 2048, 8192):
            rows[f"decode at {context}"] = measure(backend, model, args.kv, 1, context)
        rows["decode of 8 at 1024"] = measure(backend, model, args.kv, 1, 1024, sequences=8)
        for queries in (512, 2048):
            rows[f"prefill {queries}"] = measure(backend, model, args.kv, queries, queries)
        result["models"][name] = rows
        print(name)
        for label, row in rows.items():
            print(f"  {label:20} {row['us']:10.1f} us  {row['read_gb_s']:6.1f} GB/s  {row['gflop_s']:6.1f} GFLOP/s")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

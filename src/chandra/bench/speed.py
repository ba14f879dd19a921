"""What a GPU does: its bandwidths, and models under caps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from chandra.backends.cuda.backend import CudaBackend
from chandra.bench.synthetic import Loaded
from chandra.config import SamplingParams
from chandra.lazy import torch

TOKENS = 48  # decoded for one figure; the first few only warm up
WARM = 8


def best(backend: CudaBackend, run: Callable[[], object], tries: int = 5) -> float:
    """Seconds of the fastest run, the device's work included."""
    times = []
    for _ in range(tries + 1):
        backend.accelerator.settle()
        start = time.perf_counter()
        run()
        backend.accelerator.settle()
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def rates(backend: CudaBackend, nbytes: int, width: int) -> dict[str, float]:
    """Measured bounds: bytes/s read and written by a copy on the device, bytes/s from the host, FLOP/s of a product."""
    one, two = backend.empty((nbytes,), "uint8"), backend.empty((nbytes,), "uint8")
    host = backend.host_buffer(nbytes)
    a = torch.randn(width, width, dtype=backend.accelerator.half, device=backend.accelerator.device)
    return {
        "copy": 2 * nbytes / best(backend, lambda: two.copy_(one)),
        "link": nbytes / best(backend, lambda: backend.fetch(host, one).done()),
        "matmul": 2 * width**3 / best(backend, lambda: a @ a),
        "context": backend.context_bytes(),
    }


def decode_rate(loaded: Loaded, batch: int, prompt: int, tokens: int = TOKENS) -> float:
    """Tokens/s of all sequences together, after prompts of so many tokens."""
    engine, rng = loaded.engine, np.random.default_rng(batch)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for _ in range(batch):
        engine.add(rng.integers(3, loaded.spec.vocab_size, prompt), params)
    counts, times = [0], [time.perf_counter()]
    while engine.has_work():
        news = sum(len(output.token_ids) for output in engine.step())
        counts.append(news)
        times.append(time.perf_counter())
    first = next(i for i, count in enumerate(counts) if count == batch)
    start = min(first + WARM, len(times) - 2)
    return sum(counts[start + 1 :]) / (times[-1] - times[start])


def greedy(loaded: Loaded, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    out: list[int] = []
    loaded.engine.add(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    while loaded.engine.has_work():
        for news in loaded.engine.step():
            out += news.token_ids
    return out


def prefill_seconds(loaded: Loaded, prompt: int) -> float:
    """Seconds until the first token of a prompt, at the best of three."""
    engine, rng, seconds = loaded.engine, np.random.default_rng(prompt), []
    for _ in range(3):
        start = time.perf_counter()
        engine.add(rng.integers(3, loaded.spec.vocab_size, prompt), SamplingParams(temperature=0, max_tokens=1))
        while engine.has_work():
            engine.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(
    loaded: Loaded, bounds: dict[str, float], batches: tuple[int, ...], prompts: tuple[int, ...]
) -> dict[str, Any]:
    """Rates of a model, and of the machine's bounds the share that it reaches; memory against the plan."""
    plan, spec = loaded.plan, loaded.spec
    values = sum(
        spec.hidden_size * (2 * (a.num_heads + a.num_kv_heads) * a.head_dim + 3 * x.mlp.intermediate_size)
        for x in spec.layers
        for a in (x.attention,)
    )
    read = sum(p.nbytes for p in (*plan.layers, plan.head)) + (plan.embedding.nbytes if spec.tied_embeddings else 0)
    out: dict[str, Any] = {"layers": Counter(part.placement for part in plan.layers)}
    for batch in batches:
        rate = decode_rate(loaded, batch, min(prompts), min(TOKENS, plan.workload.context - min(prompts)))
        reads = read * rate / batch
        out[f"decode {batch}"] = {"tokens/s": rate, "GB/s": reads / 1e9, "of copy": reads / bounds["copy"]}
    for prompt in prompts:
        seconds = prefill_seconds(loaded, prompt)
        share = 2 * values * prompt / seconds / bounds["matmul"]
        out[f"prefill {prompt}"] = {"tokens/s": prompt / seconds, "of matmul": share}
    out["memory"] = {
        g.device.name: {
            "cap": g.device.cap,
            "planned": plan.predicted(g.device.name),
            "kinds": {p.kind: p.nbytes for p in plan.predictions if p.device == g.device.name},
            "peak": g.arena.peak + g.context_bytes(),
            "allocator": g.accelerator.allocated_peak(),
        }
        for g in loaded.gpus
    }
    return out

"""What a GPU does: its bandwidths, and models under caps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from chandra.backends.cuda.backend import CudaBackend
from chandra.bench.synthetic import Loaded
from chandra.config import SamplingParams
from chandra.lazy import torch
from chandra.memory.ledger import Kind

TOKENS = 48  # decoded for one figure; the first few only warm up
WARM = 8
LONG = 6.0  # seconds after which a figure is good enough


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


class OutOfTime(Exception):
    """The script has to end."""


def check(until: float) -> None:
    """Raise OutOfTime if it is later than `until` of the monotonic clock."""
    if time.monotonic() > until:
        raise OutOfTime


def decode_rate(loaded: Loaded, batch: int, prompt: int, tokens: int, until: float) -> float:
    """Tokens/s of all sequences together, after prompts of so many tokens."""
    engine, rng = loaded.engine, np.random.default_rng(batch)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ids = [i for _ in range(batch) for i in engine.add(rng.integers(3, loaded.spec.vocab_size, prompt), params)]
    made: list[tuple[float, int]] = []  # of steps in which all of them decode: when it was over, tokens
    try:
        while engine.has_work():
            check(until)
            news = sum(len(output.token_ids) for output in engine.step())
            if news == batch:
                made.append((time.perf_counter(), news))
            if len(made) > 2 * WARM and made[-1][0] - made[0][0] > LONG:
                break
    finally:
        for seq_id in ids:
            engine.abort(seq_id)
    first = min(WARM, len(made) - 2)
    return sum(count for _, count in made[first + 1 :]) / (made[-1][0] - made[first][0])


def greedy(loaded: Loaded, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    out: list[int] = []
    loaded.engine.add(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    while loaded.engine.has_work():
        for news in loaded.engine.step():
            out += news.token_ids
    return out


def prefill_seconds(loaded: Loaded, prompt: int, until: float) -> float:
    """Seconds until the first token of a prompt, at the best of three, or of fewer that take long."""
    engine, rng, seconds = loaded.engine, np.random.default_rng(prompt), list[float]()
    while len(seconds) < 3 and sum(seconds) < LONG:
        start = time.perf_counter()
        ids = engine.add(rng.integers(3, loaded.spec.vocab_size, prompt), SamplingParams(temperature=0, max_tokens=1))
        try:
            while engine.has_work():
                check(until)
                engine.step()
        finally:
            engine.abort(ids[0])
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(
    loaded: Loaded, bounds: dict[str, float], batches: tuple[int, ...], prompts: tuple[int, ...], until: float
) -> dict[str, Any]:
    """Rates of a model, and of the machine's bounds the share that it reaches; memory against the plan. What there is
    no time for is left out."""
    plan, spec = loaded.plan, loaded.spec
    values = sum(
        spec.hidden_size * (2 * (a.num_heads + a.num_kv_heads) * a.head_dim + 3 * x.mlp.intermediate_size)
        for x in spec.layers
        for a in (x.attention,)
    )
    read = sum(p.nbytes for p in (*plan.layers, plan.head)) + (plan.embedding.nbytes if spec.tied_embeddings else 0)
    streamed = sum(p.nbytes for p in plan.layers if p.placement == "stream")
    out: dict[str, Any] = {"layers": Counter(part.placement for part in plan.layers)}
    with suppress(OutOfTime):
        for batch in batches:
            rate = decode_rate(loaded, batch, min(prompts), min(TOKENS, plan.workload.context - min(prompts)), until)
            steps = rate / batch
            shares = {"GB/s": read * steps / 1e9, "of copy": read * steps / bounds["copy"]}
            out[f"decode {batch}"] = {"tokens/s": rate, **shares, "of link": streamed * steps / bounds["link"]}
        for prompt in prompts:
            seconds = prefill_seconds(loaded, prompt, until)
            share = 2 * values * prompt / seconds / bounds["matmul"]
            out[f"prefill {prompt}"] = {"tokens/s": prompt / seconds, "of matmul": share}
    out["memory"] = memory(loaded)
    return out


def memory(loaded: Loaded) -> dict[str, Any]:
    """Bytes of each GPU at the highest, against its cap and the plan."""
    plan, ledger = loaded.plan, loaded.ledger
    rows = {(row.device, row.kind): row.peak for row in ledger.rows()}
    return {
        g.device.name: {
            "cap": g.device.cap,
            "planned": plan.predicted(g.device.name),
            "kinds": {p.kind: p.nbytes for p in plan.predictions if p.device == g.device.name},
            "peak": g.arena.peak + g.recorded_bytes() + rows.get((g.device.name, Kind.RUNTIME), 0),
            "allocator": g.accelerator.allocated_peak(),
        }
        for g in loaded.gpus
    }

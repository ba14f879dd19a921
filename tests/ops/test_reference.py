"""The reference backend against naive formulas written another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from chandra.ops.contracts import (
    AttentionParams,
    Experts,
    ForwardBatch,
    KVLayer,
    KVTables,
    Linear,
    Norm,
    RopeParams,
    Weight,
)
from chandra.ops.reference import ReferenceBackend
from chandra.quant import PackedWeight, formats, get_format

BACKEND = ReferenceBackend()
RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def weight(values: np.ndarray, form: str = "F32") -> Weight:
    return BACKEND.load_weight(PackedWeight.pack(get_format(form), torch.from_numpy(values)))


def close(actual: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance, rtol=tolerance)


def rms(x: np.ndarray, scale: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * scale


@pytest.mark.parametrize("form", [f.name for f in formats()])
def test_products_with_every_format(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chandra.ops.reference.TILE", 3 * 256)
    loaded = weight(array(10, 256), form)
    x, bias, out = array(5, 256), array(10), np.empty((5, 10), np.float32)
    BACKEND.norm_linear(x, None, (Linear(loaded, bias),), (out,))
    close(out, x @ loaded.format.unpack(loaded.handle, loaded.shape).numpy().T + bias, 1e-4)
    rows = np.empty((3, 256), np.float32)
    BACKEND.embed(tokens([4, 0, 9]), loaded, 2.0, rows)
    close(rows, 2 * loaded.format.unpack(loaded.handle, loaded.shape).numpy()[[4, 0, 9]])


def tokens(ids: list[int]) -> ForwardBatch:
    ints = np.array(ids, np.int32)
    return ForwardBatch(ints, ints, ints[:0], ints[:0], ints[:0])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: Any) -> None:
    x, scale, bias, identity = array(3, 8), array(8), array(8), np.eye(8, dtype=np.float32)
    out = np.empty_like(x)
    BACKEND.norm_linear(x, Norm(scale, 1e-6, kind, bias), (Linear(weight(identity)),), (out,))
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    close(out, rms(centred, scale) + bias)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_and_plain_mlps(name: Any) -> None:
    x, gate, up, scale = array(4, 8), array(6, 8), array(6, 8), array(8)
    y, out = rms(x, scale), np.empty((4, 6), np.float32)
    activated = np.vectorize(ACTIVATIONS[name])
    BACKEND.gate_up(x, Norm(scale, 1e-6), Linear(weight(gate)), Linear(weight(up)), name, out)
    close(out, activated(y @ gate.T) * (y @ up.T))
    BACKEND.gate_up(x, Norm(scale, 1e-6), None, Linear(weight(up)), name, out)
    close(out, activated(y @ up.T))


def test_results_are_added_to_the_residual() -> None:
    x, w, scale, residual = array(4, 8), array(6, 8), array(6), array(4, 6)
    before = residual.copy()
    BACKEND.linear_add(x, Linear(weight(w)), Norm(scale, 1e-6), residual)
    close(residual, before + rms(x @ w.T, scale))


@pytest.mark.parametrize("normalize", [True, False])
def test_experts(normalize: bool) -> None:
    x, router, gate, up, down = array(7, 8), array(5, 8), array(5, 6, 8), array(5, 6, 8), array(5, 8, 6)
    experts = Experts(Linear(weight(router)), weight(gate), weight(up), weight(down), 2, normalize)
    expected = x.astype(np.float64)
    for row, y in enumerate(x):
        scores = np.exp(router @ y)
        best = np.argsort(-scores)[:2]
        total = scores[best].sum() if normalize else scores.sum()
        for e in best:
            g = gate[e] @ y
            expected[row] += scores[e] / total * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ y)))
    BACKEND.moe_add(x, None, experts, None, x)  # the residual itself is the input
    close(x, expected, 1e-4)


def test_logits() -> None:
    x, w, scale, out = array(6, 8), array(10, 8), array(8), np.empty((2, 10), np.float32)
    rows = np.array([5, 1], np.int32)
    BACKEND.logits(x, rows, Norm(scale, 1e-6), Linear(weight(w)), 0.5, 3.0, out)
    close(out, 3 * np.tanh(rms(x[rows], scale) @ w.T * 0.5 / 3))


def test_torch_tensors_are_taken_too() -> None:
    x, w, out = torch.randn(3, 8), array(4, 8), torch.empty(3, 4)
    BACKEND.norm_linear(x, None, (Linear(weight(w)),), (out,))
    close(out.numpy(), x.numpy() @ w.T)


def turned(x: np.ndarray, position: int, rope: RopeParams) -> np.ndarray:
    """One head, rotated pair by pair."""
    out, pairs = x.astype(np.float64), len(rope.inv_freq)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + pairs)
        angle = position * float(rope.inv_freq[i])
        cos, sin = math.cos(angle) * rope.scale, math.sin(angle) * rope.scale
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(interleaved: bool, window: int | None, softcap: float | None) -> None:
    heads, kv_heads, d, size, lengths = 4, 2, 8, 4, (7, 3)
    rope = RopeParams(array(3) ** 2, 0.9, interleaved)  # the last two values pass unchanged
    norms = Norm(array(d), 1e-6), Norm(array(d), 1e-6)
    params = AttentionParams(heads, kv_heads, d, 0.3, window, softcap, rope, *norms)
    n = sum(lengths)
    q, k, v = array(n, heads * d), array(n, kv_heads * d), array(n, kv_heads * d)
    expected, start = np.empty((n, heads * d)), 0
    for length in lengths:
        for i in range(length):
            for h in range(heads):
                query = turned(rms(q[start + i].reshape(heads, d)[h], norms[0].weight), i, rope)
                seen = range(0 if window is None else max(0, i - window + 1), i + 1)
                keys = [turned(rms(k[start + j].reshape(-1, d)[h // 2], norms[1].weight), j, rope) for j in seen]
                scores = np.array([0.3 * query @ key for key in keys])
                scores = np.exp(scores if softcap is None else softcap * np.tanh(scores / softcap))
                mixed = sum(s * v[start + j].reshape(-1, d)[h // 2] for s, j in zip(scores, seen, strict=True))
                expected[start + i, h * d : (h + 1) * d] = mixed / scores.sum()
        start += length
    table = np.array([[3, 0], [2, -1]], np.int32)
    cache = KVLayer(
        np.zeros((4, kv_heads, size, d), np.float32), np.zeros((4, kv_heads, size, d), np.float32), "f32", size
    )
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    owners = np.repeat([0, 1], lengths)
    slots = (table[owners, positions // size] * size + positions % size).astype(np.int32)
    whole = np.empty((n, heads * d), np.float32)
    ids = np.zeros(n, np.int32)
    starts, contexts = np.array([0, 7, 10], np.int32), np.array(lengths, np.int32)
    batch = ForwardBatch(ids, positions, starts, contexts, ids[:0])
    BACKEND.attention(q.copy(), k.copy(), v.copy(), batch, params, cache, KVTables(table, slots), whole)
    close(whole, expected)
    if window:  # a decode step does not look at blocks before its window
        released = np.array([[-1, 0]], np.int32)
        last = ForwardBatch(ids[:1], positions[6:7], starts[:2] // 7, contexts[:1], ids[:0])
        one = np.empty((1, heads * d), np.float32)
        BACKEND.attention(q[6:7], k[6:7], v[6:7], last, params, cache, KVTables(released, slots[6:7]), one)
        close(one, expected[6:7])

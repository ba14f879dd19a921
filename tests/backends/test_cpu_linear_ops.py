"""The ops around the C++ products against plain float64 formulas, and their independence of the batch."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from chandra.ops.contracts import Activation, Experts, Linear, Norm, Weight
from chandra.quant import get_format

_cpu = pytest.importorskip("chandra.backends.cpu._cpu")

F32 = np.ndarray[Any, np.dtype[np.float32]]
F64 = np.ndarray[Any, np.dtype[np.float64]]
SEED = secrets.randbits(32)
RELATIVE = {"F32": 2e-6, "Q8_0": 0.05, "Q4_1": 0.05}  # to the largest output; int8 activations cost 1 to 2 %


@pytest.fixture(params=[isa for isa in ("portable", "avx2", "avx512") if isa <= _cpu.best_isa() or isa == "portable"])
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    _cpu.set_isa(request.param)
    yield
    _cpu.set_isa("auto")


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def make(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Weight, F64]:
    fmt = get_format(name)
    parts = fmt.pack(torch.from_numpy(rng.standard_normal(shape, np.float32) / math.sqrt(shape[-1])))
    handle = _cpu.Weight(name, shape, {part: value.numpy() for part, value in parts.items()})
    return Weight(fmt, shape, handle.nbytes, handle), fmt.unpack(parts, shape).double().numpy()


def make_norm(width: int, kind: str, rng: np.random.Generator) -> Norm:
    bias = rng.standard_normal(width, np.float32) if kind == "layer" else None
    return Norm(rng.uniform(0.5, 2, width).astype(np.float32), 1e-5, "layer" if kind == "layer" else "rms", bias)


def normed(x: F32, norm: Norm | None) -> F64:
    y = x.astype(np.float64)
    if norm is None:
        return y
    if norm.kind == "layer":
        y = y - y.mean(1, keepdims=True)
    y = y / np.sqrt((y * y).mean(1, keepdims=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


def activated(x: F64, kind: Activation) -> F64:
    formulas: dict[str, Callable[[F64], F64]] = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: np.maximum(x, 0),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }
    return formulas[kind](x)


def check(out: F32, expected: F64, name: str) -> None:
    assert np.abs(out - expected).max() <= RELATIVE[name] * np.abs(expected).max()


def batches(n: int) -> list[tuple[int, int]]:
    return [(0, 1), (n - 1, n), (1, 4), (2, n)]


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("kind", ["rms", "layer", None])
@pytest.mark.parametrize("name", RELATIVE)
def test_norm_linear(name: str, kind: str | None, rng: np.random.Generator) -> None:
    norm = kind and make_norm(96, kind, rng)
    weights = [make(name, (rows, 96), rng) for rows in (48, 7, 16)] + [make("F32", (5, 96), rng)]
    biases = [None, rng.standard_normal(7, np.float32), None, rng.standard_normal(5, np.float32)]
    linears = tuple(Linear(weight, bias) for (weight, _), bias in zip(weights, biases, strict=True))
    for n in (1, 6, 19):
        x = rng.standard_normal((n, 96), np.float32) * 3 + 1
        outs = tuple(np.empty((n, linear.weight.shape[0]), np.float32) for linear in linears)
        _cpu.norm_linear(x, norm, linears, outs)
        for out, (_, exact), linear in zip(outs, weights, linears, strict=True):
            bias = 0 if linear.bias is None else linear.bias
            check(out, normed(x, norm or None) @ exact.T + bias, linear.weight.format.name)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gate_up(activation: Activation, rng: np.random.Generator) -> None:
    norm = make_norm(64, "rms", rng)
    for name, gated in itertools.product(RELATIVE, (True, False)):
        (gate, gate_exact), (up, up_exact) = make(name, (37, 64), rng), make(name, (37, 64), rng)
        bias = rng.standard_normal(37, np.float32)
        for n in (1, 11):
            x = rng.standard_normal((n, 64), np.float32)
            out = np.empty((n, 37), np.float32)
            _cpu.gate_up(x, norm, Linear(gate) if gated else None, Linear(up, bias), activation, out)
            y = normed(x, norm)
            up_out = y @ up_exact.T + bias
            expected = activated(y @ gate_exact.T, activation) * up_out if gated else activated(up_out, activation)
            check(out, expected, name)


@pytest.mark.usefixtures("_isa")
def test_activations_are_exact_over_the_whole_range(rng: np.random.Generator) -> None:
    x = np.concatenate((np.linspace(-100, 100, 4001), rng.standard_normal(1000) * 3))[:, None].astype(np.float32)
    weight, _ = make("F32", (1, 1), rng)
    one = _cpu.Weight("F32", (1, 1), {"data": np.ones((1, 1), np.float32).view(np.uint8)})
    linear = Linear(Weight(weight.format, (1, 1), one.nbytes, one))
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid"):
        out = np.empty_like(x)
        _cpu.gate_up(x, None, None, linear, activation, out)
        np.testing.assert_allclose(out, activated(x.astype(np.float64), activation), rtol=3e-6, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("kind", ["rms", "layer", None])
def test_linear_add(kind: str | None, rng: np.random.Generator) -> None:
    post_norm = kind and make_norm(37, kind, rng)
    for name in RELATIVE:
        weight, exact = make(name, (37, 96), rng)
        bias = rng.standard_normal(37, np.float32)
        for n in (1, 11):
            x, residual = rng.standard_normal((n, 96), np.float32), rng.standard_normal((n, 37), np.float32)
            y = (x.astype(np.float64) @ exact.T + bias).astype(np.float32)
            expected = residual + normed(y, post_norm or None)
            _cpu.linear_add(x, Linear(weight, bias), post_norm, residual)
            check(residual, expected, name)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits(softcap: float | None, rng: np.random.Generator) -> None:
    norm = make_norm(64, "rms", rng)
    x = rng.standard_normal((9, 64), np.float32)
    rows = np.array([8, 0, 3], np.int32)
    for name in RELATIVE:
        head, exact = make(name, (101, 64), rng)
        out = np.empty((3, 101), np.float32)
        _cpu.logits(x, rows, norm, Linear(head), 2.0, softcap, out)
        expected = normed(x[rows], norm) @ exact.T * 2
        check(out, expected if softcap is None else np.tanh(expected / softcap) * softcap, name)
    with pytest.raises(IndexError):
        _cpu.logits(x, np.array([9], np.int32), norm, Linear(head), 1.0, None, out[:1])


def make_experts(name: str, normalize: bool, rng: np.random.Generator) -> tuple[Experts, list[F64]]:
    made = [
        make("F32", (5, 64), rng),
        make(name, (5, 96, 64), rng),
        make(name, (5, 96, 64), rng),
        make(name, (5, 64, 96), rng),
    ]
    router, gate, up, down = (weight for weight, _ in made)
    bias = rng.standard_normal(5, np.float32)
    return Experts(Linear(router, bias), gate, up, down, 2, normalize), [exact for _, exact in made]


def moe(y: F64, experts: Experts, exact: list[F64]) -> F64:
    router, gate, up, down = exact
    out = np.zeros_like(y)
    for row, logits in zip(range(len(y)), y @ router.T + experts.router.bias, strict=True):
        chosen = np.argsort(-logits)[: experts.top_k]
        shares = np.exp(logits - logits.max())
        shares /= shares[chosen].sum() if experts.normalize else shares.sum()
        for e in chosen:
            out[row] += shares[e] * (down[e] @ (activated(gate[e] @ y[row], "silu") * (up[e] @ y[row])))
    return out


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("post", [True, False])
def test_moe_add(normalize: bool, post: bool, rng: np.random.Generator) -> None:
    norm, post_norm = make_norm(64, "rms", rng), make_norm(64, "rms", rng) if post else None
    for name in RELATIVE:
        experts, exact = make_experts(name, normalize, rng)
        for n in (1, 3, 40):
            x, residual = rng.standard_normal((n, 64), np.float32), np.zeros((n, 64), np.float32)
            _cpu.moe_add(x, norm, experts, post_norm, residual)
            expected = moe(normed(x, norm), experts, exact)
            check(residual, normed(expected.astype(np.float32), post_norm), name)


@pytest.mark.usefixtures("_isa")
def test_ops_do_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    n = 23
    x = rng.standard_normal((n, 64), np.float32)
    norm, post_norm = make_norm(64, "rms", rng), make_norm(64, "layer", rng)
    experts, _ = make_experts("Q4_1", True, rng)
    (gate, _), (up, _), (square, _) = (
        make("Q4_1", (37, 64), rng),
        make("F32", (37, 64), rng),
        make("Q8_0", (64, 64), rng),
    )

    def run(x: F32) -> list[F32]:
        h = np.empty((len(x), 37), np.float32)
        added, mixed, head = x.copy(), x.copy(), np.empty_like(x)
        _cpu.gate_up(x, norm, Linear(gate), Linear(up), "silu", h)
        _cpu.linear_add(x, Linear(square), post_norm, added)
        _cpu.moe_add(x, norm, experts, post_norm, mixed)
        _cpu.logits(x, np.arange(len(x), dtype=np.int32), norm, Linear(square), 1.0, 30.0, head)
        return [h, added, mixed, head]

    threads = _cpu.threads()
    try:
        for count in (1, 3):
            _cpu.set_threads(count)
            whole = run(x)
            for start, end in batches(n):
                for part, all_rows in zip(run(np.ascontiguousarray(x[start:end])), whole, strict=True):
                    assert np.array_equal(part, all_rows[start:end])
    finally:
        _cpu.set_threads(threads)


def test_scratch_covers_the_buffers() -> None:
    assert _cpu.linear_scratch_bytes(8, 64, 64, False) >= 8 * (64 * 4 + 64 * 2)
    assert _cpu.linear_scratch_bytes(8, 64, 64, True) >= 8 * (64 * 4 + 64 * 2 + 64 * 4)
    assert _cpu.moe_scratch_bytes(80, 64, 96, 5, 2) > _cpu.linear_scratch_bytes(80, 64, 64, True)

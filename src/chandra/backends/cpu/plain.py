"""The linear ops in plain numpy, until the C++ kernels take over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chandra.ops.contracts import Activation, Experts, ForwardBatch, IntArray, Linear, Norm, Weight
from chandra.quant.base import PackedWeight

F32 = Any


def load(weight: PackedWeight) -> Weight:
    return Weight(weight.format, weight.shape, weight.nbytes, weight.unpack().numpy())


def norm(x: F32, norm: Norm | None) -> F32:
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(norm.eps)) * norm.weight
    return y if norm.bias is None else y + norm.bias


def linear(x: F32, layer: Linear) -> F32:
    y = x @ layer.weight.handle.T
    return y if layer.bias is None else y + layer.bias


def activate(x: F32, activation: Activation) -> F32:
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "gelu":
        return (x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2).astype(np.float32)
    if activation == "gelu_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if activation == "relu":
        return np.maximum(x, 0)
    return 1 / (1 + np.exp(-x))


def embed(batch: ForwardBatch, table: Weight, scale: float, out: F32) -> None:
    out[:] = table.handle[batch.token_ids] * np.float32(scale)


def norm_linear(x: F32, norm_: Norm | None, linears: tuple[Linear, ...], outs: tuple[F32, ...]) -> None:
    y = norm(x, norm_)
    for layer, out in zip(linears, outs, strict=True):
        out[:] = linear(y, layer)


def gate_up(x: F32, norm_: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: F32) -> None:
    y = norm(x, norm_)
    if gate is None:
        out[:] = activate(linear(y, up), activation)
    else:
        out[:] = activate(linear(y, gate), activation) * linear(y, up)


def linear_add(x: F32, layer: Linear, post_norm: Norm | None, residual: F32) -> None:
    residual += norm(linear(x, layer), post_norm)


def moe_add(x: F32, norm_: Norm | None, experts: Experts, post_norm: Norm | None, residual: F32) -> None:
    y = norm(x, norm_)
    router = linear(y, experts.router)
    chosen = np.argsort(-router, axis=-1, kind="stable")[:, : experts.top_k]
    logits = np.take_along_axis(router, chosen, -1) if experts.normalize else router
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if not experts.normalize:
        weights = np.take_along_axis(weights, chosen, -1)
    total = np.zeros_like(residual)
    for row in range(len(x)):
        for expert, weight in zip(chosen[row], weights[row], strict=True):
            gated = activate(experts.gate.handle[expert] @ y[row], experts.activation)
            total[row] += weight * (experts.down.handle[expert] @ (gated * (experts.up.handle[expert] @ y[row])))
    residual += norm(total, post_norm)


def logits(x: F32, rows: IntArray, norm_: Norm, head: Linear, scale: float, softcap: float | None, out: F32) -> None:
    y = linear(norm(x[rows], norm_), head) * np.float32(scale)
    out[:] = y if softcap is None else np.tanh(y / softcap) * softcap

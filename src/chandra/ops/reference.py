"""The reference backend: every op in plain torch, the oracle that fast kernels are tested against.

Sums are carried in float64 and rounded once, so a result is exact to float32 and does not depend on the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chandra.lazy import torch
from chandra.memory.device import Device
from chandra.memory.host import CACHE_LINE, aligned_bytes
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
    Backend,
    Experts,
    ForwardBatch,
    HostBytes,
    IntArray,
    KVLayer,
    KVTables,
    Linear,
    Norm,
    RopeParams,
    Weight,
)
from chandra.quant import Format, PackedWeight, get_format
from chandra.quant.base import Part, spans

TILE = 1 << 20  # weight values unpacked at once


def tensor(array: Array) -> torch.Tensor:
    """A torch view of a host array; torch tensors pass. uint16 becomes int16, which torch can index."""
    view: torch.Tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    return view.view(torch.int16) if view.dtype == torch.uint16 else view


class ReferenceBackend(Backend):
    """Host arrays are numpy; the ops take torch tensors (of one torch device) as well."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or Device("cpu", "cpu", 1 << 60)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dtype)

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        return host

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:  # noqa: ARG002 (all the same here)
        return Weight(weight.format, weight.shape, weight.nbytes, weight.tensors())

    def weight_nbytes(self, format: Format, shape: tuple[int, ...]) -> int:
        return sum(_whole_lines(part) for part in format.parts(shape))

    def pack_weight(self, weight: PackedWeight, out: HostBytes) -> None:
        for name, part in _parts_in(weight.format, weight.shape, out).items():
            part[...] = weight.parts[name]

    def bind_weight(self, format: Format, shape: tuple[int, ...], memory: Array) -> Weight:
        return self.load_weight(PackedWeight(format, shape, _parts_in(format, shape, memory)))

    def host_buffer(self, nbytes: int) -> HostBytes:
        return aligned_bytes(nbytes)

    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        for row, token in enumerate(batch.token_ids.tolist()):
            tensor(out)[row] = unpack(table, token, token + 1)[0] * scale

    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        y = normed(tensor(x).double(), norm)
        for linear, out in zip(linears, outs, strict=True):
            tensor(out).copy_(applied(y, linear))

    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        y = normed(tensor(x).double(), norm)
        if gate is None:
            tensor(out).copy_(activated(applied(y, up), activation))
        else:
            tensor(out).copy_(activated(applied(y, gate), activation) * applied(y, up))

    def linear_add(self, x: Array, linear: Linear, post_norm: Norm | None, residual: Array) -> None:
        tensor(residual).add_(normed(applied(tensor(x).double(), linear), post_norm))

    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        y = normed(tensor(x).double(), norm)
        router_logits = applied(y, experts.router)
        chosen = router_logits.topk(experts.top_k, dim=1)
        probabilities = (
            chosen.values.softmax(1) if experts.normalize else router_logits.softmax(1).gather(1, chosen.indices)
        )
        out = torch.zeros_like(y)
        for expert in sorted(set(chosen.indices.flatten().tolist())):
            rows, slots = torch.nonzero(chosen.indices == expert, as_tuple=True)
            gated = activated(matmul(y[rows], experts.gate, expert), experts.activation)
            hidden = gated * matmul(y[rows], experts.up, expert)
            out[rows] += matmul(hidden, experts.down, expert) * probabilities[rows, slots, None]
        tensor(residual).add_(normed(out, post_norm))

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        batch: ForwardBatch,
        params: AttentionParams,
        cache: KVLayer,
        tables: KVTables,
        out: Array,
    ) -> None:
        queries, keys, values = (
            tensor(x).double().reshape(len(x), -1, params.head_dim) for x in (q, k, v)
        )  # (n, heads, head_dim)
        queries, keys = normed(queries, params.q_norm), normed(keys, params.k_norm)
        if params.rope is not None:
            queries, keys = (rotated(x, batch.positions, params.rope) for x in (queries, keys))
        slots = torch.from_numpy(tables.slots.astype(np.int64))
        block, offset = slots // cache.block_size, slots % cache.block_size
        tensor(cache.k)[block, :, offset] = packed_rows(keys.float(), cache.kv_type)
        tensor(cache.v)[block, :, offset] = packed_rows(values.float(), cache.kv_type)
        for sequence, (start, stop) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
            context = int(batch.context_lens[sequence])
            rows = slice(int(start), int(stop))
            positions = torch.from_numpy(batch.positions[rows].astype(np.int64))
            attended = attend(queries[rows], positions, cache, tables.block_table[sequence], context, params)
            tensor(out)[rows] = attended.reshape(len(positions), -1).to(tensor(out).dtype)

    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        y = normed(tensor(x)[torch.from_numpy(rows.astype(np.int64))].double(), norm)
        scores = applied(y, head) * scale
        tensor(out).copy_(scores if softcap is None else softcap * torch.tanh(scores / softcap))


def _whole_lines(part: Part) -> int:
    return -(-part.nbytes // CACHE_LINE) * CACHE_LINE


def _parts_in(form: Format, shape: tuple[int, ...], memory: HostBytes) -> dict[str, np.ndarray[Any, Any]]:
    """The stored parts of a weight as views of memory, one after another."""
    parts, start = {}, 0
    for part in form.parts(shape):
        parts[part.name] = memory[start : start + part.nbytes].view(part.dtype).reshape(part.shape)
        start += _whole_lines(part)
    return parts


def unpack(weight: Weight, start: int, stop: int) -> torch.Tensor:
    """Rows of a weight as float32, counted through the experts."""
    return weight.format.unpack_rows(weight.handle, weight.shape, start, stop)


def matmul(x: torch.Tensor, weight: Weight, expert: int = 0) -> torch.Tensor:
    """`x @ weight.T` (or of one expert's weight) in float64, a tile of rows at a time."""
    rows, columns = weight.shape[-2:]
    first = expert * rows
    out = x.new_empty((len(x), rows))
    for start, stop in spans(rows, TILE // columns):
        out[:, start:stop] = x @ unpack(weight, first + start, first + stop).double().T
    return out


def applied(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    out = matmul(x, linear.weight)
    return out if linear.bias is None else out + tensor(linear.bias)


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """RMS norm (https://arxiv.org/abs/1910.07467) or layer norm over the last dimension."""
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * tensor(norm.weight)
    return y if norm.bias is None else y + tensor(norm.bias)


def activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "silu":
            return torch.nn.functional.silu(x)
        case "gelu":
            return torch.nn.functional.gelu(x)
        case "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        case "relu":
            return x.relu()
        case "sigmoid":
            return x.sigmoid()


def rotated(x: torch.Tensor, positions: IntArray, rope: RopeParams) -> torch.Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of `(n, heads, head_dim)`."""
    inv_freq = tensor(rope.inv_freq).double()
    angles = torch.from_numpy(positions.astype(np.float64)).to(inv_freq.device)[:, None] * inv_freq
    cos, sin = (angles.cos() * rope.scale)[:, None], (angles.sin() * rope.scale)[:, None]
    pairs = len(inv_freq)
    if rope.interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def attend(
    queries: torch.Tensor,
    positions: torch.Tensor,
    cache: KVLayer,
    block_table: IntArray,
    context: int,
    params: AttentionParams,
) -> torch.Tensor:
    """Causal attention of one sequence's queries `(n, H, d)` over its cached tokens."""
    first = 0 if params.window is None else max(0, int(positions.min()) - params.window + 1)
    cached = torch.arange(first, context)
    blocks = torch.from_numpy(block_table.astype(np.int64))[cached // cache.block_size]
    offsets = cached % cache.block_size
    group = params.num_heads // params.num_kv_heads
    keys, values = (
        unpacked_rows(tensor(side)[blocks, :, offsets], cache.kv_type, params.head_dim)
        .double()
        .repeat_interleave(group, 1)
        for side in (cache.k, cache.v)
    )  # (tokens, H, d)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    distance = positions[:, None] - cached
    visible = distance >= 0
    if params.window is not None:
        visible &= distance < params.window
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values)


def packed_rows(rows: torch.Tensor, kv_type: str) -> torch.Tensor:
    """float32 `(…, head_dim)` as `KVLayer` stores them."""
    data = get_format(kv_type).pack(rows)["data"]
    return data.view(cache_dtype(kv_type))


def unpacked_rows(rows: torch.Tensor, kv_type: str, head_dim: int) -> torch.Tensor:
    """The float32 values of rows of a `KVLayer`."""
    data = rows.contiguous().view(torch.uint8)
    return get_format(kv_type).unpack({"data": data}, (*rows.shape[:-1], head_dim))


def cache_dtype(kv_type: str) -> torch.dtype:
    """The dtype of a `KVLayer` array as torch sees it."""
    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.int16}.get(kv_type, torch.uint8)

"""Row-wise ops of the CUDA backend: norms, rope with the write to the KV cache, logits. All arrays are contiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chandra.backends.cuda import fused_kernels as kernels
from chandra.backends.cuda.launch import launch
from chandra.lazy import torch
from chandra.ops.contracts import AttentionParams, KVLayer, Norm

if TYPE_CHECKING:
    from torch import Tensor

HEADS = 8  # of one program of rope_write
LOGITS = 2048  # of one program


def padded(size: int) -> int:
    """The power of two from `size` on."""
    return 1 << (size - 1).bit_length()


def norm(x: Tensor, norm: Norm | None, out: Tensor, rows: Tensor | None = None, add: bool = False) -> None:
    """out `(n, w)` of any float dtype (+)= norm(x), x float32 `(n, w)`; or norm(x[rows]), rows int32 `(n,)`. Without a
    norm only the dtype changes."""
    count, width = out.shape
    weight, bias, eps, layer = _norm_arguments(norm)
    warps = 4 if width <= 2048 else 8 if width <= 8192 else 16
    arguments = x, rows, weight, bias, out, width, eps, layer, add, padded(width)
    launch(kernels.norm_rows, count)(*arguments, num_warps=warps)


def logits_finish(out: Tensor, scale: float, softcap: float | None) -> None:
    """out float32 = out * scale, then softcap * tanh(out / softcap), in place."""
    if scale == 1.0 and softcap is None:
        return
    count = out.numel()
    launch(kernels.finish_logits, -(-count // LOGITS))(out, count, scale, softcap, LOGITS)


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    params: AttentionParams,
    cache: KVLayer,
    slots: Tensor,
    q_out: Tensor,
) -> None:
    """Head norms and rope on q `(n, H*d)` and k `(n, K*d)` float32; q goes to q_out `(n, H*d)`, k and v to the cache.

    positions and slots are int32 `(n,)` on the device; a row whose slot is negative writes nothing to the cache. The
    values in the cache are those of the formats of `quant`, bit by bit.
    """
    heads = min(HEADS, padded(params.num_heads))
    tiles = -(-params.num_heads // heads) + 2 * -(-params.num_kv_heads // heads)
    rope = params.rope
    q_weight, q_bias, q_eps, q_layer = _norm_arguments(params.q_norm)
    k_weight, k_bias, k_eps, k_layer = _norm_arguments(params.k_norm)
    inv_freq, rope_scale, pairs = (None, 1.0, 0) if rope is None else (rope.inv_freq, rope.scale, len(rope.inv_freq))
    arrays = (q, k, v, positions, slots, inv_freq, q_weight, q_bias, k_weight, k_bias, q_out)
    shape = (params.num_heads, params.num_kv_heads, params.head_dim, padded(params.head_dim), pairs)
    launch(kernels.rope_write, len(q), tiles)(
        *arrays,
        cache_view(cache.k, cache.kv_type),
        cache_view(cache.v, cache.kv_type),
        *(rope_scale, q_eps, k_eps),
        *shape,
        rope is not None and rope.interleaved,
        *(q_layer, k_layer, cache.kv_type, cache.block_size, heads),
        enable_fp_fusion=False,  # a fused multiply-add would round some codes otherwise
    )


def cache_view(rows: Tensor, kv_type: str) -> Tensor:
    """A side of a KVLayer in the dtype that the kernels address: quantized blocks in words of 16 bits."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(kv_type, torch.int16)
    return rows.view(dtype)


def _norm_arguments(norm: Norm | None) -> tuple[Any, Any, float, bool]:
    """weight, bias, eps and whether it is a layer norm."""
    return (None, None, 0.0, False) if norm is None else (norm.weight, norm.bias, norm.eps, norm.kind == "layer")

"""Prints what attention and row kernels take on GPUs, as JSON: `aot_attention.py KV_TYPE:H/K/d:CAPABILITY …`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import aot
import torch

from chandra.backends.cuda import attention, fused, linear, sizes
from chandra.ops.contracts import AttentionParams, KVLayer, Norm, RopeParams
from chandra.ops.reference import packed_rows


def launch(params: AttentionParams, kv_type: str, rows: int = 32, sequences: int = 17) -> list[aot.Launch]:
    """Everything for a batch of one chunk and decodes."""
    heads, kv_heads, d = params.num_heads, params.num_kv_heads, params.head_dim
    side = packed_rows(torch.zeros(4, kv_heads, 16, d), kv_type)
    cache = KVLayer(side, side, kv_type, 16)

    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    x, out = torch.empty(rows, heads * d), torch.empty(rows, heads * d, dtype=torch.float16)
    q = torch.empty(rows, heads * d, dtype=attention.query_dtype(kv_type))
    k = torch.empty(rows, kv_heads * d)
    norm = Norm(torch.empty(heads * d), 1e-5)
    scratch = torch.empty(sizes.split_bytes(heads, d, sequences, 4096) // 4)
    extent = attention.Extent(sequences, 1, 16, 4096)
    with aot.launches() as recorded:
        fused.norm(x, norm, out)
        fused.norm(x, norm, x, add=True)
        fused.logits_finish(x, 0.5, 30.0)
        fused.rope_write(x, k, k, integers(rows), params, cache, integers(rows), q)
        tables = integers(sequences + 1), integers(sequences), integers(sequences, 64)
        attention.attention(q, *tables, params, cache, out, scratch, extent)
    return recorded


def main(configurations: list[str]) -> None:
    figures = []
    for configuration in configurations:
        kv_type, shape, target = configuration.split(":")
        heads, kv_heads, d = map(int, shape.split("/"))
        attention.chip_of = lambda _, target=target: linear.Chip(int(target), 100, 0)
        norm, rope = Norm(torch.empty(d), 1e-5), RopeParams(torch.empty(d // 2))
        everything = AttentionParams(heads, kv_heads, d, 0.1, 4096, 30.0, rope, norm, norm)
        recorded = launch(everything, kv_type) + launch(AttentionParams(heads, kv_heads, d, 0.1), kv_type, 17, 2)
        for one in recorded:
            figure = asdict(aot.compiled(one, int(target)))
            figures.append(figure | {"limit": aot.SHARED_LIMITS[int(target)] * 1024, "configuration": configuration})
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])

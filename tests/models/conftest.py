"""Small models, a plain KV cache, and the backends under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chandra.checkpoint.base import TensorInfo
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.models import Backends, Decoder, ModelSpec, load_decoder
from chandra.ops.contracts import Backend, ForwardBatch, KVLayer, KVTables
from chandra.ops.reference import ReferenceBackend
from chandra.quant import PackedWeight, get_format

CPU = Device("cpu", "cpu", 1 << 34)


@pytest.fixture(params=["reference"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return {"reference": ReferenceBackend}[request.param](CPU)


@dataclass
class MemoryCheckpoint:
    """A checkpoint held in memory."""

    kind: str
    metadata: Mapping[str, Any]
    weights: dict[str, PackedWeight]
    path: Path = Path("memory")
    released: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(n, w.shape, w.format.name, w.nbytes) for n, w in self.weights.items()}

    def read(self, name: str) -> PackedWeight:
        return self.weights[name]

    def release(self, name: str) -> None:
        self.released.append(name)

    def close(self) -> None:
        pass


class DenseKV:
    """Blocks of a few tokens, handed out in a shuffled order; every layer in one group."""

    def __init__(
        self, spec: ModelSpec, backend: Backend, sequences: int, tokens: int, kv_type: str = "f32", block_size: int = 4
    ) -> None:
        per_sequence = -(-tokens // block_size)
        order = np.random.default_rng(0).permutation(sequences * per_sequence).astype(np.int32)
        self.block_table = order.reshape(sequences, per_sequence)
        self.block_size = block_size
        self.layers = []
        for layer in spec.layers:
            a = layer.attention
            packed = get_format(kv_type).row_bytes(a.head_dim)  # type: ignore[attr-defined]
            dtype = {"f32": "float32", "f16": "float16", "bf16": "uint16"}.get(kv_type, "uint8")
            shape = (len(order), a.num_kv_heads, block_size, packed // np.dtype(dtype).itemsize)
            sides = []
            for _ in "kv":
                side = backend.empty(shape, dtype)
                side[...] = 0
                sides.append(side)
            self.layers.append(KVLayer(sides[0], sides[1], kv_type, block_size))
        self.current = KVTables(self.block_table, np.empty(0, np.int32))

    def layer(self, index: int) -> KVLayer:
        return self.layers[index]

    def tables(self, _index: int) -> KVTables:
        return self.current

    def batch(self, chunks: list[tuple[int, list[int], int]], all_logits: bool = True) -> ForwardBatch:
        """A batch of (sequence, its next tokens, position of the first)."""
        tokens = [t for _, new, _ in chunks for t in new]
        positions = [first + j for _, new, first in chunks for j in range(len(new))]
        starts = np.cumsum([0] + [len(new) for _, new, _ in chunks])
        rows = [
            self.block_table[s, p // self.block_size] * self.block_size + p % self.block_size
            for s, new, first in chunks
            for p in range(first, first + len(new))
        ]
        table = np.stack([self.block_table[s] for s, _, _ in chunks])
        self.current = KVTables(table, np.array(rows, np.int32))
        return ForwardBatch(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            starts.astype(np.int32),
            np.array([first + len(new) for _, new, first in chunks], np.int32),
            np.arange(len(tokens), dtype=np.int32) if all_logits else (starts[1:] - 1).astype(np.int32),
        )


def load(checkpoint: Any, spec: ModelSpec, backend: Backend, context: int = 64, **options: Any) -> Decoder:
    ledger = Ledger([backend.device])
    backends = Backends.all_on(backend, spec.num_layers)
    sizes = {"max_rows": 64, "max_logit_rows": 64, **options}
    return load_decoder(checkpoint, spec, backends, ledger, context_length=context, **sizes)

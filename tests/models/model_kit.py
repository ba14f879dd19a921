"""A plain KV cache, checkpoints in memory, and what else the model tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chandra.checkpoint.base import TensorInfo
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.models import Backends, Decoder, ModelSpec, load_decoder
from chandra.ops.contracts import Backend, ForwardBatch, KVLayer, KVTables
from chandra.quant import PackedWeight, get_format

CPU = Device("cpu", "cpu", 1 << 34)


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


def load(
    checkpoint: Any, spec: ModelSpec, backend: Backend, context: int = 64, ledger: Ledger | None = None, **options: Any
) -> Decoder:
    ledger = ledger or Ledger([backend.device])
    backends = Backends(backend, (backend,) * spec.num_layers, backend)
    sizes = {"max_rows": 64, "max_logit_rows": 64, **options}
    return load_decoder(checkpoint, spec, backends, ledger, context_length=context, **sizes)


def run_whole(decoder: Decoder, backend: Backend, sequences: list[list[int]], kv_type: str = "f32") -> np.ndarray:
    """Logits of all sequences' tokens, from one ragged prefill."""
    kv = DenseKV(decoder.spec, backend, len(sequences), max(map(len, sequences)), kv_type)
    return decoder.forward(kv.batch([(s, tokens, 0) for s, tokens in enumerate(sequences)]), kv).copy()


def run_stepwise(decoder: Decoder, backend: Backend, sequences: list[list[int]], kv_type: str = "f32") -> np.ndarray:
    """The same from chunks: most tokens of each sequence, then one by one, in one batch as long as they last."""
    kv = DenseKV(decoder.spec, backend, len(sequences), max(map(len, sequences)), kv_type)
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    first = 0
    while any(first < len(tokens) for tokens in sequences):
        size = 13 if first == 0 else 1
        chunks = [(s, tokens[first : first + size], first) for s, tokens in enumerate(sequences) if first < len(tokens)]
        out, row = decoder.forward(kv.batch(chunks), kv), 0
        for s, new, _ in chunks:
            logits[s].append(out[row : row + len(new)].copy())
            row += len(new)
        first += size
    return np.concatenate([np.concatenate(rows) for rows in logits])

"""Tiny random models on a backend of one's choice, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chandra.checkpoint.base import TensorInfo
from chandra.kvcache import KVPool, group_layers
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.memory.plan import Placement
from chandra.models import Backends, load_decoder, spec_from_config, tensor_table
from chandra.models.spec import ModelSpec
from chandra.ops.contracts import Backend, ForwardBatch, KVLayer, KVTables
from chandra.quant import PackedWeight, get_format

BLOCK, BLOCKS, CHUNK = 8, 8, 16
SHAPE = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0},
    "qwen2": {"model_type": "qwen2", "rope_theta": 10000.0, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 32,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 10000.0},
}


class RandomCheckpoint:
    """Weights of a format where it fits, large enough that the logits depend on the context."""

    kind = "hf"
    path = Path("memory")

    def __init__(self, spec: ModelSpec, config: dict[str, Any], form: str) -> None:
        import torch

        rng = np.random.default_rng(1)
        self.metadata = config
        self.weights: dict[str, PackedWeight] = {}
        for tensor in tensor_table(spec):
            scale = 0.3 if tensor.role == "norm" else 1.5 / np.sqrt(tensor.shape[-1])
            values = (rng.standard_normal(tensor.shape) * scale + (tensor.role == "norm")).astype(np.float32)
            name = form if tensor.packable and tensor.shape[-1] % 32 == 0 else "F32"
            for part, stored in _stored(tensor.name, values):
                self.weights[part] = PackedWeight.pack(get_format(name), torch.from_numpy(stored))

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, w.shape, w.format.name, w.nbytes) for n, w in self.weights.items()}

    def read(self, name: str) -> PackedWeight:
        return self.weights[name]

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        pass

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def _stored(name: str, values: np.ndarray[Any, Any]) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Names in the file: each expert has tensors of its own."""
    if ".experts." not in name:
        return [(name, values)]
    return [(name.replace(".experts.", f".experts.{e}."), expert) for e, expert in enumerate(values)]


class View:
    """Blocks of sequences in a row: sequence i owns blocks `i * BLOCKS` on."""

    def __init__(self, pool: KVPool, lens: Sequence[int], starts: Sequence[int]) -> None:
        self._pool = pool
        table = np.arange(len(lens) * BLOCKS, dtype=np.int32).reshape(len(lens), BLOCKS)
        ends = zip(lens, starts, strict=True)
        slots = [i * BLOCKS * BLOCK + start + j for i, (n, start) in enumerate(ends) for j in range(n)]
        self._tables = KVTables(table, np.array(slots, np.int32))

    def layer(self, index: int) -> KVLayer:
        return self._pool.layer(index)

    def tables(self, index: int) -> KVTables:  # noqa: ARG002
        return self._tables


class Model:
    def __init__(
        self, name: str, backends: Sequence[Backend], form: str = "Q8_0", kv_type: str = "f16", streamed: int = 0
    ) -> None:
        """Layers are dealt to the backends in turn; the first has the embedding, the last the head. The first
        `streamed` layers are copied for each use."""
        config = SHAPE | CONFIGS[name]
        self.spec = spec_from_config(config)
        count = self.spec.num_layers
        owners = [backends[i * len(backends) // count] for i in range(count)]
        names = [backend.device.name for backend in owners]
        devices = {b.device.name: b.device for b in backends}
        self.ledger = Ledger([*devices.values(), *([] if "cpu" in devices else [Device("cpu", "cpu", 1 << 30)])])
        placed: dict[str, Placement] = {f"layers.{i}": "stream" for i in range(streamed)}
        places = Backends(backends[0], tuple(owners), backends[-1], {}, placed)
        self.decoder = load_decoder(
            RandomCheckpoint(self.spec, config, form),
            self.spec,
            places,
            self.ledger,
            context_length=64,
            max_rows=CHUNK,
            max_logit_rows=4,
        )
        groups = group_layers([layer.attention for layer in self.spec.layers], names)
        by_name = {backend.device.name: backend for backend in backends}
        self.pool = KVPool(groups, [2 * BLOCKS] * len(groups), BLOCK, kv_type, by_name, self.ledger)

    def step(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits of the last token of each text, which goes on at its start."""
        lens = [len(text) for text in texts]
        query_start = np.cumsum([0, *lens]).astype(np.int32)
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lens, strict=True)]).astype(np.int32)
        batch = ForwardBatch(
            np.array([t for text in texts for t in text], np.int32),
            positions,
            query_start,
            np.add(starts, lens).astype(np.int32),
            (query_start[1:] - 1).astype(np.int32),
        )
        return self.decoder.forward(batch, View(self.pool, lens, starts)).copy()

    def talk(self, decodes: int = 3) -> np.ndarray[Any, Any]:
        """Logits of a ragged prefill of two texts, a chunk beside a decode, then decodes, of given tokens."""
        out = [self.step([[5, 9, 11, 3, 60, 2, 7], [8, 1, 4]], [0, 0])]
        out.append(self.step([[13, 14, 15], [6]], [7, 3]))
        out += [self.step([[20 + i], [30 + i]], [10 + i, 4 + i]) for i in range(decodes)]
        return np.stack(out)

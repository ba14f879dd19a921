"""Real decoders with random weights, small enough to run many sequences in a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.virtual.backend import VirtualBackend
from chandra.checkpoint.base import TensorInfo
from chandra.engine import Engine, EngineConfig
from chandra.kvcache import KVPool, SwapSpace, group_layers
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.models import Backends, Decoder, ModelSpec, load_decoder, spec_from_config, tensor_table
from chandra.ops.contracts import Backend
from chandra.ops.reference import ReferenceBackend
from chandra.quant import PackedWeight, get_format

VOCAB, SIZE = 131, 4
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_hidden_layers": 2},
    "gemma3": {
        "model_type": "gemma3_text",
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": 3,
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 32,
    },
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


class RandomCheckpoint:
    """Weights large enough that the logits depend on the context."""

    kind = "hf"
    path = Path("memory")

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any]) -> None:
        rng = np.random.default_rng(1)
        self.metadata = config
        self.weights: dict[str, PackedWeight] = {}
        for tensor in tensor_table(spec):
            scale = 0.3 if tensor.role == "norm" else 1.5 / np.sqrt(tensor.shape[-1])
            values = (rng.standard_normal(tensor.shape) * scale + (tensor.role == "norm")).astype(np.float32)
            self.weights[tensor.name] = PackedWeight(get_format("F32"), tensor.shape, {"data": values.view(np.uint8)})

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(n, w.shape, "F32", w.nbytes) for n, w in self.weights.items()}

    def read(self, name: str) -> PackedWeight:
        return self.weights[name]

    def release(self, name: str) -> None:
        pass

    def prefetch(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass


class Tiny:
    """A model on backends of one kind; `engine` gives it a cache and limits of one's choice.

    `layers`: 0 for as many as it takes to be one of its kind; they lie on `devices` in runs.
    """

    def __init__(self, name: str, backend: str, max_rows: int = 256, layers: int = 0, devices: int = 1) -> None:
        host = Device("cpu", "cpu", 1 << 30)
        others = [Device(f"virtual:{i}", "virtual", 1 << 30) for i in range(devices)]
        self.ledger = Ledger([*others, host])
        makers: dict[str, Callable[[], list[Backend]]] = {
            "cpu": lambda: [CpuBackend(host)],
            "reference": lambda: [ReferenceBackend(host)],
            "virtual": lambda: [VirtualBackend(device) for device in others],
        }
        made = makers[backend]()
        self.backend = made[0]
        self.backends = {"cpu": CpuBackend(host), **{each.device.name: each for each in made}}
        config = SHAPE | CONFIGS[name]
        config["num_hidden_layers"] = layers or config["num_hidden_layers"]
        self.spec = spec_from_config(config)
        self.places = [made[i * len(made) // self.spec.num_layers] for i in range(self.spec.num_layers)]
        self.decoder: Decoder = load_decoder(
            RandomCheckpoint(self.spec, config),
            self.spec,
            Backends(made[0], tuple(self.places), made[-1]),
            self.ledger,
            context_length=256,
            max_rows=max_rows,
            max_logit_rows=max_rows,
        )

    def engine(
        self,
        context: int = 64,
        seqs: int = 4,
        chunk: int = 16,
        blocks: int = 0,
        kv_type: str = "f32",
        slots: int = 0,
        **config: Any,
    ) -> Engine:
        """`blocks` of each layer group: 0 for as many as all sequences could need. `slots`: of swap space."""
        places = [backend.device.name for backend in self.places]
        groups = group_layers([layer.attention for layer in self.spec.layers], places)
        counts = [g.max_blocks(context, chunk, SIZE, seqs) for g in groups]
        if blocks:
            counts = [min(count, blocks) for count in counts]
        pool = KVPool(groups, counts, SIZE, kv_type, self.backends, self.ledger)
        swap = SwapSpace(pool, [slots] * len(groups), self.backends, self.ledger) if slots else None
        limits = EngineConfig(context, seqs, chunk, config.pop("rows", seqs), **config)
        return Engine(self.decoder, pool, limits, VOCAB, eos_ids=(0,), swap=swap)

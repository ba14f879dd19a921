"""Models with random weights and the shapes of real ones: what is measured needs no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends import make_backend
from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.backend import CudaBackend
from chandra.backends.cuda.sizes import Scratch
from chandra.checkpoint.base import TensorInfo
from chandra.engine import Engine, EngineConfig
from chandra.kvcache import KVPool, group_layers
from chandra.lazy import torch
from chandra.memory.device import Device
from chandra.memory.ledger import Kind, Ledger
from chandra.memory.plan import Plan
from chandra.models import Backends, ModelSpec, load_decoder, tensor_table
from chandra.ops.contracts import Array, Backend, Weight
from chandra.planner import Constraints, Machine, plan, plannable_config, tensor_formats
from chandra.planner.kernels import BuiltKernels, Limits
from chandra.quant import PackedWeight, get_format


def _config(
    arch: str, hidden: int, layers: int, heads: int, kv: int, ff: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        **{"model_type": arch, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv, "intermediate_size": ff, "vocab_size": vocab, "rms_norm_eps": 1e-6},
        **{"max_position_embeddings": 4096, "rope_theta": 10000.0, **more},
    }


CONFIGS = {
    "gemma-2b": _config("gemma", 2048, 18, 8, 1, 16384, 256000, head_dim=256, tie_word_embeddings=True),
    "llama-2-7b": _config("llama", 4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": _config("llama", 5120, 40, 40, 40, 13824, 32000),
    "mistral-7b": _config("mistral", 4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-32b": _config("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "tiny": _config("llama", 64, 2, 2, 1, 96, 67, max_position_embeddings=256),
}


class RandomCheckpoint:
    """Every weight of one format and shape is the same one: a few random rows, repeated."""

    kind = "hf"
    path = Path("synthetic")

    def __init__(self, spec: ModelSpec, formats: Mapping[str, str]) -> None:
        self.metadata: Mapping[str, Any] = {}
        self._known: dict[tuple[str, tuple[int, ...]], PackedWeight] = {}
        self._formats = {t.name: (formats[t.name] if t.packable else "F32", t.shape) for t in tensor_table(spec)}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(n, s, f, get_format(f).nbytes(s)) for n, (f, s) in self._formats.items()}

    def read(self, name: str) -> PackedWeight:
        key = self._formats[name]
        if key not in self._known:
            self._known[key] = random_weight(*key)
        return self._known[key]

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        pass

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def random_weight(form: str, shape: tuple[int, ...], scale: float = 1.0) -> PackedWeight:
    """A weight whose rows repeat after 32; for norms, ones."""
    if len(shape) == 1:
        return PackedWeight(get_format(form), shape, {"data": np.ones(shape, np.float32).view(np.uint8)})
    rows = min(32, shape[0])
    values = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)) * (scale / shape[1] ** 0.5)
    packed, few = get_format(form), PackedWeight.pack(get_format(form), values)
    return PackedWeight(packed, shape, {p.name: np.resize(few.parts[p.name], p.shape) for p in packed.parts(shape)})


class RepeatingBackend(CudaBackend):
    """Copies weights of a format and shape that it has, which beats packing them again."""

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:
        known: dict[Any, Array] = self.__dict__.setdefault("known", {})
        key = weight.format.name, weight.shape
        if key not in known:
            loaded = super().load_weight(weight, lookup)
            known[key] = loaded.handle.codes.untyped_storage()
            return loaded
        memory = self.empty((self.weight_nbytes(weight.format, weight.shape),), "uint8")
        memory.untyped_storage().copy_(known[key])
        return self.bind_weight(weight.format, weight.shape, memory)


@dataclass(frozen=True)
class Loaded:
    """A model that runs as it was planned."""

    plan: Plan
    spec: ModelSpec
    engine: Engine
    ledger: Ledger
    gpus: tuple[CudaBackend, ...]
    resources: ExitStack


def load(
    config: Mapping[str, Any],
    label: str,
    devices: Sequence[Device],
    machine: Machine,
    constraints: Constraints,
    interpret: bool,
) -> Loaded:
    """Plan and load a synthetic model. Raises DoesNotFit, BudgetExceeded."""
    model = plannable_config("synthetic", config, label)
    made, spec = plan(model, devices, machine, replace(constraints, format=label)), model.spec
    ledger = Ledger(made.devices)
    limits = Limits(made.chunk, made.max_num_seqs, made.workload.context, made.max_logit_rows, False)
    scratch = BuiltKernels().gpu_scratch(spec, limits, made.block_size)
    backends: dict[str, Backend] = {}
    for device in made.devices:
        if device.kind == "cuda":
            ledger.reserve(device.name, Kind.WORKSPACE, scratch.nbytes)
            accelerator = Accelerator() if interpret else None
            graphs = sum(p.nbytes for p in made.predictions if (p.device, p.kind) == (device.name, Kind.GRAPHS))
            backends[device.name] = RepeatingBackend(device, scratch, graphs, accelerator)
        else:
            backends[device.name] = make_backend(device, scratch=Scratch())
    owners = tuple(backends[part.device] for part in made.layers)
    with ExitStack() as resources:
        decoder = load_decoder(
            RandomCheckpoint(spec, tensor_formats(spec, label)),
            spec,
            Backends(
                backends[made.embedding.device],
                owners,
                backends[made.head.device],
                {int(part.name.split(".")[1]): backends[part.device] for part in made.experts},
                {part.name: part.placement for part in made.parts()},
            ),
            ledger,
            context_length=made.workload.context,
            max_rows=made.chunk,
            max_logit_rows=made.max_logit_rows,
            micro_rows=made.micro_rows,
        )
        resources.callback(decoder.close)
        groups = group_layers([layer.attention for layer in spec.layers], [part.device for part in made.layers])
        pool = KVPool(groups, made.num_blocks, made.block_size, made.kv_type, backends, ledger)
        resources.callback(pool.close)
        limited = EngineConfig(
            made.workload.context, made.max_num_seqs, made.chunk, made.max_logit_rows, prefix_caching=False
        )
        engine = Engine(decoder, pool, limited, spec.vocab_size)
        gpus = tuple(b for b in backends.values() if isinstance(b, CudaBackend))
        return Loaded(made, spec, engine, ledger, gpus, resources.pop_all())

"""Models with random weights and the shapes of real ones: what is measured needs no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends.cuda import layouts, packing
from chandra.backends.cuda.backend import CudaBackend
from chandra.checkpoint.base import TensorInfo
from chandra.engine import Engine
from chandra.lazy import torch
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.memory.plan import Plan
from chandra.models import Decoder, ModelSpec, tensor_table
from chandra.models.transforms import take_rows
from chandra.ops.contracts import Backend, Weight
from chandra.planner import Constraints, Machine, plan, plannable_config, tensor_formats
from chandra.quant import PackedWeight, get_format
from chandra.runtime import assemble
from chandra.store import Progress


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
    "tiny": _config("llama", 64, 3, 2, 1, 96, 80, max_position_embeddings=256),
}


class RandomCheckpoint:
    """Every weight of one format and shape is the same one, made by `weight`."""

    kind = "hf"
    path = Path("synthetic")

    def __init__(
        self, spec: ModelSpec, formats: Mapping[str, str], weight: Callable[[str, tuple[int, ...]], PackedWeight]
    ) -> None:
        self.metadata: Mapping[str, Any] = {}
        self._known: dict[tuple[str, tuple[int, ...]], PackedWeight] = {}
        self._formats = {t.name: (formats[t.name] if t.packable else "F32", t.shape) for t in tensor_table(spec)}
        self._make = weight

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(n, s, f, get_format(f).nbytes(s)) for n, (f, s) in self._formats.items()}

    def read(self, name: str) -> PackedWeight:
        key = self._formats[name]
        if key not in self._known:
            self._known[key] = self._make(*key)
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
    """Packs the rows of a weight until they repeat, and copies them on the device."""

    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:
        rows = layouts.ROWS
        if len(weight.shape) != 2 or weight.shape[0] % rows or weight.format.name == "nf4-dq":
            return super().load_weight(weight, lookup)
        few = take_rows(weight, ((0, rows),))
        packed = self.empty((self.weight_nbytes(few.format, few.shape),), "uint8")
        packing.load(few, packed, self._passing, self.write)
        here = layouts.arrange(few.format, few.shape).views(packed)
        memory = self.empty((self.weight_nbytes(weight.format, weight.shape),), "uint8")
        there = layouts.arrange(weight.format, weight.shape).views(memory)
        for name, out in there.items():
            if out.ndim == 1:
                out.copy_(here[name])
            elif name in ("codes", "high"):
                out.view(-1, *here[name].shape[1:]).copy_(here[name])
            else:
                out.view(*out.shape[:2], -1, rows).copy_(here[name][:, :, None])
        return self.bind_weight(weight.format, weight.shape, memory)


@dataclass(frozen=True)
class Loaded:
    """A model that runs as it was planned."""

    plan: Plan
    spec: ModelSpec
    ledger: Ledger
    decoder: Decoder
    engine: Engine
    gpus: tuple[CudaBackend, ...]
    resources: ExitStack


def planned(
    config: Mapping[str, Any], label: str, devices: Sequence[Device], machine: Machine, constraints: Constraints
) -> tuple[Plan, ModelSpec]:
    """The plan of a synthetic model. Raises DoesNotFit."""
    model = plannable_config("synthetic", config, label)
    return plan(model, devices, machine, replace(constraints, format=label)), model.spec


def load(
    made: Plan,
    spec: ModelSpec,
    make: Callable[..., Backend],
    weight: Callable[[str, tuple[int, ...]], PackedWeight] = random_weight,
    progress: Progress | None = None,
) -> Loaded:
    """Load a synthetic model as planned, on backends that `make` makes. Raises BudgetExceeded, DeviceError."""
    checkpoint, ledger = RandomCheckpoint(spec, tensor_formats(spec, made.format), weight), Ledger(made.devices)
    with ExitStack() as resources:
        backends, decoder, _, engine = assemble(checkpoint, spec, made, ledger, resources, make, progress=progress)
        gpus = tuple(b for b in backends.values() if isinstance(b, CudaBackend))
        return Loaded(made, spec, ledger, decoder, engine, gpus, resources.pop_all())

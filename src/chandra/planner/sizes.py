"""How many bytes a model's pieces take, from real tensors: as a file stores them, or as a label would pack them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chandra.models.spec import ModelSpec, TensorSpec
from chandra.planner.mixes import format_for
from chandra.quant import get_format


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of each piece under one choice of formats. A tied head reads the embedding's bytes and adds none.

    `dense[i]`: weights of layer i that every token reads; `experts[i]`: its experts, all of them. `largest`: the
    largest single tensor (what loading needs besides the result). `macs[i]`: multiply-adds of one token in layer i.
    """

    label: str
    convert: bool
    embedding: int
    head: int
    tied: bool
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    macs: tuple[float, ...]
    head_macs: float
    active: float  # share of the experts that one token reads
    largest: int
    bits_per_weight: float

    @property
    def head_read(self) -> int:
        """Bytes read to compute logits."""
        return self.embedding if self.tied else self.head

    @property
    def total(self) -> int:
        return self.embedding + self.head + sum(self.dense) + sum(self.experts)

    def layer(self, index: int) -> int:
        return self.dense[index] + self.experts[index]


def sizes(
    spec: ModelSpec, tensors: Sequence[TensorSpec], label: str, stored: Mapping[str, str] | None = None
) -> ModelSizes:
    """Sizes with the formats in `stored` (tensor name -> format), or packed as `label` says.

    Raises UsageError for an unknown label and UnsupportedError for a shape that a format cannot hold.
    """
    attention = spec.layers[0].attention
    gqa = attention.num_heads // attention.num_kv_heads
    dense, experts, macs = ([0] * spec.num_layers for _ in range(3))
    embedding = head = largest = values = 0
    for tensor in tensors:
        name = stored[tensor.name] if stored else format_for(label, tensor, spec.num_layers, spec.tied_embeddings, gqa)
        nbytes = get_format(name).nbytes(tensor.shape)
        largest, values = max(largest, nbytes), values + math.prod(tensor.shape)
        if tensor.layer is not None:
            mlp = spec.layers[tensor.layer].mlp
            (experts if tensor.role == "experts" else dense)[tensor.layer] += nbytes
            if len(tensor.shape) > 1:
                active = mlp.experts_per_token if tensor.role == "experts" else 1
                macs[tensor.layer] += active * math.prod(tensor.shape[-2:])
        elif tensor.role == "embedding":
            embedding += nbytes
        else:
            head += nbytes
    mlp = spec.layers[0].mlp
    total = embedding + head + sum(dense) + sum(experts)
    return ModelSizes(
        label=label,
        convert=stored is None,
        embedding=embedding,
        head=head,
        tied=spec.tied_embeddings,
        dense=tuple(dense),
        experts=tuple(experts),
        macs=tuple(float(m) for m in macs),
        head_macs=float(spec.vocab_size * spec.hidden_size),
        active=mlp.experts_per_token / mlp.num_experts if mlp.num_experts else 1.0,
        largest=largest,
        bits_per_weight=8 * total / values,
    )

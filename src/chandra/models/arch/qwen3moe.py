"""Qwen 3 with experts; some layers may stay dense."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.arch.qwen2 import upper_windows
from chandra.models.facts import Facts, absurd
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    dense_layers = facts.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list):
        raise absurd("mlp_only_layers", dense_layers, "a list of layers is expected")
    step = facts.integer("decoder_sparse_step", 1)
    dense = facts.mlp() if dense_layers or step > 1 else None
    sparse = facts.experts(facts.integer("moe_intermediate_size"), facts.flag("norm_topk_prob"))
    layers = []
    for i, window in enumerate(upper_windows(facts)):
        mlp = dense if dense and (i in dense_layers or (i + 1) % step) else sparse
        layers.append(LayerSpec(facts.attention(qk_norm=True, window=window), mlp))
    return facts.model("qwen3moe", layers)


ARCH = Arch("qwen3moe", build, ("qwen3_moe",), "qwen3moe", experts=True)

"""Qwen 3 with experts; some layers may stay dense."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.arch.qwen2 import upper_layers
from chandra.models.facts import Facts, absurd
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    dense, step = facts.get("mlp_only_layers") or [], facts.integer("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise absurd("mlp_only_layers", dense, "a list of layers is expected")
    experts = facts.experts(facts.integer("moe_intermediate_size"), facts.flag("norm_topk_prob"))
    mlps = [facts.mlp() if i in dense or (i + 1) % step else experts for i in range(facts.num_layers)]
    return facts.model("qwen3moe", mlp=mlps, slides=upper_layers(facts), attention={"qk_norm": True})


ARCH = Arch("qwen3moe", build, ("qwen3_moe",), "qwen3moe", experts=True)

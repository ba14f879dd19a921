"""Gemma 2: every other layer has a window, norms after attention and MLP, soft caps."""

from __future__ import annotations

from typing import Any

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    slides = facts.sliding([i % 2 == 0 for i in range(facts.num_layers)])
    return facts.model("gemma2", slides=slides, **common(facts, largest=46))


def common(facts: Facts, largest: int, **attention: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 share. GGUF files do not hold the scale: it comes from the head size, but in the largest
    model (of so many layers) from the hidden size per head."""
    per_head = facts.hidden_size / facts.integer("num_attention_heads")
    divisor = facts.number("query_pre_attn_scalar", per_head if facts.num_layers == largest else facts.head_dim)
    softcap = facts.optional("attn_logit_softcapping")
    return {
        "mlp": facts.mlp(activation="gelu_tanh"),
        "attention": {"scale": divisor**-0.5, "softcap": softcap, **attention},
        "layer": {"post_norms": True},
        "tied": True,
        "embedding_scale": facts.hidden_size**0.5,
        "logit_softcap": facts.optional("final_logit_softcapping"),
    }


ARCH = Arch("gemma2", build, ("gemma2",), "gemma2", unit_offset=True)

"""Gemma 2: every other layer has a window, norms after attention and MLP, soft caps."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp(activation="gelu_tanh")
    # GGUF files do not hold the scale: the head size, but for the 27B (46 layers) the hidden size per head
    large = facts.hidden_size / facts.integer("num_attention_heads") if facts.num_layers == 46 else None
    scale = facts.number("query_pre_attn_scalar", large or facts.head_dim) ** -0.5
    layers = [
        LayerSpec(
            facts.attention(
                scale=scale, window=facts.window() if slides else None, softcap=facts.optional("attn_logit_softcapping")
            ),
            mlp,
            post_norms=True,
        )
        for slides in facts.sliding([i % 2 == 0 for i in range(facts.num_layers)])
    ]
    return facts.model(
        "gemma2",
        layers,
        tied=True,
        embedding_scale=facts.hidden_size**0.5,
        logit_softcap=facts.optional("final_logit_softcapping"),
    )


ARCH = Arch("gemma2", build, ("gemma2",), "gemma2", unit_offset=True)

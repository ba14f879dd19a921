"""Gemma 3 (text): five layers with a window and a RoPE of their own, then a full one; head norms; norms after."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp(activation="gelu_tanh")
    # GGUF files do not hold the scale: the head size, but for the 27B (62 layers) the hidden size per head
    large = facts.hidden_size / facts.integer("num_attention_heads") if facts.num_layers == 62 else None
    scale = facts.number("query_pre_attn_scalar", large or facts.head_dim) ** -0.5
    period = facts.integer("sliding_window_pattern", facts.integer("_sliding_window_pattern", 6))
    local = Facts({"rope_theta": 10000.0, **facts.values})
    if not facts.get("rope_parameters"):  # the older layout: the scaling is meant for the full layers only
        theta = facts.number("rope_local_base_freq", 10000.0)
        local = Facts({**facts.values, "rope_theta": theta, "rope_scaling": None})
    full = facts if facts.get("rope_theta") else Facts({"rope_theta": 1e6, **facts.values})
    ropes = {True: local.rope("sliding_attention"), False: full.rope("full_attention")}
    layers = [
        LayerSpec(
            facts.attention(
                scale=scale,
                window=facts.window() if slides else None,
                softcap=facts.optional("attn_logit_softcapping"),
                rope=ropes[slides],
                qk_norm=True,
            ),
            mlp,
            post_norms=True,
        )
        for slides in facts.sliding([(i + 1) % period != 0 for i in range(facts.num_layers)])
    ]
    return facts.model(
        "gemma3",
        layers,
        tied=True,
        embedding_scale=facts.hidden_size**0.5,
        logit_softcap=facts.optional("final_logit_softcapping"),
    )


ARCH = Arch("gemma3", build, ("gemma3_text", "gemma3"), "gemma3", unit_offset=True)

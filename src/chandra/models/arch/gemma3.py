"""Gemma 3 (text): five layers with a window and a RoPE of their own, then a full one; head norms; norms after."""

from __future__ import annotations

from chandra.errors import UnsupportedError
from chandra.models.arch.base import Arch
from chandra.models.arch.gemma2 import common
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    if facts.flag("use_bidirectional_attention"):
        raise UnsupportedError("Gemma 3 for embeddings, which looks both ways, is not supported", "take a text model")
    period = facts.integer("sliding_window_pattern", facts.get("_sliding_window_pattern") or 6)
    slides = facts.sliding([(i + 1) % period != 0 for i in range(facts.num_layers)])
    full = Facts({**facts.values, "rope_theta": facts.number("rope_theta", 1e6)})
    if facts.get("rope_parameters"):
        local = facts
    else:  # the older layout, in which the scaling is meant for the full layers only
        local = Facts({**facts.values, "rope_theta": facts.get("rope_local_base_freq"), "rope_scaling": None})
    ropes = {True: local.rope("sliding_attention"), False: full.rope("full_attention")}
    return facts.model("gemma3", slides=slides, ropes=ropes, **common(facts, largest=62, qk_norm=True))


ARCH = Arch("gemma3", build, ("gemma3_text", "gemma3"), "gemma3", unit_offset=True)

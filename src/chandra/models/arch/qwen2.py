"""Qwen 2 and 2.5, QwQ: Llama with biases on q, k and v; windows, if any, in the upper layers."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    return facts.model("qwen2", slides=upper_layers(facts), attention={"bias": True, "out_bias": False})


def upper_layers(facts: Facts) -> list[bool]:
    """Which layers have a window: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    first = facts.integer("max_window_layers", 0, least=0) if facts.flag("use_sliding_window") else facts.num_layers
    default = [i >= first for i in range(facts.num_layers)]
    return facts.sliding(default) if any(default) else default


ARCH = Arch("qwen2", build, ("qwen2",), "qwen2")

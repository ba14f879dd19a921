"""Qwen 2 and 2.5, QwQ: Llama with biases on q, k and v; windows, if any, in the upper layers."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp()
    layers = [
        LayerSpec(facts.attention(window=window, bias=True, out_bias=False), mlp) for window in upper_windows(facts)
    ]
    return facts.model("qwen2", layers)


def upper_windows(facts: Facts) -> list[int | None]:
    """The window of each layer: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    count = facts.num_layers
    if not facts.flag("use_sliding_window"):
        return [None] * count
    first = facts.integer("max_window_layers", 0, least=0)
    return [facts.window() if slides else None for slides in facts.sliding([i >= first for i in range(count)])]


ARCH = Arch("qwen2", build, ("qwen2",), "qwen2")

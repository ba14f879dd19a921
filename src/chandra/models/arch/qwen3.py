"""Qwen 3: Llama with a norm on every query and key head."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.arch.qwen2 import upper_windows
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp()
    layers = [LayerSpec(facts.attention(qk_norm=True, window=window), mlp) for window in upper_windows(facts)]
    return facts.model("qwen3", layers)


ARCH = Arch("qwen3", build, ("qwen3",), "qwen3")

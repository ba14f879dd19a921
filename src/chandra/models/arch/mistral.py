"""Mistral 7B: Llama with a sliding window in every layer (where the file has one)."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp()
    layers = [
        LayerSpec(facts.attention(window=facts.window() if slides else None), mlp)
        for slides in facts.sliding([True] * facts.num_layers)
    ]
    return facts.model("mistral", layers)


ARCH = Arch("mistral", build, ("mistral",))

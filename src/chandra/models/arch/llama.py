"""Llama 1 to 3 and what shares its layout: SmolLM2, CodeLlama, TinyLlama."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import LayerSpec, ModelSpec


def build(facts: Facts) -> ModelSpec:
    layer = LayerSpec(facts.attention(), facts.mlp(bias=facts.flag("mlp_bias")))
    return facts.model("llama", [layer] * facts.num_layers)


ARCH = Arch("llama", build, ("llama",), "llama")

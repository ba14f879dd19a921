"""Llama 1 to 3 and what shares its layout: SmolLM2, CodeLlama, TinyLlama."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    return facts.model("llama", mlp=facts.mlp(bias=facts.flag("mlp_bias")))


ARCH = Arch("llama", build, ("llama",), "llama")

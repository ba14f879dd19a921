"""Qwen 3: Llama with a norm on every query and key head."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.arch.qwen2 import upper_layers
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    return facts.model("qwen3", slides=upper_layers(facts), attention={"qk_norm": True})


ARCH = Arch("qwen3", build, ("qwen3",), "qwen3")

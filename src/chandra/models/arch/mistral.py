"""Mistral 7B: Llama with a sliding window in every layer, where the file has one. Its GGUF files say `llama`."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    return facts.model("mistral", slides=facts.sliding([True] * facts.num_layers))


ARCH = Arch("mistral", build, ("mistral",))

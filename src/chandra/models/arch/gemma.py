"""Gemma 1: scaled embeddings, tanh GELU, norms stored less one."""

from __future__ import annotations

from chandra.models.arch.base import Arch
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


def build(facts: Facts) -> ModelSpec:
    mlp = facts.mlp(activation="gelu_tanh")
    return facts.model("gemma", mlp=mlp, tied=True, embedding_scale=facts.hidden_size**0.5)


ARCH = Arch("gemma", build, ("gemma",), "gemma", unit_offset=True)

"""Phi 3 and 4: Llama with fused qkv and gate/up, partial rotary and LongRoPE in some sizes."""

from __future__ import annotations

from chandra.models.arch.base import Arch, Name
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec

_LAYER = "model.layers.{i}."


def build(facts: Facts) -> ModelSpec:
    return facts.model("phi3", slides=facts.sliding([True] * facts.num_layers))


ARCH = Arch(
    "phi3",
    build,
    ("phi3",),
    "phi3",
    names={
        "hf": {
            **{f"self_attn.{x}_proj": (Name(_LAYER + "self_attn.qkv_proj", x),) for x in "qkv"},
            **{f"mlp.{x}_proj": (Name(_LAYER + "mlp.gate_up_proj", x),) for x in ("gate", "up")},
        }
    },
)

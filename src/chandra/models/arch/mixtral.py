"""Mixtral: Mistral with experts."""

from __future__ import annotations

from chandra.models.arch.base import Arch, Name
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec

_MOE = "model.layers.{i}.block_sparse_moe."


def build(facts: Facts) -> ModelSpec:
    experts = facts.experts(facts.integer("intermediate_size"), normalize=True)
    return facts.model("mixtral", mlp=experts, slides=facts.sliding([True] * facts.num_layers))


ARCH = Arch(
    "mixtral",
    build,
    ("mixtral",),
    "llama",
    experts=True,
    names={
        "hf": {
            "mlp.gate": (Name(_MOE + "gate"),),
            "mlp.experts.gate_proj": (Name(_MOE + "experts.{e}.w1"),),
            "mlp.experts.up_proj": (Name(_MOE + "experts.{e}.w3"),),
            "mlp.experts.down_proj": (Name(_MOE + "experts.{e}.w2"),),
        }
    },
)

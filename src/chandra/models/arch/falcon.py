"""Falcon: layer norms, attention and MLP in parallel, fused qkv. 7B shares one norm, 40B has two (ln_attn, ln_mlp)."""

from __future__ import annotations

from chandra.errors import UnsupportedError
from chandra.models.arch.base import Arch, Name
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec

_LAYER = "transformer.h.{i}."


def build(facts: Facts) -> ModelSpec:
    if facts.flag("alibi"):
        raise UnsupportedError("Falcon with ALiBi positions is not supported", "use a Falcon with rotary positions")
    grouped = facts.flag("new_decoder_architecture")
    parallel = grouped or facts.flag("parallel_attn", True)
    two_norms = facts.integer("num_ln_in_parallel_attn", 2 if grouped else 1) == 2 or not parallel
    kv_heads = facts.get("num_kv_heads") if grouped or not facts.flag("multi_query", True) else 1
    activation = facts.get("activation") or "gelu"
    facts = Facts({"num_key_value_heads": kv_heads, "hidden_act": activation, **facts.values}, facts.has_head)
    bias = facts.flag("bias")
    size = facts.integer("intermediate_size", facts.integer("ffn_hidden_size", 4 * facts.hidden_size))
    return facts.model(
        "falcon",
        mlp=facts.mlp(size, gated=False, bias=bias),
        attention={"bias": bias, "out_bias": bias},
        layer={"parallel": parallel, "mlp_norm": two_norms},
        tied=True,
        norm_kind="layer",
    )


ARCH = Arch(
    "falcon",
    build,
    ("falcon",),
    "falcon",
    names={
        "hf": {
            "model.embed_tokens": (Name("transformer.word_embeddings"),),
            "model.norm": (Name("transformer.ln_f"),),
            "input_layernorm": (Name(_LAYER + "ln_attn"), Name(_LAYER + "input_layernorm")),
            "post_attention_layernorm": (Name(_LAYER + "ln_mlp"), Name(_LAYER + "post_attention_layernorm")),
            **{
                f"self_attn.{x}_proj": (Name(_LAYER + "self_attention.query_key_value", x, grouped=True),)
                for x in "qkv"
            },
            "self_attn.o_proj": (Name(_LAYER + "self_attention.dense"),),
            "mlp.up_proj": (Name(_LAYER + "mlp.dense_h_to_4h"),),
            "mlp.down_proj": (Name(_LAYER + "mlp.dense_4h_to_h"),),
        },
        "gguf": {
            "input_layernorm": (Name("blk.{i}.attn_norm_2"), Name("blk.{i}.attn_norm")),
            "post_attention_layernorm": (Name("blk.{i}.attn_norm"),),
        },
    },
)

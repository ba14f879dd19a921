"""From a checkpoint's own description to `Facts`, and from those to a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from chandra.checkpoint.base import Checkpoint
from chandra.errors import UnsupportedError
from chandra.models.arch import Arch, arch_of_gguf, arch_of_model_type
from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec
from chandra.models.transforms import floats

# GGUF keys (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), without the architecture they begin with
GGUF_KEYS = {
    **{"block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "vocab_size": "vocab_size"},
    **{"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"},
    **{"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads"},
    **{"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
    **{"attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "rms_norm_eps"},
    **{"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
    **{"rope.dimension_count": "rotary_dim", "rope.freq_base": "rope_theta"},
    **{"rope.freq_base_swa": "rope_local_base_freq", "attention.sliding_window_pattern": "sliding_window_pattern"},
    **{"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
    "expert_feed_forward_length": "moe_intermediate_size",
}
GGUF_ROPE_SCALING = {
    **{"type": "rope_type", "factor": "factor", "attn_factor": "attention_factor"},
    **{"original_context_length": "original_max_position_embeddings"},
    **{"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"},
}
GGUF_ROPE_TENSORS = {
    **{"rope_freqs.weight": "freq_factors", "rope_factors_short.weight": "short_factor"},
    "rope_factors_long.weight": "long_factor",
}
# Suffixes of what GPTQ, AWQ, bitsandbytes, FP8 and compressed-tensors store beside or instead of a weight
QUANTIZED = (".qweight", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv", ".weight_packed")
LITGPT_KEYS = {
    **{"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "padded_vocab_size": "vocab_size"},
    **{"n_head": "num_attention_heads", "n_query_groups": "num_key_value_heads", "head_size": "head_dim"},
    **{"intermediate_size": "intermediate_size", "moe_intermediate_size": "moe_intermediate_size"},
    **{"n_expert": "num_experts", "n_expert_per_token": "num_experts_per_tok"},
    **{"block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps", "bias": "mlp_bias"},
    **{"rope_base": "rope_theta", "rotary_percentage": "partial_rotary_factor"},
    **{"rope_local_base_freq": "rope_local_base_freq", "sliding_window_size": "sliding_window"},
    **{"attention_scores_scalar": "query_pre_attn_scalar", "final_logit_softcapping": "final_logit_softcapping"},
    "attention_logit_softcapping": "attn_logit_softcapping",
}


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The model that a checkpoint holds, from its description and the names of its tensors.

    Raises UnsupportedError for an architecture Chandra does not have, CheckpointError for a damaged description.
    """
    arch, facts = {"gguf": _gguf, "hf": _hf, "litgpt": _litgpt}[checkpoint.kind](checkpoint)
    return arch.build(facts)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Hugging Face `config.json` describes. Raises as `read_spec` does."""
    config = _text_config(config)
    return arch_of_model_type(config.get("model_type")).build(Facts(config))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of the description of a multimodal one."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _hf(checkpoint: Checkpoint) -> tuple[Arch, Facts]:
    config = _text_config(checkpoint.metadata)
    if config.get("quantization_config") and any(name.endswith(QUANTIZED) for name in checkpoint.tensors):
        raise UnsupportedError(
            f"{checkpoint.path.name} is quantized in a way that Chandra does not read yet",
            "take the GGUF form of this model, or the original weights and let Chandra convert them",
        )
    has_head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    return arch_of_model_type(config.get("model_type")), Facts(config, has_head)


def _gguf(checkpoint: Checkpoint) -> tuple[Arch, Facts]:
    metadata, tensors = checkpoint.metadata, checkpoint.tensors
    name = metadata.get("general.architecture")
    stored = {key: metadata[f"{name}.{key}"] for key in GGUF_KEYS if f"{name}.{key}" in metadata}
    pattern = stored.pop("attention.sliding_window_pattern", None)
    values = {GGUF_KEYS[key]: _uniform(key, value) for key, value in stored.items()}
    if isinstance(pattern, list | np.ndarray):
        values["layer_types"] = layer_types(pattern)
    else:
        values["sliding_window_pattern"] = pattern
    arch = arch_of_gguf(name, experts=bool(values.get("num_experts")))
    scaling = {hf: metadata.get(f"{name}.rope.scaling.{key}") for key, hf in GGUF_ROPE_SCALING.items()}
    if scaling["rope_type"] != "longrope":
        del scaling["attention_factor"]  # here it is a factor on top of the scaling's own
    values["rope_scaling"] = scaling
    for tensor, key in GGUF_ROPE_TENSORS.items():
        if tensor in tensors:
            values[key] = floats(checkpoint.read(tensor), tensor).tolist()
    if "short_factor" in values:
        scaling["rope_type"] = "longrope"
    tokens, embedding = metadata.get("tokenizer.ggml.tokens"), tensors.get("token_embd.weight")
    counted = tokens if isinstance(tokens, Sequence) else range(embedding.shape[0] if embedding else 0)
    values.setdefault("vocab_size", len(counted))
    values["rope_interleaved"] = name == "llama"
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["bias"] = "blk.0.ffn_up.bias" in tensors
    values["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    values["norm_topk_prob"] = True
    values["tie_word_embeddings"] = "output.weight" not in tensors
    return arch, Facts(values)


def _uniform(key: str, value: Any) -> Any:
    """A value that GGUF may give per layer: the one that all layers share."""
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    distinct = set(np.ravel(value).tolist())
    if len(distinct) != 1:
        raise UnsupportedError(f"{key} differs between the layers of this model", "use a model with uniform layers")
    return distinct.pop()


def layer_types(slides: Iterable[object]) -> list[str]:
    return ["sliding_attention" if slid else "full_attention" for slid in slides]


def _litgpt(checkpoint: Checkpoint) -> tuple[Arch, Facts]:
    config = checkpoint.metadata
    values: dict[str, Any] = {hf: config.get(key) for key, hf in LITGPT_KEYS.items()}
    model_type = _litgpt_model_type(config)
    values["attention_bias"] = values["bias"] = config.get("bias")
    values["num_ln_in_parallel_attn"] = 1 if config.get("shared_attention_norm") else 2
    values["norm_topk_prob"] = True
    scaling: dict[str, Any] = {}
    if isinstance(given := config.get("rope_adjustments"), Mapping):
        scaling = dict(given)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len", None)
        kinds = {"low_freq_factor": "llama3", "beta_fast": "yarn"}
        scaling["rope_type"] = next((kind for key, kind in kinds.items() if key in scaling), "linear")
    elif (condense := config.get("rope_condense_ratio", 1)) != 1:
        scaling = {"rope_type": "linear", "factor": condense}
    values["rope_scaling"] = scaling
    if isinstance(sliding := config.get("sliding_window_indices"), list):
        values["layer_types"] = layer_types(sliding)
    return arch_of_model_type(model_type), Facts(values, has_head="lm_head.weight" in checkpoint.tensors)


def _litgpt_model_type(config: Mapping[str, Any]) -> str:
    """The architecture that a Lit-GPT configuration amounts to."""
    mlp, head_norms = config.get("mlp_class_name"), bool(config.get("norm_qk"))
    sequential = not config.get("parallel_residual", True) and config.get("norm_class_name") == "RMSNorm"
    if config.get("norm_qk_type", "default") == "default" and sequential:
        if mlp == "GemmaMLP":
            return "gemma3_text" if head_norms else "gemma2" if config.get("post_mlp_norm") else "gemma"
        if mlp == "LLaMAMoE":
            return "qwen3_moe" if head_norms else "mixtral"
        if mlp == "LLaMAMLP":
            return "qwen3" if head_norms else "qwen2" if config.get("attn_bias") else "mistral"
    if mlp == "GptNeoxMLP" and config.get("parallel_residual", True) and config.get("norm_class_name") == "LayerNorm":
        return "falcon"
    raise UnsupportedError(
        f"the Lit-GPT model {str(config.get('name'))[:80]!r} is built in a way that Chandra does not support",
        "convert a Llama, Mistral, Gemma, Qwen or Falcon model, or load its Hugging Face form",
    )

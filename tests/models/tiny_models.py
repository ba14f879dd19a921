"""Tiny random models of every architecture, made by transformers, and their GGUF and Lit-GPT forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
import yaml

from chandra.quant import PackedWeight, get_format

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Tiny:
    """A configuration, the GGUF architecture (None: there is none) and Lit-GPT settings (None: not supported)."""

    config: str
    values: dict[str, Any]
    gguf: str | None = None
    litgpt: dict[str, Any] | None = None
    context: int = 64
    extra: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        config = getattr(transformers, self.config + "Config")(
            **(self.values if self.config == "Falcon" else SIZES | self.values)
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter)
            if "norm" in name or "ln_" in name:
                centre = 0.0 if "Gemma" in self.config or name.endswith("bias") else 1.0
                parameter.data = centre + 0.2 * spread
            else:
                parameter.data = 0.15 * spread
        return model


_RMS = {"norm_class_name": "RMSNorm", "parallel_residual": False, "bias": False, "rotary_percentage": 1.0}
_LLAMA_MLP = {**_RMS, "mlp_class_name": "LLaMAMLP"}
_GEMMA_MLP = {**_RMS, "mlp_class_name": "GemmaMLP", "scale_embeddings": True}
_POST = {"post_attention_norm": True, "post_mlp_norm": True}

TINY: dict[str, Tiny] = {
    "llama": Tiny("Llama", {}, "llama", _LLAMA_MLP),
    "llama-mha-tied": Tiny("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, "llama"),
    "llama-head-32": Tiny("Llama", {"head_dim": 32}),
    "llama-biases": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Tiny(
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "llama"
    ),
    "llama-llama3": Tiny("Llama", {"rope_parameters": LLAMA3}, "llama"),
    "llama-yarn": Tiny("Llama", {"rope_parameters": YARN}, "llama"),
    "mistral": Tiny("Mistral", {"sliding_window": 6, "head_dim": 24}, None, {**_LLAMA_MLP, "sliding_window_size": 6}),
    "qwen2": Tiny("Qwen2", {}, "qwen2", {**_LLAMA_MLP, "attn_bias": True}),
    "qwen2-windows": Tiny("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Tiny("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, "qwen3", {**_LLAMA_MLP, "norm_qk": True}),
    "gemma": Tiny("Gemma", {"head_dim": 24}, "gemma", _GEMMA_MLP),
    "gemma2": Tiny(
        "Gemma2",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
        "gemma2",
        {
            **_GEMMA_MLP,
            **_POST,
            "sliding_window_size": 5,
            "sliding_window_indices": [1, 0, 1],
            "attention_logit_softcapping": 3.0,
            "final_logit_softcapping": 30.0,
            "attention_scores_scalar": 16,
        },
    ),
    "gemma3": Tiny(
        "Gemma3Text",
        {
            "head_dim": 24,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        "gemma3",
        {
            **_GEMMA_MLP,
            **_POST,
            "norm_qk": True,
            "sliding_window_size": 5,
            "sliding_window_indices": [1, 1, 1, 1, 1, 0, 1],
            "rope_base": 1000000,
            "rope_local_base_freq": 10000,
            "rope_adjustments": {"factor": 8.0},
        },
    ),
    "phi3": Tiny("Phi3", {"sliding_window": 6}, "phi3"),
    "phi3-short": Tiny(
        "Phi3",
        {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 32},
        "phi3",
        context=32,
    ),
    "phi3-long": Tiny(
        "Phi3",
        {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 16},
        "phi3",
    ),
    "falcon-7b": Tiny("Falcon", {**FALCON}, "falcon", {"rotary_percentage": 1.0, "shared_attention_norm": True}),
    "falcon-40b": Tiny(
        "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "falcon", {"rotary_percentage": 1.0}
    ),
    "falcon-sequential": Tiny("Falcon", {**FALCON, "parallel_attn": False, "multi_query": False, "bias": True}),
    "mixtral": Tiny(
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "llama",
        {**_RMS, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    ),
    "qwen3moe": Tiny(
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
        "qwen3moe",
    ),
    "qwen3moe-dense-layers": Tiny(
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
}


def write_hf(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Save a model as transformers does; returns its tensors under the names in the file."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_gguf(tiny: Tiny, model: Any, tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a GGUF file as llama.cpp's converter does."""
    assert tiny.gguf is not None
    c, arch = model.config, tiny.gguf
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    if arch == "falcon":
        kv_heads = c.num_kv_heads if c.new_decoder_architecture else 1
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        kv_heads = c.num_key_value_heads
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_head_count_kv(kv_heads)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if arch.startswith(("qwen3", "gemma")):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    else:
        rope = c.rope_parameters
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if (arch.startswith("gemma") and arch != "gemma") or (arch == "phi3" and c.sliding_window):
        writer.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if experts := getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    _add_rope(writer, model)
    for name, array in _gguf_tensors(tiny, model, tensors, kv_heads):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: gguf.GGUFWriter, model: Any) -> None:
    rope = model.config.rope_parameters
    rope = rope.get("full_attention") or rope
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        # what the converter stores: by how much the plain frequencies are divided
        rotary = model.model.rotary_emb
        plain = rope["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq.numpy()).astype(np.float32))
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        stretch = model.config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))
        for size in ("short", "long"):
            writer.add_tensor(f"rope_factors_{size}.weight", np.array(rope[f"{size}_factor"], np.float32))


def _gguf_tensors(
    tiny: Tiny, model: Any, tensors: dict[str, np.ndarray], kv_heads: int
) -> list[tuple[str, np.ndarray]]:
    c, arch = model.config, next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == tiny.gguf)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    out, experts = [], {}
    for name, array in tensors.items():
        if ".experts." in name:
            before, after = name.split(".experts.")
            number, rest = after.split(".", 1)
            experts.setdefault(f"{before}.experts.{rest}", {})[int(number)] = array
            continue
        if tiny.gguf == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = c.num_attention_heads if "q_proj" in name else kv_heads
            array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if tiny.gguf.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if "query_key_value" in name:
            array = _plain_qkv(array, c.num_attention_heads // kv_heads, kv_heads, head_dim)
        out.append((names.get_name(name, try_suffixes=(".weight", ".bias")), array))
    for name, parts in experts.items():
        stacked = np.stack([parts[e] for e in sorted(parts)])
        out.append((names.get_name(name, try_suffixes=(".weight",)), stacked))
    return out


def _plain_qkv(array: np.ndarray, queries: int, groups: int, head_dim: int) -> np.ndarray:
    """From q, k and v per key/value head to all q, all k, all v."""
    grouped = array.reshape(groups, queries + 2, head_dim, *array.shape[1:])
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


_LITGPT = (
    ("model.embed_tokens", "transformer.wte"),
    ("transformer.word_embeddings", "transformer.wte"),
    ("model.norm", "transformer.ln_f"),
    ("model.layers.", "transformer.h."),
    ("input_layernorm", "norm_1"),
    ("ln_attn", "norm_1"),
    ("ln_mlp", "norm_2"),
    ("pre_feedforward_layernorm", "norm_2"),
    ("post_feedforward_layernorm", "post_mlp_norm"),
    ("self_attn.o_proj", "attn.proj"),
    ("self_attention.dense", "attn.proj"),
    ("self_attn.q_norm", "attn.norm_q"),
    ("self_attn.k_norm", "attn.norm_k"),
    ("mlp.gate_proj", "mlp.fc_1"),
    ("mlp.up_proj", "mlp.fc_2"),
    ("mlp.down_proj", "mlp.proj"),
    ("mlp.dense_h_to_4h", "mlp.fc"),
    ("mlp.dense_4h_to_h", "mlp.proj"),
    ("block_sparse_moe", "mlp"),
    (".w1.", ".fc_1."),
    (".w3.", ".fc_2."),
    (".w2.", ".proj."),
)


def write_litgpt(tiny: Tiny, model: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Write configuration and weights as Lit-GPT's converter does."""
    assert tiny.litgpt is not None
    c = model.config
    falcon = tiny.config == "Falcon"
    kv_heads = (c.num_kv_heads if c.new_decoder_architecture else 1) if falcon else c.num_key_value_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config = {
        **{"name": "tiny", "n_layer": c.num_hidden_layers, "n_head": c.num_attention_heads, "n_embd": c.hidden_size},
        **{"n_query_groups": kv_heads, "head_size": head_dim, "block_size": c.max_position_embeddings},
        **{"padded_vocab_size": c.vocab_size, "intermediate_size": 256 if falcon else c.intermediate_size},
        "norm_eps": c.layer_norm_epsilon if falcon else c.rms_norm_eps,
    }
    if falcon:
        config |= {
            "norm_class_name": "LayerNorm",
            "mlp_class_name": "GptNeoxMLP",
            "parallel_residual": True,
            "bias": False,
        }
    else:
        config["rope_base"] = c.rope_parameters.get("rope_theta")
    out: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if "query_key_value" in name:
            qkv = _plain_qkv(array, c.num_attention_heads // kv_heads, kv_heads, head_dim)
            out[name.replace("self_attention.query_key_value", "attn.qkv")] = qkv
        elif "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[_renamed(name.replace("self_attn.q_proj", "attn.qkv"), c)] = np.concatenate(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            out[_renamed(name, c)] = array
    out.setdefault("lm_head.weight", out["transformer.wte.weight"])
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, **tiny.litgpt}))
    torch.save({name: torch.from_numpy(array) for name, array in out.items()}, folder / "lit_model.pth")


def _renamed(name: str, config: Any) -> str:
    post_norms = config.model_type.startswith(("gemma2", "gemma3"))
    name = name.replace("post_attention_layernorm", "post_attention_norm" if post_norms else "norm_2")
    for old, new in _LITGPT:
        name = name.replace(old, new)
    return name


def packed(array: np.ndarray, form: str = "F32") -> PackedWeight:
    return PackedWeight.pack(get_format(form), torch.from_numpy(np.ascontiguousarray(array)))

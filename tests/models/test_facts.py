"""Model descriptions: what is read from each layout, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kit import MemoryCheckpoint
from tiny_models import packed

from chandra.errors import ChandraError, CheckpointError, UnsupportedError
from chandra.models import ARCHS, read_spec, spec_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 5, "head_dim": 16}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 96,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 80,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}

ABSURD = [
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "3"),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 3.5),
    ("hidden_size", 0),
    ("hidden_size", 10**12),
    ("hidden_size", 66),
    ("intermediate_size", -80),
    ("vocab_size", 1 << 60),
    ("num_attention_heads", 0),
    ("num_attention_heads", 7),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("head_dim", -16),
    ("head_dim", 15),
    ("max_position_embeddings", 1 << 62),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", math.inf),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", 1e30),
    ("rms_norm_eps", None),
    ("rope_theta", 0),
    ("rope_theta", 1.0),
    ("rope_scaling", [1, 2]),
    ("rope_scaling", {"rope_type": "linear", "factor": math.nan}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0] * 8}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [math.nan] * 8}),
    ("partial_rotary_factor", 2.0),
    ("tie_word_embeddings", "yes"),
]


@pytest.mark.parametrize(("key", "value"), ABSURD, ids=lambda v: str(v)[:30])
def test_absurd_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="model description") as caught:
        spec_from_config({**LLAMA, key: value})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (GEMMA3, "layer_types", ["sliding_attention"]),
        (GEMMA3, "layer_types", ["chunked_attention"] * 7),
        (GEMMA3, "sliding_window", 0),
        ({**LLAMA, "model_type": "mixtral", "num_local_experts": 4}, "num_experts_per_tok", 5),
        ({**LLAMA, "model_type": "mixtral", "num_experts_per_tok": 2}, "num_local_experts", 10**9),
    ],
    ids=lambda v: str(v)[:30],
)
def test_absurd_values_of_some_architectures_are_refused(base: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(CheckpointError):
        spec_from_config({**base, key: value})


def test_missing_values_are_named() -> None:
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"):
        with pytest.raises(CheckpointError, match=key):
            spec_from_config({k: v for k, v in LLAMA.items() if k != key})


def test_what_is_not_supported_is_said() -> None:
    with pytest.raises(UnsupportedError, match="mamba") as caught:
        spec_from_config({**LLAMA, "model_type": "mamba"})
    assert all(name in caught.value.hint for name in ARCHS)
    with pytest.raises(UnsupportedError, match="proportional"):
        spec_from_config({**LLAMA, "rope_scaling": {"rope_type": "proportional"}})
    with pytest.raises(UnsupportedError, match="tanhshrink"):
        spec_from_config({**LLAMA, "hidden_act": "tanhshrink"})
    with pytest.raises(UnsupportedError, match="ALiBi"):
        spec_from_config({**LLAMA, "model_type": "falcon", "alibi": True})
    with pytest.raises(UnsupportedError, match="both ways"):
        spec_from_config({**GEMMA3, "use_bidirectional_attention": True})
    gptq = {"model.layers.0.self_attn.q_proj.qweight": packed(np.zeros((8, 8), np.float32))}
    with pytest.raises(UnsupportedError, match="quantized"):
        read_spec(MemoryCheckpoint("hf", {**LLAMA, "quantization_config": {"quant_method": "gptq"}}, gptq))
    with pytest.raises(UnsupportedError, match="stablelm"):
        read_spec(MemoryCheckpoint("litgpt", {"name": "stablelm", "mlp_class_name": "LLaMAMLP"}, {}))
    with pytest.raises(UnsupportedError, match="None"):
        read_spec(MemoryCheckpoint("gguf", {}, {}))
    with pytest.raises(UnsupportedError, match="differs between the layers"):
        read_spec(MemoryCheckpoint("gguf", {**GGUF, "llama.attention.head_count_kv": np.array([1, 2, 2])}, {}))


def test_a_vocabulary_without_size_is_counted() -> None:
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert read_spec(MemoryCheckpoint("gguf", {**metadata, "tokenizer.ggml.tokens": ["a"] * 7}, {})).vocab_size == 7
    with pytest.raises(CheckpointError, match="vocab_size"):
        read_spec(MemoryCheckpoint("gguf", metadata, {}))


def test_values_per_layer_that_agree_are_one_value() -> None:
    spec = read_spec(MemoryCheckpoint("gguf", {**GGUF, "llama.attention.head_count_kv": np.array([2, 2, 2])}, {}))
    assert spec.layers[0].attention.num_kv_heads == 2
    assert spec.layers[0].attention.rope is not None
    assert spec.layers[0].attention.rope.interleaved


def test_old_and_new_rope_layouts_are_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = spec_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}})
    new = spec_from_config({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new
    assert old.layers[0].attention.rope is not None
    assert old.layers[0].attention.rope.kind == "llama3"


def test_old_and_new_gemma3_layouts_are_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling, "sliding_window_pattern": 6}
    types = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new = {
        "layer_types": types,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    spec = spec_from_config({**GEMMA3, **new})
    assert spec_from_config({**GEMMA3, **old}) == spec
    assert spec_from_config({"model_type": "gemma3", "text_config": {**GEMMA3, **new}}) == spec
    assert [layer.attention.window for layer in spec.layers] == [5, 5, 5, 5, 5, None, 5]


def test_a_head_of_its_own_is_seen() -> None:
    assert spec_from_config({**LLAMA, "tie_word_embeddings": True}).tied_embeddings
    assert not spec_from_config(LLAMA).tied_embeddings
    assert spec_from_config(GEMMA3).tied_embeddings
    assert read_spec(MemoryCheckpoint("hf", LLAMA, {})).tied_embeddings
    assert read_spec(MemoryCheckpoint("gguf", GGUF, {})).tied_embeddings


KEYS = [
    *LLAMA,
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "hidden_act",
    "layer_types",
    "sliding_window",
    "rope_parameters",
]
ODD = (None, True, -1, 0, 1, 2, 8, 10**9, 2**70, 0.5, 1e30, math.nan, math.inf, "silu", "x", [], [1.0])
ODD_TABLES = ({}, {"rope_type": "yarn"}, {"rope_type": []}, {"factor": "x"}, {"full_attention": 3}, ["full_attention"])
VALUES = st.sampled_from((*ODD, *ODD_TABLES))


@settings(deadline=None)
@given(st.sampled_from(sorted(ARCHS)), st.dictionaries(st.sampled_from(KEYS[1:]), VALUES, max_size=3))
def test_any_description_gives_a_model_or_a_named_error(arch: str, changes: dict[str, Any]) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = {**LLAMA, **moe, "model_type": ARCHS[arch].model_types[0], **changes}
    try:
        spec = spec_from_config(config)
    except ChandraError:
        return
    assert 1 <= spec.num_layers <= 2048
    assert all(layer.attention.num_heads % layer.attention.num_kv_heads == 0 for layer in spec.layers)

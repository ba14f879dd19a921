"""RoPE frequencies against transformers, and longer contexts than the golden tests have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chandra.models import spec_from_config
from chandra.models.rope import inv_freq

LONG = [float(x) for x in np.linspace(1, 20, 16)]
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "linear": ({"factor": 8.0}, (100,)),
    "dynamic": ({"factor": 2.0}, (100, 4096, 4097, 20000)),
    "llama3": (
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        (100,),
    ),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 1024}, (100,)),
    "yarn-mscale": (
        {
            "factor": 40.0,
            "original_max_position_embeddings": 1024,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "beta_fast": 16,
        },
        (100,),
    ),
    "yarn-untruncated": ({"factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False}, (100,)),
    "longrope": (
        {"short_factor": [1.0] * 16, "long_factor": LONG, "original_max_position_embeddings": 512},
        (100, 512, 513, 4096),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    parameters, lengths = CASES[name]
    kind = name.split("-")[0]
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 1e5, **parameters},
    )
    rope = spec_from_config(config.to_dict()).layers[0].attention.rope
    assert rope is not None
    for length in lengths:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
        np.testing.assert_allclose(inv_freq(rope, length), expected.numpy(), rtol=2e-6)
        assert rope.attention_factor == pytest.approx(scale)

"""Every architecture against transformers, from every kind of checkpoint that holds it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_kit import MemoryCheckpoint, load, run_stepwise, run_whole
from tiny_models import TINY, packed, write_gguf, write_hf, write_litgpt

from chandra.checkpoint import open_checkpoint
from chandra.models import read_spec
from chandra.ops.contracts import Backend

LENGTHS = (21, 17)  # past the original contexts of the RoPE scalings


@functools.cache
def expected(name: str) -> tuple[Any, list[list[int]], np.ndarray]:
    """The model, the prompts, and the logits of all their tokens."""
    model = TINY[name].model()
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]
    with torch.no_grad():
        logits = [model(torch.tensor([tokens])).logits[0].numpy() for tokens in sequences]
    return model, sequences, np.concatenate(logits)


def check(name: str, checkpoint: Any, backend: Backend) -> None:
    _, sequences, logits = expected(name)
    spec = read_spec(checkpoint)
    decoder = load(checkpoint, spec, backend, TINY[name].context)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(run_whole(decoder, backend, sequences), logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(run_stepwise(decoder, backend, sequences), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_hugging_face(name: str, backend: Backend, tmp_path: Path) -> None:
    write_hf(expected(name)[0], tmp_path)
    check(name, open_checkpoint(tmp_path), backend)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.gguf])
def test_gguf(name: str, backend: Backend, tmp_path: Path) -> None:
    model = expected(name)[0]
    write_gguf(TINY[name], model, write_hf(model, tmp_path / "hf"), tmp_path / "tiny.gguf")
    check(name, open_checkpoint(tmp_path / "tiny.gguf"), backend)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.litgpt])
def test_litgpt(name: str, backend: Backend, tmp_path: Path) -> None:
    model = expected(name)[0]
    write_litgpt(TINY[name], model, write_hf(model, tmp_path / "hf"), tmp_path)
    check(name, open_checkpoint(tmp_path), backend)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_saved_in_one_tensor(name: str, backend: Backend) -> None:
    model = expected(name)[0]
    weights = {key: packed(value.numpy()) for key, value in model.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in weights)
    check(name, MemoryCheckpoint("hf", model.config.to_dict(), weights), backend)


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "q8_0", "q4_0"])
def test_cache_types(kv_type: str, backend: Backend, tmp_path: Path) -> None:
    model, sequences, logits = expected("llama-head-32")
    write_hf(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    decoder = load(checkpoint, read_spec(checkpoint), backend)
    whole, steps = (run(decoder, backend, sequences, kv_type) for run in (run_whole, run_stepwise))
    np.testing.assert_allclose(whole, steps, atol=1e-2, rtol=0)  # a value may round to the next step of the cache
    error = np.sqrt(np.mean((whole - logits) ** 2) / np.mean(logits**2))
    assert 1e-6 < error < {"f16": 1e-3, "bf16": 6e-3, "q8_0": 0.03, "q4_0": 0.4}[kv_type]

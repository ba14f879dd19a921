"""Every architecture against transformers, from every kind of checkpoint that holds it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_kit import MemoryCheckpoint, load, run_stepwise, run_whole
from tiny_models import TINY, litgpt, packed, write_gguf, write_hf

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
    tensors = write_hf(expected(name)[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    check(name, MemoryCheckpoint("hf", config, {n: packed(array) for n, array in tensors.items()}), backend)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.gguf])
def test_gguf(name: str, backend: Backend, tmp_path: Path) -> None:
    model = expected(name)[0]
    write_gguf(TINY[name], model, write_hf(model, tmp_path / "hf"), tmp_path / "tiny.gguf")
    check(name, open_checkpoint(tmp_path / "tiny.gguf"), backend)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.litgpt])
def test_litgpt(name: str, backend: Backend, tmp_path: Path) -> None:
    model = expected(name)[0]
    check(name, MemoryCheckpoint("litgpt", *litgpt(TINY[name], model, write_hf(model, tmp_path))), backend)

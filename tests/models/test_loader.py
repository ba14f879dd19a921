"""Loading: what is checked, what is reserved, and models spread over several backends."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model_kit import CPU, DenseKV, MemoryCheckpoint, load, run_whole
from tiny_models import packed

from chandra.errors import BudgetExceeded, CheckpointError, UnsupportedError
from chandra.memory.device import Device
from chandra.memory.ledger import Kind, Ledger
from chandra.models import (
    Backends,
    find_sources,
    load_decoder,
    spec_from_config,
    stored_formats,
    tensor_table,
    workspace_bytes,
)
from chandra.models.rope import rope_bytes
from chandra.ops.contracts import Backend
from chandra.ops.reference import ReferenceBackend
from chandra.quant import get_format

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}
TOKENS = [[int(t) for t in np.random.default_rng(3).integers(0, 96, 12)]]


def checkpoint(form: str = "F32", **changes: Any) -> tuple[Any, MemoryCheckpoint]:
    """A random model as a Hugging Face checkpoint."""
    config = {**CONFIG, **changes}
    spec = spec_from_config(config)
    torch.manual_seed(0)
    weights = {}
    for tensor in tensor_table(spec):
        values = torch.randn(tensor.shape) * 0.1 + (1 if tensor.role == "norm" else 0)
        weights[tensor.name] = packed(values.numpy(), form if tensor.packable else "F32")
    return spec, MemoryCheckpoint("hf", config, weights)


def reserved(ledger: Ledger) -> dict[tuple[str, Kind], int]:
    return {(row.device, row.kind): row.reserved for row in ledger.rows()}


def test_every_byte_is_reserved_and_given_back(backend: Backend) -> None:
    spec, source = checkpoint("Q8_0")
    ledger = Ledger([CPU])
    told: list[tuple[int, int]] = []
    decoder = load(
        source,
        spec,
        backend,
        ledger=ledger,
        max_rows=32,
        max_logit_rows=8,
        progress=lambda done, total: told.append((done, total)),
    )
    sources = find_sources(spec, source)
    formats = stored_formats(sources, source)
    planned = sum(get_format(formats[s.tensor.name]).nbytes(s.tensor.shape) for s in sources)
    weights = reserved(ledger)["cpu", Kind.WEIGHTS]
    if isinstance(backend, ReferenceBackend):  # it repacks nothing
        ropes = rope_bytes(layer.attention.rope for layer in spec.layers)
        assert weights + reserved(ledger)["cpu", Kind.PAGE_CACHE] == planned + ropes
    workspace = workspace_bytes(spec, range(4), 32, 8)
    assert reserved(ledger)["cpu", Kind.WORKSPACE] == workspace
    assert told[-1] == (planned, planned)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert set(source.released) == set(source.weights)
    decoder.close()
    decoder.close()
    assert not any(reserved(ledger).values())


@pytest.mark.parametrize("name", ["virtual:0", "cpu"])
def test_a_tensor_on_its_way_is_reserved_and_the_largest_comes_first(name: str) -> None:
    spec, source = checkpoint("Q8_0")
    backend = ReferenceBackend(Device(name, "virtual" if name == "virtual:0" else "cpu", 1 << 30))
    ledger, seen = Ledger([CPU, backend.device]), []
    load(
        source,
        spec,
        backend,
        ledger=ledger,
        max_rows=32,
        max_logit_rows=8,
        progress=lambda *_: seen.append(next(row for row in ledger.rows() if row.kind is Kind.LOADING)),
    )
    copied = [w.nbytes for w in source.weights.values() if name != "cpu" or w.format.name == "F32"]  # or mapped
    assert {row.peak for row in seen} == {max(copied)}
    assert not any(row.reserved for row in seen)


MEASURE = """
import sys
import numpy as np
from chandra.lazy import torch
from chandra.models.transforms import CONVERT, convert, loading_bytes
from chandra.quant import PackedWeight, get_format

def resident(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

stored, form, shape = get_format("BF16"), get_format(sys.argv[1]), (4096, 1024)
values = np.zeros((*shape[:-1], 2 * shape[-1]), np.uint8)
values[...] = np.arange(2 * shape[-1]) % 61  # touched, and finite
weight = PackedWeight(stored, shape, {"data": values.view(np.uint16).reshape(shape).view(np.uint8)})
convert(PackedWeight(stored, (2, 1024), {"data": weight.parts["data"][:2]}), form)
before = resident("VmRSS") - values.nbytes
open("/proc/self/clear_refs", "w").write("5")
made = convert(weight, form)
print(resident("VmHWM") - before, loading_bytes(stored, form, shape))
"""


@pytest.mark.parametrize("form", ["Q8_0", "nf4", "Q6_K"])
def test_converting_takes_no_more_than_is_reserved(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, form], capture_output=True, text=True, check=True)
    taken, reserved_for_it = map(int, done.stdout.split())
    assert taken <= reserved_for_it


def test_the_workspace_is_as_large_as_its_arrays() -> None:
    class Counting(ReferenceBackend):
        allocated = 0

        def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
            array = super().empty(shape, dtype)
            self.allocated += array.nbytes
            return array

    spec, source = checkpoint()
    backend, head = Counting(CPU), Counting(replace(CPU, name="virtual:0"))
    ledger = Ledger([CPU, head.device])
    places = Backends(backend, (backend,) * 4, head)
    load_decoder(source, spec, places, ledger, context_length=64, max_rows=32, max_logit_rows=70)
    assert reserved(ledger)["cpu", Kind.WORKSPACE] == backend.allocated
    assert reserved(ledger)["virtual:0", Kind.WORKSPACE] == head.allocated
    assert head.allocated == workspace_bytes(spec, [], 32, 70)


@pytest.mark.parametrize("share", [0.01, 0.9, 0.9999])
def test_nothing_stays_reserved_when_the_model_does_not_fit(share: float) -> None:
    spec, source = checkpoint()
    needed = sum(weight.nbytes for weight in source.weights.values())
    needed += workspace_bytes(spec, range(4), 64, 64)
    ledger = Ledger([Device("cpu", "cpu", int(share * needed))])
    backend = ReferenceBackend(CPU)
    with pytest.raises(BudgetExceeded):
        load(source, spec, backend, ledger=ledger, max_rows=64, max_logit_rows=64)
    assert not any(reserved(ledger).values())


@pytest.mark.parametrize("tied", [False, True])
def test_layers_on_several_backends_compute_the_same(tied: bool, backend: Backend) -> None:
    spec, source = checkpoint(tie_word_embeddings=tied)
    expected = run_whole(load(source, spec, backend), backend, TOKENS)
    others = [ReferenceBackend(Device(f"virtual:{i}", "virtual", 1 << 30)) for i in range(3)]
    ledger = Ledger([backend.device, *(b.device for b in others)])
    places = Backends(others[0], (backend, others[1], others[1], backend), others[2])
    decoder = load_decoder(source, spec, places, ledger, context_length=64, max_rows=32, max_logit_rows=32)
    np.testing.assert_allclose(run_whole(decoder, backend, TOKENS), expected, atol=2e-5, rtol=0)
    table = 4 * 96 * 64
    assert reserved(ledger)["virtual:0", Kind.WEIGHTS] == table
    assert reserved(ledger)["virtual:2", Kind.WEIGHTS] == table + 4 * 64  # the head (a copy, if tied), the final norm


def test_tied_embeddings_are_loaded_once(backend: Backend) -> None:
    spec, source = checkpoint(tie_word_embeddings=True)
    decoder = load(source, spec, backend)
    assert decoder.head.weight is decoder.embedding
    assert "lm_head.weight" not in source.weights


def test_only_the_wanted_logits_are_computed(backend: Backend) -> None:
    spec, source = checkpoint()
    decoder = load(source, spec, backend, max_logit_rows=1)
    kv = DenseKV(spec, backend, 1, 16)
    tokens = TOKENS[0]
    assert decoder.forward(kv.batch([(0, tokens, 0)], all_logits=False), kv).shape == (1, 96)
    batch = kv.batch([(0, tokens, 0)], all_logits=False)
    assert decoder.forward(replace(batch, logit_rows=batch.logit_rows[:0]), kv).shape == (0, 96)
    with pytest.raises(ValueError, match="planned"):
        decoder.forward(kv.batch([(0, tokens, 0)]), kv)


def test_tensors_are_converted_on_the_way(backend: Backend) -> None:
    spec, source = checkpoint()
    formats = {t.name: "Q8_0" for t in tensor_table(spec) if t.packable}
    decoder = load(source, spec, backend, formats=formats)
    assert decoder.mover.layers[0].qkv[0].weight.format.name == "Q8_0"
    assert decoder.embedding.format.name == "Q8_0"
    _, stored = checkpoint("Q8_0")
    np.testing.assert_array_equal(
        run_whole(decoder, backend, TOKENS), run_whole(load(stored, spec, backend), backend, TOKENS)
    )


def test_missing_and_misshapen_tensors_are_named() -> None:
    spec, source = checkpoint()
    del source.weights["model.layers.2.mlp.up_proj.weight"]
    source.weights["model.layers.1.self_attn.k_proj.weight"] = packed(np.zeros((64, 64), np.float32))
    source.weights["not.of.this.model"] = packed(np.zeros((64, 64), np.float32))
    with pytest.raises(CheckpointError) as caught:
        find_sources(spec, source)
    assert "model.layers.2.mlp.up_proj.weight is missing" in caught.value.message
    assert "model.layers.1.self_attn.k_proj.weight has shape (64, 64), expected (32, 64)" in caught.value.message
    assert "not.of.this.model" not in caught.value.message


def test_a_vocabulary_that_is_not_the_embedding_is_refused_before_anything_is_reserved(backend: Backend) -> None:
    _, source = checkpoint()
    spec = spec_from_config({**CONFIG, "vocab_size": 100})
    ledger = Ledger([CPU])
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(96, 64\), expected \(100, 64\)"):
        load(source, spec, backend, ledger=ledger, max_rows=1, max_logit_rows=1)
    assert not ledger.rows()


def test_many_missing_tensors_are_counted() -> None:
    spec, source = checkpoint()
    source.weights.clear()
    with pytest.raises(CheckpointError, match=f"and {len(tensor_table(spec)) - 5} more"):
        find_sources(spec, source)


@pytest.mark.parametrize("form", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_norms_and_biases_that_are_not_finite_are_refused(name: str, value: float, form: str) -> None:
    spec, source = checkpoint()
    values = source.weights[name].unpack().numpy().copy()
    values[3] = value
    source.weights[name] = half(values) if form == "F16" else packed(values, form)
    with pytest.raises(CheckpointError, match=name):
        load(source, spec, ReferenceBackend(CPU))


def half(values: np.ndarray) -> Any:
    weight = packed(np.zeros(values.shape, np.float32), "F16")
    weight.parts["data"].view(np.float16)[:] = values
    return weight


def test_experts_in_several_formats_are_refused() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "attention_bias": False}
    spec = spec_from_config({**CONFIG, **config})
    weights = {}
    for tensor in tensor_table(spec):
        if tensor.role != "experts":
            weights[tensor.name.replace("mlp.gate", "block_sparse_moe.gate")] = packed(
                np.ones(tensor.shape, np.float32)
            )
    for i in range(4):
        for e in range(2):
            for name, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64))):
                form = "F32" if (i, e, name) != (2, 1, "w2") else "Q8_0"
                key = f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}.weight"
                weights[key] = packed(np.ones(shape, np.float32), form)
    with pytest.raises(UnsupportedError, match="joined"):
        load(MemoryCheckpoint("hf", config, weights), spec, ReferenceBackend(CPU))

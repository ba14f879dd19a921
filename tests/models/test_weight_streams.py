"""Layers and experts that are not where they are computed give the bits of those that are, whatever goes wrong."""

from __future__ import annotations

import gc
import random
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from model_kit import CPU, DenseKV, MemoryCheckpoint
from tiny_models import packed

from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.virtual.backend import VirtualBackend
from chandra.errors import BudgetExceeded, CheckpointError, UnsupportedError
from chandra.memory.device import Device
from chandra.memory.ledger import Kind, Ledger
from chandra.models import Backends, Decoder, ModelSpec, TensorSpec, load_decoder, spec_from_config, tensor_table
from chandra.models.build import LayerBuilder
from chandra.models.tensors import NAMES
from chandra.models.weights import Weights
from chandra.ops.contracts import Array, Copy, HostBytes
from chandra.planner import ASSUMED_HOST, Constraints, plan, plannable
from chandra.planner.kernels import PIECE, repacking
from chandra.runtime import _load_weights

DENSE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}
MOE: dict[str, Any] = {
    **DENSE,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "attention_bias": False,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


@dataclass
class FileLike(MemoryCheckpoint):
    """Counts what would be read from a file; `failures` of the next reads fail."""

    read_ahead: int = 0
    failures: int = 0

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:  # noqa: ARG002
        self.read_ahead += 1
        if self.failures:
            self.failures -= 1
            raise OSError("the disk is gone")

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:  # noqa: ARG002
        self.released.append(name)


class Unreliable(VirtualBackend):
    """Some copies to it fail."""

    failures = 0

    def fetch(self, host: HostBytes, out: Array) -> Copy:
        if self.failures:
            self.failures -= 1
            return super().fetch(host, out[:1])
        return super().fetch(host, out)


def model(config: dict[str, Any], layers: int, form: str = "Q8_0") -> tuple[ModelSpec, FileLike]:
    config = {**config, "num_hidden_layers": layers}
    spec = spec_from_config(config)
    torch.manual_seed(0)
    weights = {}
    for tensor in tensor_table(spec):
        values = torch.randn(tensor.shape) * 0.1 + (1 if tensor.role == "norm" else 0)
        weights[gguf_name(tensor)] = packed(values.numpy(), form if tensor.packable else "F32")
    return spec, FileLike("gguf", config, weights)


def gguf_name(tensor: TensorSpec) -> str:
    """GGUF has all experts of a layer in one tensor, as it takes to use them in the file."""
    base, suffix = tensor.name.rsplit(".", 1)
    key = base if tensor.layer is None else base.split(".", 3)[3]
    return f"{NAMES['gguf'][key][0].base.format(i=tensor.layer)}.{suffix}"


class Run:
    """A decoder with some placements, on a virtual device or the CPU."""

    def __init__(
        self, spec: ModelSpec, source: FileLike, placements: dict[str, Any], away: bool, experts: bool = False
    ) -> None:
        cpu, gpu = CpuBackend(CPU), Unreliable(Device("virtual:0", "virtual", 1 << 30))
        self.spec, self.gpu, self.ledger = spec, gpu, Ledger([CPU, gpu.device])
        backend = gpu if away else cpu
        apart = dict.fromkeys(range(spec.num_layers), cpu) if experts else {}
        places = Backends(cpu, (backend,) * spec.num_layers, cpu, apart, placements)
        limits = {"context_length": 64, "max_rows": 64, "max_logit_rows": 64}
        self.decoder: Decoder = load_decoder(source, spec, places, self.ledger, **limits)

    def logits(self, steps: int = 3) -> np.ndarray:
        kv = DenseKV(self.spec, CpuBackend(CPU), 1, 32)
        tokens = [int(t) for t in np.random.default_rng(3).integers(0, 96, 8 + steps)]
        out = [self.decoder.forward(kv.batch([(0, tokens[:8], 0)]), kv).copy()]
        out += [self.decoder.forward(kv.batch([(0, [tokens[8 + i]], 8 + i)]), kv).copy() for i in range(steps)]
        return np.concatenate(out)

    def reserved(self, device: str, kind: Kind) -> int:
        return {(row.device, row.kind): row.reserved for row in self.ledger.rows()}.get((device, kind), 0)


def every(layers: int, placement: str) -> dict[str, Any]:
    return {f"layers.{i}": placement for i in range(layers)}


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(("placement", "away"), [("stream", True), ("disk", True), ("disk", False)])
def test_streams_of_any_length_give_the_same_bits(
    config: dict[str, Any], layers: int, placement: str, away: bool
) -> None:
    spec, source = model(config, layers)
    plain = Run(spec, source, {}, away)
    streamed = Run(spec, source, every(layers, placement), away)
    assert np.array_equal(plain.logits(), streamed.logits())
    held = streamed.reserved("virtual:0", Kind.WEIGHTS)
    assert held < plain.reserved("virtual:0", Kind.WEIGHTS) or not away
    if away:
        assert streamed.gpu.arena.used <= sum(r.reserved for r in streamed.ledger.rows() if r.device == "virtual:0")
    streamed.decoder.close()
    assert not any(row.reserved for row in streamed.ledger.rows())


@pytest.mark.parametrize("placement", ["resident", "disk"])
def test_experts_apart_give_the_same_bits(placement: str) -> None:
    spec, source = model(MOE, 3)
    plain = Run(spec, source, {}, away=False)
    apart = Run(spec, source, {f"layers.{i}.experts": placement for i in range(3)}, away=True, experts=True)
    expected = plain.logits()
    assert np.array_equal(apart.logits(), expected)
    for other in ("disk", "resident", placement):
        apart.decoder.move(dict.fromkeys((0, 2), other))
        assert np.array_equal(apart.logits(), expected)
    experts = sum(w.nbytes for name, w in source.weights.items() if "_exps" in name)
    assert apart.reserved("virtual:0", Kind.WEIGHTS) + experts <= sum(w.nbytes for w in source.weights.values())
    assert apart.reserved("virtual:0", Kind.STAGING) == 0


@pytest.mark.parametrize(("placement", "away"), [("stream", True), ("disk", False)])
def test_what_goes_wrong_beside_a_step_is_its_error_and_the_next_step_works(placement: str, away: bool) -> None:
    spec, source = model(DENSE, 4)
    run = Run(spec, source, every(4, placement), away)
    expected = run.logits()
    run.gpu.failures = source.failures = 1
    with pytest.raises((ValueError, OSError), match=r"broadcast|gone"):
        run.logits()
    assert np.array_equal(run.logits(), expected)


@pytest.mark.parametrize(("placement", "away"), [("stream", True), ("disk", True), ("disk", False)])
def test_a_step_may_be_cut_short(placement: str, away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, source = model(DENSE, 5)
    run = Run(spec, source, every(5, placement), away)
    expected = run.logits()
    layer = DenseKV.layer
    for last in range(5):

        def stop(self: DenseKV, index: int, last: int = last) -> Any:
            if index == last:
                raise RuntimeError("no cache")
            return layer(self, index)

        with monkeypatch.context() as patch:
            patch.setattr(DenseKV, "layer", stop)
            with pytest.raises(RuntimeError, match="no cache"):
                run.logits()
        assert np.array_equal(run.logits(), expected)


@pytest.mark.parametrize(
    ("mode", "cap", "disk"), [("experts", 300_000, 0), ("experts", 150_000, 1), ("stream", 330_000, 0)]
)
def test_a_plan_for_experts_is_executed_to_the_byte(mode: Any, cap: int, disk: int) -> None:
    spec, source = model(MOE, 4)
    gpu, host = Device("virtual:0", "virtual", cap), Device("cpu", "cpu", PIECE + 590_000 if disk else 1 << 24)
    machine = replace(ASSUMED_HOST, profiles={"cpu": replace(ASSUMED_HOST.host, runtime=0)})
    wanted = Constraints(context=64, chunk=8, kv_type="f16", disk=disk << 24, modes=(mode,), swap=0)
    made = plan(plannable("moe", spec, source), [gpu, host], machine, wanted)
    assert {part.placement for part in (made.experts or made.layers)} >= {
        "stream" if mode == "stream" else "disk" if disk else "host"
    }
    ledger, backends = Ledger(made.devices), {"cpu": CpuBackend(host), "virtual:0": VirtualBackend(gpu)}
    decoder = _load_weights(source, spec, made, backends, ledger, None)
    for index, part in enumerate(made.layers):
        apart = any(other.name == f"{part.name}.experts" for other in made.experts)
        assert decoder.backends.layers[index] is backends[part.device]
        assert (index in decoder.backends.experts) == apart
    ledger.reserve("cpu", Kind.STAGING, repacking(made.parts()))  # the runtime's part
    reserved = {(row.device, row.kind): row.reserved for row in ledger.rows()}
    for row in made.predictions:
        if row.kind in (Kind.WEIGHTS, Kind.STAGING, Kind.PAGE_CACHE):
            assert reserved[row.device, row.kind] == row.nbytes, row


def check_reserved(run: Run) -> None:
    """The ledger has what the layers take where they are, and the device holds no more."""
    needed = run.decoder.mover.needed(run.decoder.mover.places)
    assert needed["virtual:0", Kind.STAGING] == run.reserved("virtual:0", Kind.STAGING)
    assert needed["cpu", Kind.STAGING] == run.reserved("cpu", Kind.STAGING)
    assert run.gpu.arena.used <= sum(row.reserved for row in run.ledger.rows() if row.device == "virtual:0")


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_layers_move_anywhere_and_give_the_same_bits(config: dict[str, Any], away: bool, seed: int) -> None:
    rng = random.Random(seed)
    spec, source = model(config, 6)
    placed = {"layers.1": "stream" if away else "disk", "layers.4": "disk"} if seed else {}
    run, plain = Run(spec, source, placed, away), Run(spec, source, {}, away)
    expected, before, rows = run.logits(1), dict(run.decoder.mover.places), run.ledger.rows()
    for _ in range(5):
        wanted = {i: rng.choice(["resident", "stream", "disk"][:: 1 if away else 2]) for i in rng.sample(range(6), 4)}
        run.decoder.move(wanted)
        assert run.decoder.mover.places.items() >= wanted.items()
        check_reserved(run)
        assert np.array_equal(run.logits(1), expected)
    run.decoder.move(dict.fromkeys(range(6), "resident"))
    assert [r.reserved for r in run.ledger.rows() if r.reserved] == [
        r.reserved for r in plain.ledger.rows() if r.reserved
    ]
    run.decoder.move(before)
    assert {(r.device, r.kind): r.reserved for r in run.ledger.rows() if r.reserved} == {
        (r.device, r.kind): r.reserved for r in rows if r.reserved
    }
    assert np.array_equal(run.logits(1), expected)
    run.decoder.close()
    assert not any(row.reserved for row in run.ledger.rows())
    assert run.gpu.arena.used < 1000  # what a backend knows attentions by: the frequencies of rope, norms


def test_a_device_over_its_cap_gets_slots_from_the_weights_that_leave() -> None:
    spec, source = model(DENSE, 6)
    run = Run(spec, source, {}, away=True)
    expected, used = run.logits(), (1 << 30) - run.ledger.free("virtual:0")
    layer = run.decoder.mover.needed(run.decoder.mover.places)["virtual:0", Kind.WEIGHTS] // 6
    run.ledger.set_cap("virtual:0", used - layer)
    run.gpu.device = run.gpu.arena.device = Device("virtual:0", "virtual", run.gpu.arena.used)
    with pytest.raises(BudgetExceeded):
        run.decoder.move({3: "stream"})  # the slots take more than it gives
    run.decoder.move(dict.fromkeys((0, 2, 4), "stream"))
    assert run.ledger.free("virtual:0") >= 0
    assert np.array_equal(run.logits(), expected)
    with pytest.raises(BudgetExceeded):
        run.decoder.move({0: "resident"})
    check_reserved(run)
    run.ledger.set_cap("virtual:0", used)
    run.decoder.move(dict.fromkeys((0, 2, 4), "resident"))
    assert run.ledger.free("virtual:0") == 0
    assert np.array_equal(run.logits(), expected)


@pytest.mark.parametrize("away", [True, False])
def test_a_move_that_fails_changes_nothing(away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, source = model(DENSE, 5)
    run = Run(spec, source, {}, away)
    expected = run.logits()
    run.decoder.move(dict.fromkeys((0, 3), "disk"))
    rows, places, used = run.ledger.rows(), dict(run.decoder.mover.places), run.gpu.arena.used
    moves: list[dict[int, Any]] = [dict.fromkeys((0, 3), "resident"), {1: "stream" if away else "disk", 3: "resident"}]
    for wanted in moves:
        for last in range(0, 9, 2):
            read, reads = FileLike.read, iter(range(100))

            def fail(self: FileLike, name: str, read: Any = read, reads: Any = reads, last: int = last) -> Any:
                if next(reads) == last:
                    raise CheckpointError("the disk is gone")
                return read(self, name)

            with monkeypatch.context() as patch:
                patch.setattr(FileLike, "read", fail)
                with pytest.raises(CheckpointError, match="gone"):
                    run.decoder.move(wanted)
            assert (run.decoder.mover.places, run.gpu.arena.used) == (places, used)
            assert [r.reserved for r in run.ledger.rows() if r.reserved] == [r.reserved for r in rows if r.reserved]
    assert np.array_equal(run.logits(), expected)
    run.decoder.move(dict.fromkeys((0, 3), "resident"))
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "as_stored", lambda *_: False)
        assert run.decoder.mover.can(1, "disk") == away
        if not away:
            with pytest.raises(UnsupportedError):
                run.decoder.move({1: "disk"})
    assert np.array_equal(run.logits(), expected)
    with monkeypatch.context() as patch:
        patch.setattr(LayerBuilder, "layer", lambda *_: fail(source, "", reads=iter([last]), last=last))
        with pytest.raises(CheckpointError, match="gone"):  # nor can the layers be had as they were
            run.decoder.move({1: "disk"})
    with pytest.raises(CheckpointError, match="anew"):
        run.logits()


def test_closing_waits_for_the_threads() -> None:
    before = set(threading.enumerate())
    spec, source = model(DENSE, 4)
    for placement, away in (("disk", True), ("disk", False), ("stream", True)):
        run = Run(spec, source, every(4, placement), away)
        run.logits()
        run.decoder.close()
        run.decoder.close()
        del run
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()

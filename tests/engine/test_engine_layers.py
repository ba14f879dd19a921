"""Caps of devices and host that go up and down at random: layers move, and no text changes."""

from __future__ import annotations

import random

import pytest
from tiny_model import VOCAB, Tiny

from chandra.config import SamplingParams
from chandra.engine import Engine, Pressure
from chandra.memory.ledger import Kind

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PLENTY = 1 << 30


def start(engine: Engine) -> dict[int, list[int]]:
    rng = random.Random(1)
    prompts = [rng.choices(range(VOCAB), k=rng.randint(5, 30)) for _ in range(8)]
    return {engine.add(prompt, GREEDY)[0]: [] for prompt in prompts}


def run(engine: Engine, texts: dict[int, list[int]], steps: int = 10**6) -> None:
    while engine.has_work() and steps:
        for output in engine.step():
            assert output.error is None
            texts[output.seq_id] += output.token_ids
        engine.blocks.check_integrity()
        steps -= 1


def reserved(model: Tiny) -> dict[tuple[str, Kind], int]:
    return {(row.device, row.kind): row.reserved for row in model.ledger.rows() if row.reserved}


def of_device(model: Tiny, device: str) -> int:
    return sum(nbytes for (name, _), nbytes in reserved(model).items() if name == device)


def check_arenas(model: Tiny) -> None:
    for backend in model.decoder.backends.distinct():
        if hasattr(backend, "arena"):
            assert backend.arena.used <= of_device(model, backend.device.name)


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("virtual", 1), ("virtual", 2), ("virtual", 3)])
@pytest.mark.parametrize("seed", range(3))
def test_caps_that_change_at_random_move_layers_and_change_no_text(backend: str, devices: int, seed: int) -> None:
    rng = random.Random(seed)
    model = Tiny("llama", backend, max_rows=64, layers=6 * devices, devices=devices)
    engine = model.engine(seqs=8, chunk=64, slots=rng.choice([0, 40]))
    pressure = Pressure(engine, model.decoder, model.ledger, 0, lambda: 1 << 40, patience=0)
    wanted, texts = start(engine), dict[int, list[int]]()
    run(engine, wanted)
    before, names = reserved(model), {each.device.name for each in model.places}
    least = {name: of_device(model, name) for name in model.ledger.names}
    texts = start(engine)
    while engine.has_work():
        run(engine, texts, rng.randint(1, 3))
        for name in names:
            kv, weights = before[name, Kind.KV] + before.get((name, Kind.SWAP), 0), before[name, Kind.WEIGHTS]
            deep = least[name] - kv - int(rng.uniform(0, 0.2) * weights)  # no cache is so small: layers have to go
            model.ledger.set_cap(name, rng.choice([PLENTY, least[name] - kv // 2, deep, deep]))
        if "cpu" not in names:
            model.ledger.set_cap("cpu", of_device(model, "cpu") + rng.choice([devices * 200_000, PLENTY]))
        pressure._next = 0.0
        pressure.poll()
        for name in names:
            assert model.ledger.free(name) >= 0 or not pressure.relieve(name, 1)
        check_arenas(model)
    assert list(texts.values()) == list(wanted.values())
    assert engine.counters().pressure["layers"] > 0
    for name in model.ledger.names:
        model.ledger.set_cap(name, PLENTY)
    for _ in range(200):
        pressure._next = 0.0
        pressure.poll()
    assert not pressure.reduced
    assert reserved(model) == before
    assert not model.decoder.mover.streams
    again = start(engine)
    run(engine, again)
    assert list(again.values()) == list(wanted.values())
    engine.pool.close()
    if engine.blocks.swap:
        engine.blocks.swap.close()
    model.decoder.close()
    assert not reserved(model)
    assert all(b.arena.used < 1000 for b in model.places if hasattr(b, "arena"))  # what attentions are known by


def test_layers_that_moved_twice_come_back_all_the_way() -> None:
    model = Tiny("llama", "virtual", max_rows=64, layers=6)
    engine = model.engine(seqs=8, chunk=64)
    pressure = Pressure(engine, model.decoder, model.ledger, 0, lambda: 1 << 40, patience=0)
    before, mover = reserved(model), model.decoder.mover
    layer = mover.needed(mover.places)["virtual:0", Kind.WEIGHTS] // 6
    model.ledger.set_cap("cpu", of_device(model, "cpu") + 4 * layer)
    pressure.relieve("virtual:0", before["virtual:0", Kind.KV] + 2 * layer)
    assert "stream" not in mover.places.values()
    assert len(pressure._moved["virtual:0"]) > 6  # to the host, until more was needed than that had room for
    model.ledger.set_cap("cpu", of_device(model, "cpu"))  # no way back through host memory
    for _ in range(40):
        pressure._next = 0.0
        pressure.poll()
    assert not pressure.reduced
    assert reserved(model) == before

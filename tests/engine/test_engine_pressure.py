"""Giving way: what is taken away and given back in the middle of requests changes no text."""

from __future__ import annotations

import random

import pytest
from tiny_model import SIZE, VOCAB, Tiny

from chandra.config import SamplingParams
from chandra.engine import Engine, Output, Pressure
from chandra.errors import BudgetExceeded

MIB = 1 << 20
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama-cpu", "gemma3-virtual"])
def model(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(*request.param.split("-"), max_rows=64)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(VOCAB), k=rng.randint(5, 30)) for _ in range(count)]


def run(engine: Engine, texts: dict[int, list[int]], steps: int = 10**6) -> dict[int, Output]:
    last = {}
    while engine.has_work() and steps:
        for output in engine.step():
            texts.setdefault(output.seq_id, []).extend(output.token_ids)
            last[output.seq_id] = output
        engine.blocks.check_integrity()
        steps -= 1
    return last


@pytest.fixture(scope="module")
def wanted(model: Tiny) -> list[list[int]]:
    engine, texts = model.engine(seqs=8, chunk=64), dict[int, list[int]]()
    ids = [engine.add(prompt, GREEDY)[0] for prompt in prompts(8)]
    run(engine, texts)
    engine.pool.close()
    return [texts[i] for i in ids]


def made(model: Tiny, seqs: int = 8, slots: int = 0, available: int = 1 << 40) -> tuple[Engine, Pressure, list[int]]:
    """An engine, its pressure, and a reading of the system's memory to be changed."""
    model.ledger.set_cap(model.backend.device.name, 1 << 30)
    model.decoder.move(dict.fromkeys(range(model.spec.num_layers), "resident"))
    if model.decoder.max_rows != 64:
        model.decoder.resize(64)
    engine, reading = model.engine(seqs=seqs, chunk=64, slots=slots), [available]
    pressure = Pressure(engine, model.decoder, model.ledger, MIB, lambda: reading[0], patience=0)
    return engine, pressure, reading


def squeeze(model: Tiny, nbytes: int) -> None:
    """Lower the cap so that the device is over it by `nbytes`."""
    device = model.backend.device.name
    reserved = sum(row.reserved for row in model.ledger.rows() if row.device == device)
    model.ledger.set_cap(device, reserved - nbytes)


def close(engine: Engine) -> None:
    engine.pool.close()
    if engine.blocks.swap:
        engine.blocks.swap.close()


@pytest.mark.parametrize("slots", [0, 100])
def test_a_lowered_cap_is_kept_by_giving_way_in_order_and_taken_back(
    model: Tiny, wanted: list[list[int]], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pressure, _ = made(model, slots=slots)
    released: list[int] = []  # what was free each time
    monkeypatch.setattr(model.backend, "release_unused", lambda: released.append(model.ledger.free(device)))
    device, ledger = model.backend.device.name, model.ledger
    ids, texts = [engine.add(prompt, GREEDY)[0] for prompt in prompts(8)], dict[int, list[int]]()
    run(engine, texts, 9)
    before, swapped = engine.pool.nbytes, engine.blocks.swap.pool.nbytes if slots and device == "cpu" else 0
    squeeze(model, 1)
    pressure.poll()
    assert [step.action for step in pressure.steps] == ["swap" if swapped else "cache"]
    assert engine.scheduler.preemptions == 0
    held = engine.pool.bytes_of({i: a.in_use for i, a in enumerate(engine.blocks.allocators)})
    squeeze(model, swapped + engine.pool.nbytes - held * 6 // 10)
    pressure.poll()
    engine.blocks.check_integrity()
    assert ledger.free(device) >= 0
    assert [step.action for step in pressure.steps][-2:] == ["cache", "spill"]
    assert len(released) == 2
    assert released[-1] >= 0
    assert engine.scheduler.preemptions > 0
    assert engine.pool.nbytes <= held * 6 // 10
    run(engine, texts)
    assert [texts[i] for i in ids] == wanted
    counters = engine.counters()
    assert counters.pressure["spill"] == 1
    assert (counters.swapped_in_blocks > 0) == (slots > 0 and device != "cpu")
    ledger.set_cap(device, 1 << 30)
    for _ in range(4):
        pressure._next = 0.0
        pressure.poll()
    assert not pressure.reduced
    assert engine.pool.nbytes == before
    assert pressure.steps[-1].nbytes < 0
    close(engine)


@pytest.mark.parametrize("seed", range(4))
def test_caps_that_change_at_random_change_no_text(model: Tiny, wanted: list[list[int]], seed: int) -> None:
    rng = random.Random(seed)
    engine, pressure, reading = made(model, slots=rng.choice([0, 40]))
    device, ledger = model.backend.device.name, model.ledger
    ids, texts = [engine.add(prompt, GREEDY)[0] for prompt in prompts(8)], dict[int, list[int]]()
    full = engine.pool.nbytes
    fixed = sum(row.reserved for row in ledger.rows() if row.device == device) - full
    while engine.has_work():
        run(engine, texts, rng.randint(1, 4))
        ledger.set_cap(device, fixed + int(full * rng.uniform(0.3, 1.2)))
        reading[0] = rng.choice([0, MIB + 1, 1 << 40])
        pressure._next = 0.0
        pressure.poll()
        engine.blocks.check_integrity()
    assert [texts[i] for i in ids] == wanted
    model.ledger.set_cap(model.backend.device.name, 1 << 30)
    close(engine)


def test_little_memory_makes_smaller_steps_and_no_flapping(model: Tiny, wanted: list[list[int]]) -> None:
    engine, pressure, reading = made(model)
    ids, texts = [engine.add(prompt, GREEDY)[0] for prompt in prompts(8)], dict[int, list[int]]()
    run(engine, texts, 2)
    reading[0] = MIB // 2  # and nothing that is given back helps

    def poll() -> int:
        pressure._next = 0.0
        before = len(pressure.steps)
        pressure.poll()
        return len(pressure.steps) - before

    if model.backend.device.name != "cpu":
        assert poll() == 0  # the host has nothing of this model
        close(engine)
        return
    assert poll() > 0
    assert engine.scheduler.chunk == 8
    floors = [g.max_blocks(engine.context_len, 64, SIZE) for g in engine.pool.groups]
    assert [a.limit for a in engine.blocks.allocators] == floors
    assert len(engine.scheduler.running) < 8
    reading[0] = MIB + MIB // 2  # neither pressure nor its end
    assert poll() == 0
    run(engine, texts, 12)
    reading[0] = 1 << 40
    assert sum(poll() for _ in range(6)) >= 4
    assert engine.scheduler.chunk == 64
    assert not pressure.reduced
    run(engine, texts)
    assert [texts[i] for i in ids] == wanted
    close(engine)


def test_a_request_that_no_longer_fits_ends_with_an_error_and_the_others_go_on(model: Tiny) -> None:
    engine, pressure, _ = made(model)
    (long,) = engine.add(range(1, 50), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    texts: dict[int, list[int]] = {}
    run(engine, texts, 2)
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    ids = [engine.add(prompt[:8], short)[0] for prompt in prompts(3)]
    run(engine, texts, 1)
    device, six = model.backend.device.name, engine.pool.bytes_of(dict.fromkeys(range(len(engine.pool.groups)), 6))
    chunks = model.decoder.workspace(64)[device] - model.decoder.workspace(8)[device]
    mover = model.decoder.mover
    layers = mover.needed(mover.places), mover.needed(dict.fromkeys(mover.places, "disk"))
    here, away = (sum(n for (name, _), n in need.items() if name == device) for need in layers)
    squeeze(model, engine.pool.nbytes - six + chunks + here - away)
    pressure.poll()
    assert "context" in engine.counters().pressure
    last = run(engine, texts)
    assert last[long].finish_reason == "error"
    assert isinstance(last[long].error, BudgetExceeded)
    assert all(last[i].finish_reason == "length" and last[i].error is None for i in ids)
    model.ledger.set_cap(model.backend.device.name, 1 << 30)
    close(engine)

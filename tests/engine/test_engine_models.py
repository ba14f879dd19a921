"""The engine over real decoders: company, chunks, cached prefixes and preemption change neither logits nor text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny_model import SIZE, VOCAB, Tiny

from chandra.backends.cpu.backend import CpuBackend
from chandra.config import SamplingParams
from chandra.engine import Engine, Output
from chandra.kvcache import index_bytes


@pytest.fixture(scope="module", params=["llama-cpu", "gemma3-cpu", "gemma3-reference"])
def model(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(*request.param.split("-"))


def run(engine: Engine, texts: dict[int, list[int]]) -> dict[int, Output]:
    last: dict[int, Output] = {}
    while engine.has_work():
        for output in engine.step():
            texts.setdefault(output.seq_id, []).extend(output.token_ids)
            last[output.seq_id] = output
    engine.blocks.check_integrity()
    return last


def alone(model: Tiny, prompt: list[int], params: SamplingParams) -> list[int]:
    texts: dict[int, list[int]] = {}
    engine = model.engine(seqs=1, chunk=64, prefix_caching=False)
    (seq_id,) = engine.add(prompt, params)
    run(engine, texts)
    return texts.get(seq_id, [])


def scores(engine: Engine, prompt: list[int]) -> list[float]:
    """Log-probabilities of the prompt's tokens and of one more."""
    (seq_id,) = engine.add(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=0, prompt_logprobs=0))
    last = run(engine, {})[seq_id]
    assert last.prompt_logprobs is not None
    return [s.logprob for s in (*last.prompt_logprobs[1:], *last.logprobs) if s is not None]


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(count)
    made = []
    for _ in range(count):
        prompt = [*range(1, rng.choice([1, 1, 8, 19])), *rng.choices(range(VOCAB), k=rng.randint(1, 24))]
        params = SamplingParams(
            seed=rng.randrange(99), temperature=rng.choice([0, 0.8]), top_k=40, top_p=0.9, max_tokens=rng.randint(1, 12)
        )
        made.append((prompt, params))
    return made


@pytest.mark.parametrize(("seqs", "chunk", "blocks", "slots"), [(32, 64, 0, 0), (5, 9, 17, 0), (5, 9, 17, 20)])
def test_every_sequence_has_the_text_it_has_alone(model: Tiny, seqs: int, chunk: int, blocks: int, slots: int) -> None:
    rng = random.Random(seqs)
    engine = model.engine(seqs=seqs, chunk=chunk, blocks=blocks, slots=slots)
    texts: dict[int, list[int]] = {}
    made, aborted = {}, set()
    for prompt, params in requests(32 if isinstance(model.backend, CpuBackend) else 4):
        (seq_id,) = engine.add(prompt, params)
        made[seq_id] = (prompt, params)
        if rng.random() < 0.3:
            for output in engine.step():
                texts.setdefault(output.seq_id, []).extend(output.token_ids)
        if rng.random() < 0.2:
            aborted.add(victim := rng.choice(list(made)))
            engine.abort(victim)
        engine.blocks.check_integrity()
    run(engine, texts)
    for seq_id, (prompt, params) in made.items():
        text, got = alone(model, prompt, params), texts.get(seq_id, [])
        assert got == (text[: len(got)] if seq_id in aborted else text)
    if blocks and len(made) == 32:
        assert engine.counters().preemptions > 0
        assert (engine.counters().swapped_in_blocks > 0) == (slots > 0)


def test_chunks_cached_prefixes_and_company_leave_the_logits_alone(model: Tiny) -> None:
    prompt = random.Random(3).choices(range(VOCAB), k=45)
    plain = scores(model.engine(seqs=1, chunk=64, rows=64), prompt)
    for chunk, rows in ((5, 64), (16, 64), (64, 4)):
        np.testing.assert_allclose(scores(model.engine(chunk=chunk, rows=rows), prompt), plain, atol=2e-5)
    engine = model.engine(seqs=3, chunk=64, rows=64)
    engine.add(prompt[:30], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    engine.step()
    engine.add(prompt[5:], SamplingParams(seed=1, max_tokens=10, ignore_eos=True))
    np.testing.assert_allclose(scores(engine, prompt), plain, atol=2e-5)
    (cached,) = engine.add(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=0))
    np.testing.assert_allclose(run(engine, {})[cached].logprobs[0].logprob, plain[-1], atol=2e-5)
    assert engine.counters().prefix_hits == 44


def test_prompt_logprobs_are_those_of_a_full_forward(model: Tiny) -> None:
    prompt = random.Random(4).choices(range(VOCAB), k=30)
    engine = model.engine(seqs=1, chunk=64, rows=64)
    captured = []
    forward = model.decoder.forward

    class Spy:
        def forward(self, batch, kv):  # type: ignore[no-untyped-def]
            captured.append(forward(batch, kv).astype(np.float64).copy())
            return captured[-1].astype(np.float32)

    engine.runner._decoder = Spy()
    got = scores(engine, prompt)
    logs = captured[0] - np.log(np.exp(captured[0]).sum(axis=1, keepdims=True))
    wanted = [logs[i, token] for i, token in enumerate(prompt[1:])]
    assert captured[0].shape == (30, VOCAB)
    np.testing.assert_allclose(got, [*wanted, logs[-1].max()], atol=1e-5)


def test_window_layers_keep_only_their_window() -> None:
    model = Tiny("gemma3", "cpu")
    engine = model.engine(context=200, seqs=1, chunk=8)
    assert [g.window for g in engine.blocks.groups] == [9, None]
    (seq_id,) = engine.add(range(1, 61), SamplingParams(seed=1, max_tokens=100, ignore_eos=True))
    most = [0, 0]
    while engine.has_work():
        engine.step()
        engine.blocks.check_integrity()
        table = engine.blocks.tables.get(seq_id)
        if table is not None:
            most = [max(m, int((row >= 0).sum())) for m, row in zip(most, table.rows, strict=True)]
    assert most == [8 // SIZE + 8 // SIZE, 160 // SIZE]


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "q8_0", "q4_0"])
def test_other_cache_types_generate_too(kv_type: str) -> None:
    model = Tiny("llama", "cpu")
    texts: dict[int, list[int]] = {}
    engine = model.engine(kv_type=kv_type)
    ids = [engine.add([5, 6, 7, *range(i, i + 20)], SamplingParams(temperature=0, max_tokens=8))[0] for i in (1, 9)]
    run(engine, texts)
    assert all(1 <= len(texts[i]) <= 8 for i in ids)


def test_the_arrays_of_steps_are_those_that_are_reserved(model: Tiny) -> None:
    engine = model.engine(context=64, seqs=4, chunk=16)
    for prompt, params in requests(4):
        engine.add(prompt, params)
    engine.step()
    view = engine.runner._view
    owners = [engine.runner, view, *engine.blocks.tables.values(), *engine._sequences.values()]
    arrays = [value for owner in owners for value in vars(owner).values() if isinstance(value, np.ndarray)]
    planned = index_bytes(len(view._pool.groups), 4, 64, SIZE, 16, 4)
    assert 0.5 * planned < sum(array.nbytes for array in arrays) <= planned

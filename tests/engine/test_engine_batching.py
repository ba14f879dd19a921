"""Scheduling: whatever the company, the chunks, the cache and the preemptions, a sequence's text is its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cache_reader import SIZE, VOCAB, CacheReader, logits_after, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.config import SamplingParams
from chandra.engine import Engine, Output
from chandra.engine.sampler import derive_seed, sample
from chandra.errors import ContextOverflow, NumericError, RequestError, UsageError


def expected(prompt: list[int], params: SamplingParams, context: int = 64, index: int = 0) -> list[int]:
    """What one sequence must generate, without any engine."""
    tokens = list(prompt)
    seed = derive_seed(params.seed or 0, index)
    stops = {*params.stop_token_ids} | (set() if params.ignore_eos else {0})
    while len(tokens) < context and len(tokens) - len(prompt) != params.max_tokens:
        count = len(tokens) - len(prompt)
        banned = tuple(stops) if count < params.min_tokens else ()
        tokens.append(sample(logits_after(tokens), params, np.array(tokens, np.int32), count, seed, banned))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def run(engine: Engine, texts: dict[int, list[int]] | None = None) -> tuple[dict[int, list[int]], dict[int, Output]]:
    """Step until all is done; texts by sequence, and each sequence's last output."""
    texts = {} if texts is None else texts
    last: dict[int, Output] = {}
    while engine.has_work():
        for output in engine.step():
            texts.setdefault(output.seq_id, []).extend(output.token_ids)
            last[output.seq_id] = output
        engine.blocks.check_integrity()
    return texts, last


def test_one_sequence_greedy() -> None:
    engine, decoder = make_engine()
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (seq_id,) = engine.add(range(30), params)
    texts, last = run(engine)
    assert texts[seq_id] == expected(list(range(30)), params)
    assert last[seq_id].finish_reason == "length"
    assert decoder.steps == [[16], [14], *[[1]] * 19]


def test_the_context_length_ends_a_sequence() -> None:
    engine, _ = make_engine(context=40)
    (seq_id,) = engine.add(range(30), SamplingParams(seed=1, ignore_eos=True))
    texts, last = run(engine)
    assert len(texts[seq_id]) == 10
    assert last[seq_id].finish_reason == "length"


def test_stop_tokens_and_min_tokens() -> None:
    free = expected([1, 2, 3], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    stop = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=(free[4],))
    late = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=(free[4],), min_tokens=6)
    engine, _ = make_engine()
    first, second = engine.add([1, 2, 3], stop)[0], engine.add([1, 2, 3], late)[0]
    texts, last = run(engine)
    assert texts[first] == free[: free.index(free[4]) + 1]
    assert last[first].finish_reason == "stop"
    assert texts[second] == expected([1, 2, 3], late)
    assert free[4] not in texts[second][:6]


def test_prompts_are_cut_at_block_boundaries_beside_decodes() -> None:
    engine, decoder = make_engine()
    engine.add(range(3), SamplingParams(seed=1, max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add(range(50), SamplingParams(seed=1, max_tokens=2, ignore_eos=True))
    run(engine)
    assert decoder.steps[:6] == [[3], [1, 12], [1, 12], [1, 12], [1, 14], [1, 1]]


def random_requests(rng: random.Random, count: int, longest: int) -> list[tuple[list[int], SamplingParams]]:
    requests = []
    for _ in range(count):
        shared = rng.choice([0, 0, 5, 17])
        prompt = [*range(shared), *rng.choices(range(VOCAB), k=rng.randint(1, longest))]
        params = SamplingParams(
            seed=rng.randrange(1000),
            temperature=rng.choice([0, 0.7, 1]),
            top_k=rng.choice([0, 10]),
            max_tokens=rng.randint(0, 25),
            repetition_penalty=rng.choice([1.0, 1.3]),
            n=rng.choice([1, 1, 1, 3]),
        )
        requests.append((prompt, params))
    return requests


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("full", "window", "seqs", "chunk", "slots"),
    [(200, 80, 32, 64, 0), (20, 14, 6, 16, 0), (20, 14, 6, 16, 12), (20, 14, 6, 16, 60), (16, 8, 3, 5, 40)],
)
def test_company_aborts_preemption_and_swap_change_no_text(
    caching: bool, full: int, window: int, seqs: int, chunk: int, slots: int
) -> None:
    rng = random.Random(full)
    engine, _ = make_engine(full, window, 64, seqs, chunk, slots=slots, prefix_caching=caching)
    requests = random_requests(rng, 32, 35)
    texts: dict[int, list[int]] = {}
    wanted: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for prompt, params in requests:
        for index, seq_id in enumerate(engine.add(prompt, params)):
            wanted[seq_id] = expected(prompt, params, index=index)
        for _ in range(rng.choice([0, 0, 1, 3])):
            for output in engine.step():
                texts.setdefault(output.seq_id, []).extend(output.token_ids)
        engine.blocks.check_integrity()
        if rng.random() < 0.2:
            victim = rng.choice(list(wanted))
            engine.abort(victim)
            aborted.add(victim)
    run(engine, texts)
    for seq_id, text in wanted.items():
        got = texts.get(seq_id, [])
        assert got == (text[: len(got)] if seq_id in aborted else text)
    counters = engine.counters()
    assert (counters.running, counters.waiting, counters.cache_usage) == (0, 0, 0)
    assert counters.generated_tokens == sum(map(len, texts.values()))
    if full < 100:
        assert counters.preemptions > 0
        assert (counters.swapped_out_blocks > 0) == (slots > 0)
    assert not engine.blocks.swapped
    if caching:
        assert counters.prefix_hits > 0


@given(seed=st.integers(0, 10_000), full=st.integers(16, 40), chunk=st.integers(5, 40), rows=st.integers(5, 9))
@settings(deadline=None, max_examples=25)
def test_random_engines_give_every_sequence_its_text(seed: int, full: int, chunk: int, rows: int) -> None:
    rng = random.Random(seed)
    engine, _ = make_engine(full, 8 + -(-chunk // SIZE), 64, 5, chunk, rows, slots=rng.choice([0, 10, 40]))
    wanted = {}
    for prompt, params in random_requests(rng, 8, 40):
        for index, seq_id in enumerate(engine.add(prompt, params)):
            wanted[seq_id] = expected(prompt, params, index=index)
    texts, _ = run(engine)
    assert {seq_id: texts.get(seq_id, []) for seq_id in wanted} == wanted


def test_answers_to_one_request_share_its_prompt() -> None:
    engine, decoder = make_engine(prefix_caching=False)
    params = SamplingParams(seed=5, n=3, max_tokens=6, ignore_eos=True)
    ids = engine.add(range(14), params)
    texts, _ = run(engine)
    assert [texts[i] for i in ids] == [expected(list(range(14)), params, index=k) for k in range(3)]
    assert len({tuple(texts[i]) for i in ids}) == 3
    assert decoder.steps[:2] == [[14], [1, 2, 2]]  # 12 of the 14 tokens are shared


def test_the_first_answer_aborted_leaves_the_others() -> None:
    engine, _ = make_engine()
    params = SamplingParams(seed=5, n=3, max_tokens=6, ignore_eos=True)
    ids = engine.add(range(30), params)
    engine.step()
    engine.abort(ids[0])
    texts, _ = run(engine)
    assert [texts[i] for i in ids[1:]] == [expected(list(range(30)), params, index=k) for k in (1, 2)]


def test_a_prompt_that_would_not_fit_beside_the_running_waits() -> None:
    engine, _ = make_engine(full=12, context=48)
    params = SamplingParams(seed=1, max_tokens=10, ignore_eos=True)
    ids = [engine.add(range(start, start + 30), params)[0] for start in (0, 40)]
    texts, _ = run(engine)
    assert [texts[i] for i in ids] == [expected(list(range(s, s + 30)), params, 48) for s in (0, 40)]
    assert engine.counters().preemptions == 0


def test_a_second_request_finds_the_first_ones_answer() -> None:
    engine, decoder = make_engine()
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    (first,) = engine.add(range(20), params)
    texts, _ = run(engine)
    history = [*range(20), *texts[first], 7, 8]
    (second,) = engine.add(history, params)
    texts, _ = run(engine)
    assert texts[second] == expected(history, params)
    assert [sum(step) for step in decoder.steps[11:12]] == [4]  # 28 of 32 tokens were cached
    assert engine.counters().prefix_hits == 28


@pytest.mark.parametrize("rows", [4, 7, 64])
def test_prompt_logprobs_come_in_bounded_slices(rows: int) -> None:
    engine, _ = make_engine(rows=rows)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
    engine.add(prompt, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    engine.step()
    (seq_id,) = engine.add(prompt, SamplingParams(max_tokens=1, seed=1, prompt_logprobs=2, logprobs=0))
    (blank,) = engine.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    _, last = run(engine)
    scores = last[seq_id].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == len(prompt)
    for position, score in enumerate(scores[1:], 1):
        row = logits_after(prompt[:position]).astype(np.float64)
        logs = row - np.log(np.exp(row).sum())
        assert score is not None
        assert score.token_id == prompt[position]
        assert score.logprob == pytest.approx(logs[prompt[position]], abs=1e-5)
        assert [t for t, _ in score.top] == np.argsort(-logs)[:2].tolist()
    assert last[seq_id].logprobs[0].token_id == last[seq_id].token_ids[0]
    assert last[blank].token_ids == ()
    assert last[blank].finish_reason == "length"
    assert [s and s.logprob for s in last[blank].prompt_logprobs or ()] == [s and s.logprob for s in scores]


def test_logits_that_are_not_numbers_end_only_their_sequence() -> None:
    engine, decoder = make_engine()
    decoder.poison = 50
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (bad,) = engine.add([1, 2, 50], params)
    (good,) = engine.add([1, 2, 51], params)
    texts, last = run(engine)
    assert isinstance(last[bad].error, NumericError)
    assert last[bad].finish_reason == "error"
    assert texts[good] == expected([1, 2, 51], params)


def test_a_step_that_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decoder = make_engine()
    params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    ids = [engine.add([*range(20), i], params)[0] for i in (1, 2)]
    texts: dict[int, list[int]] = {}
    for step in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(CacheReader, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.blocks.check_integrity()
        for output in engine.step():
            texts.setdefault(output.seq_id, []).extend(output.token_ids)
        assert len(decoder.steps) == step + 1
    run(engine, texts)
    assert [texts[i] for i in ids] == [expected([*range(20), i], params) for i in (1, 2)]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 8])
def test_abort_in_every_state(steps: int) -> None:
    engine, _ = make_engine(seqs=2)
    ids = [engine.add(range(40), SamplingParams(seed=1, max_tokens=30, ignore_eos=True))[0] for _ in range(3)]
    for _ in range(steps):
        engine.step()
    for seq_id in (ids[2], ids[0], ids[1], ids[1], 99):  # waiting, running, running, gone, unknown
        engine.abort(seq_id)
        engine.blocks.check_integrity()
    assert not engine.has_work()
    assert engine.step() == []
    counters = engine.counters()
    assert (counters.running, counters.waiting, counters.cache_usage) == (0, 0, 0)
    assert counters.finished == {"abort": 3}


def test_requests_that_cannot_be_served_are_refused() -> None:
    engine, _ = make_engine(full=8, context=64)  # 32 tokens
    with pytest.raises(ContextOverflow, match="32"):
        engine.add(range(32), SamplingParams())
    engine.add(range(32), SamplingParams(max_tokens=0, prompt_logprobs=0))
    with pytest.raises(RequestError, match="empty"):
        engine.add([], SamplingParams())
    with pytest.raises(RequestError, match="97"):
        engine.add([1, 97], SamplingParams())
    with pytest.raises(RequestError, match="98"):
        engine.add([1], SamplingParams(logit_bias={98: 1.0}))
    run(engine)


def test_a_pool_that_cannot_hold_the_window_is_refused() -> None:
    with pytest.raises(UsageError, match="window"):
        make_engine(window=3)

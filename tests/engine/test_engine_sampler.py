"""The sampler: each filter against a plain reference, and draws against the exact distribution."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chandra.config import SAMPLING, SamplingParams
from chandra.engine.sampler import derive_seed, largest, logprobs_of, sample, uniform
from chandra.errors import NumericError

Row = np.ndarray[Any, np.dtype[np.float32]]
NO_HISTORY = np.array([], dtype=np.int32)

logits = st.integers(1, 300).flatmap(
    lambda n: arrays(
        np.float32,
        n,
        elements=st.sampled_from([-3.0, 0.0, 0.5, 1.0, 2.5]) | st.integers(-2000, 2000).map(lambda i: i / 128),
    )
)


def softmax(values: Row) -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = np.exp(values.astype(np.float64) - values.max())
    return weights / weights.sum()


def reference(row: Row, p: SamplingParams) -> dict[int, float]:
    """Probabilities of the tokens that may come, the slow and obvious way."""
    tokens = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < p.top_k < len(row):
        tokens = tokens[: p.top_k]
    if p.typical_p < 1:
        tokens = [t for t in tokens if row[t] > -np.inf]
        probs = softmax(row[tokens])
        entropy = -sum(q * math.log(q) for q in probs if q)
        order = sorted(range(len(tokens)), key=lambda i: abs(-math.log(max(probs[i], 1e-300)) - entropy))
        mass, kept = 0.0, set()
        for i in order:
            kept.add(tokens[i])
            mass += probs[i]
            if mass > p.typical_p:
                break
        tokens = [t for t in tokens if t in kept]
    if p.top_p < 1:
        mass, kept = 0.0, set()
        for t, q in zip(tokens, softmax(row[tokens]), strict=True):
            kept.add(t)
            mass += q
            if mass >= p.top_p:
                break
        tokens = [t for t in tokens if t in kept]
    probs = softmax(row[tokens])
    tokens = [t for t, q in zip(tokens, probs, strict=True) if q >= p.min_p * probs.max()]
    return dict(zip(tokens, softmax(row[tokens] / max(p.temperature, 1e-4)), strict=True))


def support(row: Row, params: SamplingParams, draws: int = 400) -> set[int]:
    return {sample(row.copy(), params, NO_HISTORY, i, 7) for i in range(draws)}


@given(row=logits, count=st.integers(1, 40))
@settings(deadline=None)
def test_largest_is_the_head_of_a_full_sort(row: Row, count: int) -> None:
    assert largest(row, count).tolist() == sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]


def test_largest_of_a_big_vocabulary() -> None:
    row = np.random.default_rng(0).standard_normal(262_144 + 37).astype(np.float32).round(2)
    for count in (1, 40, 1000):
        assert largest(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


@given(
    row=logits,
    top_k=st.sampled_from([0, 1, 5, 40]),
    typical_p=st.sampled_from([1.0, 0.2, 0.9]),
    top_p=st.sampled_from([1.0, 0.0, 0.31, 0.93]),
    min_p=st.sampled_from([0.0, 0.011, 0.37]),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_only_tokens_of_the_reference_come(
    row: Row, top_k: int, typical_p: float, top_p: float, min_p: float, temperature: float
) -> None:
    params = SamplingParams(top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p, temperature=temperature, seed=1)
    slack = SamplingParams(
        top_k=top_k,
        typical_p=min(1, typical_p + 1e-5),
        top_p=min(1, top_p + 1e-5),
        min_p=max(0, min_p - 1e-5),
        temperature=temperature,
    )
    allowed = reference(row, slack) | reference(row, params)  # rounding decides at the very edge
    drawn = support(row, params, 30)
    assert drawn <= set(allowed)


CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.8, temperature=1.7, top_k=20),
    SamplingParams(min_p=0.1, temperature=1.3),
    SamplingParams(typical_p=0.6),
    SamplingParams(top_k=30, typical_p=0.9, top_p=0.9, min_p=0.02, temperature=0.9),
]


@pytest.mark.parametrize("params", CASES)
@pytest.mark.parametrize("vocab", [50, 5003])
def test_draws_follow_the_exact_distribution(params: SamplingParams, vocab: int) -> None:
    row = (np.random.default_rng(vocab).standard_normal(vocab) * (2 if vocab < 100 else 4)).astype(np.float32)
    expected = reference(row, params)
    draws = 4000
    counts = dict.fromkeys(expected, 0)
    for i in range(draws):
        counts[sample(row.copy(), params, NO_HISTORY, i, 42)] += 1  # a KeyError: a token that may not come
    common = [t for t, q in expected.items() if q * draws >= 5]
    rest = draws - sum(counts[t] for t in common)
    rest_expected = draws * (1 - sum(expected[t] for t in common))
    chi2 = sum((counts[t] - expected[t] * draws) ** 2 / (expected[t] * draws) for t in common)
    if rest_expected >= 5:
        chi2 += (rest - rest_expected) ** 2 / rest_expected
    freedom = len(common) - (rest_expected < 5)
    assert chi2 <= freedom + 4 * math.sqrt(2 * max(freedom, 1)) + 4


def test_uniform_numbers_are_uniform_and_differ_between_seeds() -> None:
    numbers = np.array([[uniform(seed, i) for i in range(2000)] for seed in (0, 1, -5, 2**63)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert np.abs(numbers.mean(axis=1) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.08
    assert len({derive_seed(3, i) for i in range(100)}) == 100
    assert derive_seed(3, 0) == 3


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(np.array([1, 5, 5, 2], np.float32), SamplingParams(temperature=0), NO_HISTORY, 0, 0) == 1


def test_bias_and_bans_come_before_everything() -> None:
    row = np.array([1, 5, 4, 2], np.float32)
    greedy = SamplingParams(temperature=0, logit_bias={3: 100.0})
    assert sample(row.copy(), greedy, NO_HISTORY, 0, 0) == 3
    assert sample(row.copy(), SamplingParams(temperature=0), NO_HISTORY, 0, 0, banned=(1,)) == 2
    assert support(row, SamplingParams(logit_bias={0: -math.inf, 1: -math.inf, 2: -math.inf})) == {3}
    assert sample(row.copy(), SamplingParams(logit_bias={0: 1e300}), NO_HISTORY, 0, 0) == 0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(repetition_penalty=2.0), [4.0, -4.0, 3.0, 1.0]),  # token 2 is too long ago
        (SamplingParams(repetition_penalty=2.0, repeat_last_n=-1), [4.0, -4.0, 1.5, 1.0]),
        (SamplingParams(repetition_penalty=2.0, repeat_last_n=0), [8.0, -2.0, 3.0, 1.0]),
        (SamplingParams(frequency_penalty=0.5), [7.0, -2.5, 3.0, 1.0]),
        (SamplingParams(presence_penalty=0.5), [7.5, -2.5, 3.0, 1.0]),
    ],
)
def test_penalties_change_the_logits_as_in_llama_cpp(params: SamplingParams, expected: list[float]) -> None:
    row = np.array([8, -2, 3, 1], np.float32)
    history = np.array([2, *[0, 1, 0]], np.int32)
    if params.repeat_last_n == 64:
        params = SamplingParams(
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repeat_last_n=3,
        )
    sample(row, params, history, 0, 0)
    assert row.tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=2, top_p=0.5)]
)
def test_logits_that_are_not_numbers_are_an_error(bad: float, params: SamplingParams) -> None:
    row = np.array([1, bad, 3, 2], np.float32)
    with pytest.raises(NumericError, match="not numbers"):
        sample(row.copy(), params, NO_HISTORY, 0, 0)
    with pytest.raises(NumericError):
        logprobs_of(row, 0, 2)


@given(row=logits, top=st.integers(0, 5))
@settings(deadline=None)
def test_logprobs_are_a_log_softmax(row: Row, top: int) -> None:
    expected = np.log(softmax(row))
    result = logprobs_of(row, len(row) // 2, top)
    np.testing.assert_allclose(result.logprob, expected[len(row) // 2], atol=1e-5)
    assert [t for t, _ in result.top] == sorted(range(len(row)), key=lambda i: (-row[i], i))[:top]
    np.testing.assert_allclose([p for _, p in result.top], expected[[t for t, _ in result.top]], atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"typical_p": 0.9},
        {"typical_p": 0.9, "top_p": 0.99, "min_p": 0.01, "top_k": 100_000},
        {"repetition_penalty": 1.1, "min_p": 0.0001},
    ],
    ids=str,
)
def test_choosing_takes_no_more_than_is_reserved(params: dict[str, Any]) -> None:
    row = np.random.default_rng(0).standard_normal(150_000).astype(np.float32) * 2
    tracemalloc.start()
    try:
        raw = row.copy()
        token = sample(row, SamplingParams(**params), np.arange(50, dtype=np.int32), 3, 1)
        logprobs_of(raw, token, 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= SAMPLING * row.size + (64 << 10)

"""From a row of logits to the next token.

The order is llama.cpp's default: logit bias, penalties, top-k, typical, top-p, min-p, and the temperature last, so the
filters look at the model's own probabilities. (Ollama's own runner and the OpenAI-style servers apply the temperature
before top-p; both agree at temperature 1.) Filters keep at least one token; equal logits rank by token id.

A draw depends on the sequence's seed and on how many tokens it has generated, and on nothing else.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from chandra.config import SamplingParams
from chandra.errors import NumericError
from chandra.ops.contracts import IntArray

Row: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Ids: TypeAlias = np.ndarray[Any, np.dtype[np.intp]]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_BINS, _DEPTH = 4096, 32  # how finely, and how far below the largest logit, a wide nucleus is sorted into bins
_LANES = 64  # a row is cut into this many runs where its largest entries or its mass are looked for


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities (before penalties, filters and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, best first


def mix(value: int) -> int:
    """A bijection of 64-bit integers that looks random (the finalizer of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(seed: int, index: int) -> int:
    """The seed of the index-th answer to a request; that of the first is the request's own."""
    return seed if index == 0 else mix((mix(seed & _MASK) + index) & _MASK)


def uniform(seed: int, counter: int) -> float:
    """The counter-th number of a seed's stream, in [0, 1) (splitmix64: Steele, Lea and Flood, 2014)."""
    return (mix((mix(seed & _MASK) + (counter + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53


def largest(row: Row, count: int) -> Ids:
    """The ids of the `count` largest entries, largest first, of equal ones the lower id first."""
    width = row.size // _LANES
    if count * 4 < width:
        # the count-th largest of the lanes' column maxima bounds the count-th largest entry from below
        peaks = row[: width * _LANES].reshape(_LANES, width).max(axis=0)
        ids = np.flatnonzero(row >= np.partition(peaks, width - count)[width - count])
    else:
        ids = np.arange(row.size)
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def logprobs_of(row: Row, token_id: int, top: int) -> TokenLogprobs:
    """Log-probability of a token, and of the `top` most likely ones. row `(vocab,)`."""
    peak = float(row.max())
    _require_finite(peak)
    log_mass = peak + math.log(np.exp(row - np.float32(peak)).sum(dtype=np.float64))
    best = [(int(i), float(row[i]) - log_mass) for i in largest(row, top)] if top else []
    return TokenLogprobs(token_id, float(row[token_id]) - log_mass, tuple(best))


def sample(
    row: Row, params: SamplingParams, history: IntArray, generated: int, seed: int, banned: tuple[int, ...] = ()
) -> int:
    """The next token. row `(vocab,)` is overwritten; `history` is the prompt and what was generated so far.

    `banned` tokens cannot come. Raises NumericError on NaN or infinite logits.
    """
    for token_id, bias in params.logit_bias.items():
        row[token_id] += min(max(bias, -1e30), 1e30)  # an infinite bias must not pass for infinite logits
    for token_id in banned:
        row[token_id] = -np.inf
    _penalize(row, params, history)
    if params.temperature <= 0:
        token = int(row.argmax())  # NaN counts as the largest
        _require_finite(float(row[token]))
        return token
    _require_finite(float(row.max()))
    ids, values = _filter(row, params)
    weights = np.exp((values - values.max()) / np.float32(max(params.temperature, 1e-4)))
    choice = _draw(weights, uniform(seed, generated))
    return choice if ids is None else int(ids[choice])


def _require_finite(peak: float) -> None:
    if not math.isfinite(peak):
        raise NumericError(
            f"the model's logits are not numbers (largest: {peak})",
            "the weights may be damaged or their format too coarse; check the file, or try another quantization",
        )


def _penalize(row: Row, params: SamplingParams, history: IntArray) -> None:
    """Repetition, frequency and presence penalties on the last `repeat_last_n` tokens (-1: all), as llama.cpp's."""
    last = len(history) if params.repeat_last_n < 0 else params.repeat_last_n
    if last == 0 or (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1, 0, 0):
        return
    ids, counts = np.unique(history[-last:], return_counts=True)
    values = row[ids]
    values = np.where(values <= 0, values * params.repetition_penalty, values / params.repetition_penalty)
    row[ids] = values - counts * params.frequency_penalty - params.presence_penalty


def _filter(row: Row, params: SamplingParams) -> tuple[Ids | None, Row]:
    """The tokens that may come and their logits; None stands for all tokens in order."""
    ids, values = None, row
    if 0 < params.top_k < row.size:
        ids, values = _select(ids, values, largest(values, params.top_k))
    if params.typical_p < 1:
        ids, values = _select(ids, values, _typical(values, params.typical_p))
    if params.top_p < 1:
        ids, values = _select(ids, values, _nucleus(values, params.top_p))
    if params.min_p > 0:
        ids, values = _select(ids, values, np.flatnonzero(values >= values.max() + math.log(params.min_p)))
    return ids, values


def _select(ids: Ids | None, values: Row, kept: Ids) -> tuple[Ids | None, Row]:
    return kept if ids is None else ids[kept], values[kept]


def _nucleus(values: Row, top_p: float) -> Ids:
    """The most likely tokens whose probabilities reach `top_p` together (Holtzman et al., 2019)."""
    peak = values.max()
    weights = np.exp(values - peak)
    target = top_p * float(weights.sum(dtype=np.float64))
    ids = largest(values, 256)  # most nuclei are small
    reached = np.cumsum(weights[ids], dtype=np.float64)
    if ids.size < values.size and reached[-1] < target:
        # sort only the bin in which the target is reached; what is above it belongs to the nucleus
        bins = np.minimum((peak - values) * np.float32(_BINS / _DEPTH), np.float32(_BINS)).astype(np.int32)
        mass = np.cumsum(np.bincount(bins, weights))
        last = int(np.searchsorted(mass, target))
        edge = np.flatnonzero(bins == min(last, mass.size - 1))
        edge = edge[largest(values[edge], edge.size)]
        above = np.flatnonzero(bins < last)
        ids = np.concatenate((above, edge))
        reached = np.cumsum(weights[ids], dtype=np.float64)
    return ids[: int(np.searchsorted(reached, target)) + 1]


def _typical(values: Row, typical_p: float) -> Ids:
    """The tokens whose surprise is nearest to the entropy, up to a mass of `typical_p` (Meister et al., 2022)."""
    ids = np.flatnonzero(values > -np.inf)
    logs = values[ids].astype(np.float64)
    logs -= logs.max()
    logs -= math.log(np.exp(logs).sum())
    probabilities = np.exp(logs)
    order = np.argsort(np.abs(logs - probabilities @ logs), kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), typical_p, side="right")) + 1
    return np.sort(ids[order[:count]])


def _draw(weights: Row, u: float) -> int:
    """An index, with probability proportional to its weight: the one at which the running sum passes `u`."""
    width = weights.size // _LANES
    if width < _LANES:
        return _pass(weights, u)[0]
    body = weights[: width * _LANES].reshape(_LANES, width)
    column, u = _pass(np.append(body.sum(axis=0), weights[width * _LANES :]), u)
    if column >= width:
        return width * _LANES + column - width
    return _pass(body[:, column], u)[0] * width + column


def _pass(weights: Row, u: float) -> tuple[int, float]:
    """(the index, how far inside it `u` falls: again uniform)."""
    reached = np.cumsum(weights, dtype=np.float64)
    target = u * float(reached[-1])
    index = min(int(np.searchsorted(reached, target, side="right")), int(np.flatnonzero(weights)[-1]))
    before = float(reached[index]) - float(weights[index])
    return index, min(max((target - before) / float(weights[index]), 0.0), 1.0)

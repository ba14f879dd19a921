"""Frequencies of the rotary embedding and their scalings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from chandra.errors import UnsupportedError
from chandra.models.spec import RopeSpec

Floats = np.ndarray[Any, np.dtype[np.float64]]


def rope_bytes(ropes: Iterable[RopeSpec | None]) -> int:
    """Bytes of the frequencies of all different ones of these."""
    return sum(4 * (rope.rotary_dim // 2) for rope in set(ropes) if rope)


def inv_freq(rope: RopeSpec, context_length: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 `(rotary_dim / 2,)`: the angle per position of each pair (https://arxiv.org/abs/2104.09864).

    Dynamic NTK and LongRoPE depend on the context length a model is run with; it is fixed when the model is loaded.
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        stretch = max(1.0, context_length / _original(rope))
        theta *= (rope.factor * stretch - (rope.factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    plain = theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    match rope.kind:
        case "linear":
            plain = plain / rope.factor
        case "llama3":
            plain = _llama3(rope, plain)
        case "yarn":
            plain = _yarn(rope, plain)
        case "longrope":
            plain = plain / _longrope_factors(rope, context_length)
    if rope.freq_factors is not None:
        plain = plain / np.asarray(rope.freq_factors)
    return plain.astype(np.float32)


def _original(rope: RopeSpec) -> int:
    if rope.original_max_position is None:
        raise UnsupportedError(f"RoPE scaling {rope.kind!r} without the original context length")
    return rope.original_max_position


def _llama3(rope: RopeSpec, plain: Floats) -> Floats:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, blended between."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = _original(rope) * plain / (2 * math.pi)  # of each pair over the original context
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeSpec, plain: Floats) -> Floats:
    """YaRN (https://arxiv.org/abs/2309.00071): pairs that turn often are kept, the others interpolated."""

    def pair_that_turns(turns: float) -> float:
        return rope.rotary_dim * math.log(_original(rope) / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    interpolate: Floats = np.clip((np.arange(len(plain)) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - interpolate + interpolate / rope.factor)


def _longrope_factors(rope: RopeSpec, context_length: int) -> Floats:
    """LongRoPE (https://arxiv.org/abs/2402.13753): one factor per pair, for short and for long contexts."""
    factors = rope.long_factor if context_length > _original(rope) else rope.short_factor
    assert factors is not None
    return np.array(factors, dtype=np.float64)

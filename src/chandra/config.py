"""Settings of the program and of a request. The only reader of the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from chandra.errors import RequestError, UsageError

SAMPLING = 52  # bytes for each entry of the vocabulary that choosing a token takes at most, with its log-probabilities

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


@dataclass(frozen=True)
class Settings:
    """What the environment says. CHANDRA_* come first, then Ollama's names where they mean the same."""

    home: Path
    threads: int | None = None
    cpu: str | None = None  # force a kernel path: avx512, avx2 or portable
    devices: tuple[str, ...] = ()  # CHANDRA_DEVICE, separated by ";"
    host: str | None = None
    budget: str | None = None
    context: int | None = None
    parallel: int | None = None
    kv_type: str | None = None
    registry: str | None = None  # base URL of the registry for names without a host
    history: bool = True
    debug: bool = False

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment. Raises UsageError naming the variable and the value."""
        env = _Environment(os.environ if environ is None else environ)
        home = env.text("CHANDRA_HOME")
        return Settings(
            home=Path(home).expanduser().absolute() if home else _default_home(),
            threads=env.count("CHANDRA_THREADS"),
            cpu=env.choice("CHANDRA_CPU", ("avx512", "avx2", "portable")),
            devices=tuple(part for part in (env.text("CHANDRA_DEVICE") or "").split(";") if part),
            host=env.text("CHANDRA_HOST_MEMORY"),
            budget=env.text("CHANDRA_BUDGET"),
            context=env.count("CHANDRA_CTX", "OLLAMA_CONTEXT_LENGTH"),
            parallel=env.count("CHANDRA_PARALLEL", "OLLAMA_NUM_PARALLEL"),
            kv_type=env.choice("CHANDRA_KV_TYPE", ("f32", "f16", "bf16", "q8_0", "q4_0"), "OLLAMA_KV_CACHE_TYPE"),
            registry=env.text("CHANDRA_REGISTRY"),
            history=not env.flag("CHANDRA_NOHISTORY", "OLLAMA_NOHISTORY"),
            debug=env.flag("CHANDRA_DEBUG", "OLLAMA_DEBUG"),
        )


def _default_home() -> Path:
    from platformdirs import user_data_dir  # here: many name another folder

    return Path(user_data_dir("chandra", appauthor=False))


@dataclass(frozen=True)
class _Environment:
    """Typed reads: the first name that is set wins."""

    environ: Mapping[str, str]

    def text(self, *names: str) -> str | None:
        return next((self.environ[name] for name in names if self.environ.get(name)), None)

    def count(self, *names: str) -> int | None:
        value = self.text(*names)
        if value is None:
            return None
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
            raise UsageError(f"{self._set(names)}={value!r} is not a positive whole number")
        return int(value)

    def choice(self, name: str, choices: tuple[str, ...], *more: str) -> str | None:
        value = self.text(name, *more)
        if value is not None and value.lower() not in choices:
            raise UsageError(f"{self._set((name, *more))}={value!r} is not one of {', '.join(choices)}")
        return value.lower() if value else None

    def flag(self, *names: str) -> bool:
        value = (self.text(*names) or "").lower()
        if value not in _TRUE | _FALSE:
            raise UsageError(f"{self._set(names)}={value!r} is neither 1 nor 0")
        return value in _TRUE

    def _set(self, names: tuple[str, ...]) -> str:
        return next(name for name in names if self.environ.get(name))


_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 128),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 1 << 31),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "repeat_last_n": (-1, 1 << 31),
    "seed": (-(1 << 63), (1 << 64) - 1),
    "max_tokens": (0, 1 << 31),
    "min_tokens": (0, 1 << 31),
    "logprobs": (0, 1000),
    "prompt_logprobs": (0, 1000),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; names and defaults as vLLM's.

    temperature 0 is greedy. top_k 0 or -1, top_p 1, min_p 0 and typical_p 1 are off. Penalties look at the last
    `repeat_last_n` tokens, prompt included (0: off, -1: all). `max_tokens` None: until the context is full.
    `logprobs`, `prompt_logprobs`: how many of the likeliest tokens to report besides the chosen one (None: no report).
    Raises RequestError for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name in _RANGES:
                self._check_number(item.name, whole="int" in str(item.type))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens = {self.min_tokens} is above max_tokens = {self.max_tokens}")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} = {_short(getattr(self, name))} is neither true nor false")
        stop = _items("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if len(stop) > 64 or not all(isinstance(text, str) and 0 < len(text) <= 4096 for text in stop):
            raise RequestError("stop must be up to 64 strings of 1 to 4096 characters")
        stop_ids = _items("stop_token_ids", self.stop_token_ids)
        if len(stop_ids) > 1024 or not all(_is_token(token) for token in stop_ids):
            raise RequestError("stop_token_ids must be up to 1024 token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_ids)
        self._check_biases()

    def _check_biases(self) -> None:
        biases: Any = self.logit_bias
        if not isinstance(biases, Mapping):
            raise RequestError(f"logit_bias = {_short(biases)} is not a map of token ids to numbers")
        for token, bias in biases.items():
            if not _is_token(token) or isinstance(bias, bool) or not isinstance(bias, int | float) or math.isnan(bias):
                raise RequestError(f"logit_bias: {_short(token)}: {_short(bias)} is not a token id and a number")

    def _check_number(self, name: str, whole: bool) -> None:
        value, (low, high) = getattr(self, name), _RANGES[name]
        if value is None and name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            return
        kind = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise RequestError(
                f"{name} = {_short(value)} is out of range",
                f"{name} is a {'whole ' if whole else ''}number from {low:g} to {high:g}",
            )


def _short(value: object) -> str:
    """How a refused value is shown."""
    text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >> 128 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _items(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(f"{name} = {_short(value)} is not a list")
    return tuple(value)

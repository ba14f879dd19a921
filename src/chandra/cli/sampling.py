"""Sampling values: from the command line, from what a model was saved with, and under Ollama's names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from chandra.errors import UsageError

# What a chat wants: Ollama's values, and a penalty that keeps small models from going round in circles;
CHAT_DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "randomness; 0 always takes the likeliest token"),
    "top_k": (int, "choose among the k likeliest tokens (0: all)"),
    "top_p": (float, "choose among the likeliest tokens that make up this share"),
    "min_p": (float, "leave out tokens less likely than this share of the likeliest"),
    "typical_p": (float, "choose among tokens of typical surprise that make up this share"),
    "repetition_penalty": (float, "above 1: repeat less"),
    "presence_penalty": (float, "above 0: do not repeat"),
    "frequency_penalty": (float, "above 0: repeat less, the more often"),
    "repeat_last_n": (int, "how far the penalties look back (-1: everything)"),
    "seed": (int, "the same seed gives the same answer"),
    "max_tokens": (int, "length of the answer at most"),
}
OLLAMA_NAMES = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens"}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--temperature, --top-k and so on."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, help=text)
    group.add_argument("--stop", action="append", default=[], help="end the answer at this text (repeatable)")


def sampling_of(arguments: argparse.Namespace, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, else what the model was saved with, else what a chat wants."""
    given = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    stop = {"stop": tuple(arguments.stop)} if arguments.stop else {}
    return {**CHAT_DEFAULTS, **known_sampling(saved), **given, **stop}


def known_sampling(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's saved parameters that are sampling values, under our names."""
    named = {OLLAMA_NAMES.get(name, name): value for name, value in saved.items()}
    out = {name: value for name, value in named.items() if name in SAMPLING}
    if out.get("max_tokens", 0) is not None and out.get("max_tokens", 0) < 0:
        out["max_tokens"] = None
    if stop := named.get("stop"):
        out["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return out


def parse_sampling(name: str, value: str) -> tuple[str, Any]:
    """One value as typed in a chat, under our name. Raises UsageError."""
    name = OLLAMA_NAMES.get(name, name)
    if name == "stop":
        return name, tuple(value.split())
    if name not in SAMPLING:
        known = ", ".join([*SAMPLING, "stop", *OLLAMA_NAMES])
        raise UsageError(f"unknown parameter {name!r}", f"known: {known}")
    try:
        number = SAMPLING[name][0](value)
    except ValueError:
        raise UsageError(f"{name} takes a number, not {value!r}") from None
    return name, None if name == "max_tokens" and number < 0 else number

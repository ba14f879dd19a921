"""Settings from the environment and the ranges of sampling parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandra.config import SamplingParams, Settings
from chandra.errors import RequestError, UsageError


def test_nothing_set() -> None:
    settings = Settings.from_env({})
    assert settings.home.is_absolute()
    assert settings.home.name == "chandra"
    assert (settings.threads, settings.cpu, settings.registry) == (None, None, None)
    assert settings.devices == ()
    assert settings.history
    assert not settings.debug


def test_chandra_goes_before_ollama() -> None:
    environ = {
        "CHANDRA_HOME": "models",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "CHANDRA_CTX": "8192",
        "OLLAMA_NUM_PARALLEL": "3",
        "OLLAMA_KV_CACHE_TYPE": "Q8_0",
        "OLLAMA_NOHISTORY": "1",
        "CHANDRA_NOHISTORY": "",
        "OLLAMA_DEBUG": "false",
        "CHANDRA_CPU": "avx2",
        "CHANDRA_DEVICE": "cuda:0=6GiB;virtual:2GiB",
    }
    settings = Settings.from_env(environ)
    assert settings.home == Path("models").absolute()
    assert (settings.context, settings.parallel, settings.kv_type) == (8192, 3, "q8_0")
    assert (settings.history, settings.debug, settings.cpu) == (False, False, "avx2")
    assert settings.devices == ("cuda:0=6GiB", "virtual:2GiB")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHANDRA_THREADS", "0"),
        ("CHANDRA_THREADS", "-1"),
        ("CHANDRA_THREADS", "four"),
        ("CHANDRA_THREADS", "9" * 5000),
        ("CHANDRA_THREADS", "\N{SUPERSCRIPT TWO}"),
        ("CHANDRA_CPU", "sse"),
        ("OLLAMA_KV_CACHE_TYPE", "q5_0"),
        ("OLLAMA_DEBUG", "maybe"),
        ("OLLAMA_CONTEXT_LENGTH", "1e9"),
    ],
)
def test_bad_environment_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.from_env({name: value})
    assert name in caught.value.message
    assert repr(value) in caught.value.message
    assert caught.value.exit_code == 2


def test_defaults_and_normal_forms() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], logit_bias={5: -100})  # type: ignore[arg-type]
    assert params.stop == ("END",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {5: -100}
    assert SamplingParams() == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 10**9),
        pytest.param("n", 1 << 100_000, id="n-of-100000-bits"),
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", False),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", 300),
        ("frequency_penalty", -math.inf),
        ("repeat_last_n", -2),
        ("seed", 2**64),
        ("max_tokens", 1 << 40),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("logprobs", 10**6),
        ("prompt_logprobs", -1),
        ("stop", [""]),
        ("stop", ["x"] * 1000),
        ("stop", "x" * 5000),
        ("stop", b"END"),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("skip_special_tokens", "no"),
    ],
)
def test_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.message.startswith(name)
    assert len(caught.value.message) < 250


def test_min_tokens_within_max_tokens() -> None:
    SamplingParams(min_tokens=4, max_tokens=4)
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


@given(st.floats(), st.floats(), st.integers())
def test_any_number_is_taken_or_refused(temperature: float, top_p: float, top_k: int) -> None:
    try:
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    except RequestError:
        return
    assert 0 <= params.temperature <= 100
    assert 0 <= params.top_p <= 1
    assert params.top_k >= -1

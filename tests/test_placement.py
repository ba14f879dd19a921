"""Splits of a real model over capped virtual devices and the CPU: the same text, and the bytes that were planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chandra import LLM, SamplingParams
from chandra.errors import DoesNotFit

pytestmark = pytest.mark.model

SPLITS: list[dict[str, Any]] = [
    {"device": ("virtual:120MiB",)},
    {"device": ("virtual:90MiB",), "layers": ("virtual:0=0-9",)},
    {"device": ("virtual:90MiB", "virtual:60MiB"), "layers": ("virtual:0=0-9", "virtual:1=10-19")},
    {"device": ("virtual:70MiB", "virtual:70MiB", "virtual:70MiB")},
]


def answer(llm: LLM) -> tuple[list[int], list[int]]:
    params = SamplingParams(temperature=0, max_tokens=16)
    first, second = llm.generate(["The sea is", "One, two, three, four,"], params)
    return first.outputs[0].token_ids, second.outputs[0].token_ids


@pytest.fixture(scope="module")
def model(model_file: Callable[[str], Path]) -> Path:
    return model_file("smollm2:135m")


@pytest.fixture(scope="module")
def plain(model: Path) -> tuple[list[int], list[int]]:
    with LLM(model, ctx=256, parallel=2) as llm:
        return answer(llm)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: " ".join(split["device"]))
def test_a_split_changes_no_token_and_takes_what_was_planned(
    split: dict[str, Any], model: Path, plain: tuple[list[int], list[int]]
) -> None:
    with LLM(model, ctx=256, parallel=2, **split) as llm:
        assert answer(llm) == plain
        used = {part.device for part in llm.plan.parts()}
        assert any(name.startswith("virtual") for name in used)
        for row in llm.memory():
            if row.kind in ("weights", "kv"):
                assert row.peak == row.predicted, row
            if row.kind == "workspace":
                assert row.peak <= row.predicted, row
        for device in llm.plan.devices:
            assert llm.plan.predicted(device.name) <= device.cap


def test_what_cannot_fit_is_refused_before_anything_is_loaded(model: Path) -> None:
    with pytest.raises(DoesNotFit, match="does not fit"):
        LLM(model, ctx=256, budget="100MiB")

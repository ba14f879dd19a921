"""Real models against llama.cpp: next-token distributions over ordinary text.

`data/oracle_*.npz` says what llama.cpp found (see `data/make_oracle.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from chandra import LLM

DATA = Path(__file__).parent / "data"
NAMES = ("smollm2:135m", "gemma3:270m", "qwen2.5-coder:0.5b")
SINKS = 4  # the first positions are ill-conditioned: attention sinks

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", params=NAMES)
def model(
    request: pytest.FixtureRequest, model_file: Callable[[str], Path]
) -> Iterator[tuple[LLM, dict[str, np.ndarray]]]:
    oracle = dict(np.load(DATA / f"oracle_{request.param.replace(':', '-')}.npz"))
    with LLM(model_file(request.param), ctx=512, parallel=4) as llm:
        yield llm, oracle


def all_logprobs(llm: LLM, ids: list[int], chunk: int) -> np.ndarray:
    """Natural log-probabilities `(len(ids), vocab)`, the prompt read in pieces of `chunk` tokens."""
    rows = llm.runtime.score(ids, chunk)
    rows = rows.astype(np.float64)
    top = rows.max(axis=1, keepdims=True)
    return rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))


def test_distributions_match_llama_cpp(model: tuple[LLM, dict[str, np.ndarray]]) -> None:
    llm, oracle = model
    ids = oracle["tokens"].tolist()
    assert llm.tokenizer.encode((DATA / "prose.txt").read_text())[: len(ids)] == ids
    ours = all_logprobs(llm, ids, 64)
    theirs = oracle["logprobs"].astype(np.float64)
    q = np.take_along_axis(ours, oracle["ids"], axis=1)
    p = np.exp(theirs)
    p_rest, q_rest = 1 - p.sum(axis=1), 1 - np.exp(q).sum(axis=1)
    tail = p_rest * np.log(np.maximum(p_rest, 1e-12) / np.maximum(q_rest, 1e-12))
    divergence = ((p * (theirs - q)).sum(axis=1) + tail)[SINKS:]
    agreement = (ours.argmax(axis=1) == oracle["ids"][:, 0])[SINKS:].mean()
    print(f"{llm.name}: mean KL {divergence.mean():.5f}, top-1 agreement {agreement:.3f}")
    assert divergence.mean() < 0.005
    assert agreement >= 0.97

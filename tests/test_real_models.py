"""Real models against llama.cpp: next-token distributions over ordinary text.

`data/oracle_*.npz` says what llama.cpp found (see `data/make_oracle.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from chandra import LLM, SamplingParams
from chandra.kvcache import KVPool
from chandra.ops.contracts import ForwardBatch, KVLayer, KVTables

DATA = Path(__file__).parent / "data"
NAMES = ("smollm2:135m", "gemma3:270m", "qwen2.5-coder:0.5b")
PIECE = 8  # rows of logits that were planned for
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
    """Natural log-probabilities `(len(ids), vocab)`, the prompt read in pieces of `chunk` tokens, past the engine."""
    runtime = llm.runtime
    pool, size = runtime.pool, llm.plan.block_size
    table = np.arange(-(-len(ids) // size), dtype=np.int32)[None]
    out = []
    for start in range(0, len(ids), chunk):
        end = min(len(ids), start + chunk)
        positions = np.arange(start, end, dtype=np.int32)
        count = end - start
        batch = ForwardBatch(
            np.asarray(ids[start:end], np.int32),
            positions,
            np.array([0, count], np.int32),
            np.array([end], np.int32),
            np.arange(count, dtype=np.int32),
        )
        view = _View(pool, KVTables(table, positions))
        out.append(runtime.decoder.forward(batch, view).astype(np.float64))
    rows = np.concatenate(out)
    top = rows.max(axis=1, keepdims=True)
    return rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))


class _View:
    """Blocks in order, the same for all layers."""

    def __init__(self, pool: KVPool, tables: KVTables) -> None:
        self.pool, self._tables = pool, tables

    def layer(self, index: int) -> KVLayer:
        return self.pool.layer(index)

    def tables(self, index: int) -> KVTables:  # noqa: ARG002
        return self._tables


def test_distributions_match_llama_cpp(model: tuple[LLM, dict[str, np.ndarray]]) -> None:
    llm, oracle = model
    ids = oracle["tokens"].tolist()
    assert llm.tokenizer.encode((DATA / "prose.txt").read_text())[: len(ids)] == ids
    ours = all_logprobs(llm, ids, PIECE)
    theirs = oracle["logprobs"].astype(np.float64)
    q = np.take_along_axis(ours, oracle["ids"], axis=1)
    p = np.exp(theirs)
    p_rest, q_rest = 1 - p.sum(axis=1), 1 - np.exp(q).sum(axis=1)
    tail = p_rest * np.log(np.maximum(p_rest, 1e-12) / np.maximum(q_rest, 1e-12))
    divergence = ((p * (theirs - q)).sum(axis=1) + tail)[SINKS:]
    same, decided = (ours.argmax(axis=1) == oracle["ids"][:, 0])[SINKS:], oracle["decided"][SINKS:]
    print(f"{llm.name}: mean KL {divergence.mean():.5f}, the same likeliest token at {same.mean():.3f}", end=" ")
    print(f"of all positions and {same[decided].mean():.3f} of the {decided.mean():.3f} that llama.cpp is decided at")
    assert divergence.mean() < 0.005
    assert same[decided].mean() >= 0.97
    assert same.mean() >= 0.95


def test_chunked_cached_and_batched_runs_give_the_bits_of_the_plain_run(
    model: tuple[LLM, dict[str, np.ndarray]],
) -> None:
    llm, oracle = model
    ids = oracle["tokens"][:96].tolist()
    whole = all_logprobs(llm, ids, PIECE)
    assert np.array_equal(whole, all_logprobs(llm, ids, 1))
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=2)
    prompts = [ids, ids[:40], ids[:70], ids[5:60]]
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in prompts]
    together = [output.outputs[0] for output in llm.generate(prompts, params)]  # in company, on cached prefixes
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
    assert llm.engine.counters().prefix_hits > 0


def test_the_same_seed_gives_the_same_text_in_any_company(model: tuple[LLM, dict[str, np.ndarray]]) -> None:
    llm, oracle = model
    ids = oracle["tokens"].tolist()
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16)
    alone = llm.generate(ids[:30], params)[0].outputs[0].text
    company = llm.generate([ids[:30], ids[:90], ids[20:60]], [params, SamplingParams(seed=1, max_tokens=20), params])
    assert company[0].outputs[0].text == alone

"""The library on a real model: stop strings, several answers, dropped streams, conversations, refusals."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chandra import LLM, SamplingParams, runtime
from chandra.errors import BudgetExceeded, ContextOverflow, RequestError
from chandra.memory.host import resident_bytes
from chandra.memory.running import running

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm(model_file: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(model_file("smollm2:135m"), ctx=256, parallel=4) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=32)


def test_a_stop_string_cuts_the_text_and_ends_the_sequence(llm: LLM) -> None:
    whole = llm.generate("The sea is", GREEDY)[0].outputs[0]
    stop = whole.text[10:16]
    cut = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=32, stop=stop))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < len(whole.token_ids)
    assert not llm.engine.has_work()


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate("The sea is", GREEDY)[0]
    chunks = list(llm.stream("The sea is", GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.outputs[0].text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.outputs[0].token_ids
    assert [chunk.finish_reason for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.generated_tokens == len(whole.outputs[0].token_ids)


def test_a_dropped_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("The sea is", GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work()
    llm.engine.blocks.check_integrity()


def test_streams_and_threads_take_turns(llm: LLM) -> None:
    prompts = ["The sea is", "Once upon a time", "One, two, three,", "The sun"]
    wanted = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    stream = llm.stream(prompts[0], GREEDY)
    first = next(stream)
    assert llm.generate(prompts[1], GREEDY)[0].outputs[0].token_ids == wanted[1]  # while the stream stands still
    assert [*first.token_ids, *(token for chunk in stream for token in chunk.token_ids)] == wanted[0]
    found: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        for _ in range(3):
            found[prompt] = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[prompt] for prompt in prompts] == wanted
    assert not llm.engine.has_work()
    assert not llm._inboxes


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=3, max_tokens=16, logprobs=1)
    first, second = (llm.generate("Once upon a time", params)[0] for _ in range(2))
    assert [o.text for o in first.outputs] == [o.text for o in second.outputs]
    assert len({o.text for o in first.outputs}) > 1
    for output in first.outputs:
        assert output.logprobs is not None
        assert output.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in output.logprobs))


def test_without_prefix_caching_memory_is_used_again(model_file: Callable[[str], Path]) -> None:
    with LLM(model_file("smollm2:135m"), ctx=256, prefix_caching=False) as llm:
        texts = [llm.generate("The sea is", GREEDY)[0].outputs[0].text for _ in range(2)]
        assert texts[0] == texts[1]
        assert llm.engine.counters().prefix_hits == 0
        (allocator,) = llm.engine.blocks.allocators
        assert allocator.fresh <= -(-(8 + 32) // llm.engine.pool.block_size)


def test_a_conversation_uses_the_template(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is gravity?"}]
    assert "<|im_start|>user\nWhat is gravity?<|im_end|>" in llm.render(question)
    assert "ravity" in llm.chat(question, GREEDY)[0].outputs[0].text


def test_what_cannot_be_served_is_refused_and_leaves_nothing(llm: LLM) -> None:
    before = llm.engine.counters().prompt_tokens
    with pytest.raises(ContextOverflow, match="prompt 1: the prompt has 300 tokens"):
        llm.generate(["fine", list(range(300))], GREEDY)
    assert llm.engine.counters().prompt_tokens == before  # none has begun
    with pytest.raises(RequestError):
        llm.generate([[10**6]], GREEDY)
    with pytest.raises(RequestError):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="options"):
        LLM("smollm2:135m", nosuch=1)
    assert not llm.engine.has_work()


def test_an_answer_that_fails_leaves_the_others(model_file: Callable[[str], Path]) -> None:
    with LLM(model_file("smollm2:135m"), ctx=256, parallel=4, swap="0B", device="virtual:200MiB") as llm:
        ledger, blocks = llm.runtime.ledger, llm.engine.blocks.allocators[0]
        wanted = llm.generate("The sea is", GREEDY)[0].outputs[0]
        cap = llm.plan.device("virtual:0").cap - ledger.free("virtual:0")
        while blocks.limit > 9:
            cap -= 4 << 20
            ledger.set_cap("virtual:0", cap)
            llm.runtime.poll()
        answers = llm.generate(["The sea is", list(range(100, 340))], GREEDY)
        assert answers[0].outputs[0] == wanted
        failed = answers[1].outputs[0]
        assert failed.finish_reason == "error"
        assert isinstance(failed.error, BudgetExceeded)
        assert not llm.engine.has_work()
        with pytest.raises(BudgetExceeded, match="no longer fits"):
            llm.generate([list(range(100, 340))], GREEDY)
        with pytest.raises(BudgetExceeded, match="no longer fits"):
            list(llm.stream(list(range(100, 340)), GREEDY))


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_idle_model_gives_way_and_comes_back(
    model_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = model_file("smollm2:135m"), set(threading.enumerate())
    monkeypatch.setenv("CHANDRA_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "IDLE_PERIOD", 0.02)
    with LLM(model, ctx=256) as llm:
        pressure, ledger = llm.runtime.pressure, llm.runtime.ledger
        pressure.patience = 0.0
        wanted = llm.generate("The sea is", GREEDY)[0].outputs[0]
        free, cap = ledger.free("cpu"), llm.plan.device("cpu").cap
        ledger.set_cap("cpu", cap - free - (4 << 20))
        wait(lambda: ledger.free("cpu") >= 0)
        wait(lambda: "gave back" in " ".join(running(tmp_path)[0].pressure))
        ledger.set_cap("cpu", cap)
        wait(lambda: not pressure.reduced)
        assert ledger.free("cpu") == free
        assert llm.generate("The sea is", GREEDY)[0].outputs[0] == wanted
        wait(lambda: "took again" in running(tmp_path)[0].pressure[-1])
    assert not running(tmp_path)
    assert set(threading.enumerate()) <= before
    watch = LLM(model, ctx=256)
    del watch  # without having been closed
    wait(lambda: set(threading.enumerate()) <= before)


def test_closing_gives_the_memory_back_at_once(model_file: Callable[[str], Path]) -> None:
    with LLM(model_file("smollm2:135m"), ctx=256) as llm:
        llm.generate("The sea is", GREEDY)
        gc.collect()
        gc.disable()
        try:
            before = resident_bytes()[0]
            llm.close()
            assert before - resident_bytes()[0] > 80 << 20  # the weights
        finally:
            gc.enable()

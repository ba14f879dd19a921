"""The Python face of Chandra: `LLM(...).generate`, `chat` and `stream`, with names as vLLM's users know them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from chandra.config import SamplingParams, Settings
from chandra.engine import Engine, Output, Step, TokenLogprobs
from chandra.errors import ChandraError, RequestError
from chandra.memory.plan import Plan
from chandra.memory.running import MemoryRow
from chandra.planner import PlanRequest
from chandra.runtime import Runtime, load
from chandra.store import Progress, StoredModel
from chandra.text import StopMatcher, StreamDetokenizer, Tokenizer

DEFAULT_MODEL = "smollm2:135m"

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Stats:
    """What one answer took. Seconds; `prompt_seconds` runs until the first token is there."""

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generated_seconds: float
    load_seconds: float


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. The last one of each answer has a `finish_reason`, and `stats`."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stats: Stats | None = None


@dataclass
class CompletionOutput:
    """One answer. `stop_reason`: the stop string or token id that ended it; `error`: what did, where the
    `finish_reason` is "error"."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: ChandraError | None = None


@dataclass
class RequestOutput:
    """A prompt and its answers."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    stats: Stats | None = None


class _Answer:
    """Text work of one sequence: whole characters, stop strings, and where they cut."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, output: CompletionOutput, continues: bool) -> None:
        self.output = output
        self.detokenizer = StreamDetokenizer(tokenizer, params.skip_special_tokens, continues=continues)
        self.stops = StopMatcher(params.stop)
        if params.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0

    def take(self, news: Output) -> str:
        """The text that can go out now. Sets `finish_reason` when the answer is over."""
        out = self.output
        out.token_ids += news.token_ids
        if out.logprobs is not None:
            out.logprobs += news.logprobs
            out.cumulative_logprob = sum(entry.logprob for entry in out.logprobs)
        text, ended_by_token = "", news.finish_reason == "stop"
        for token_id in news.token_ids[: -1 if ended_by_token else None]:
            text += self.detokenizer.push(token_id)
        if news.finish_reason is not None:
            text += self.detokenizer.finish()
            out.finish_reason, out.error = news.finish_reason, news.error
            out.stop_reason = news.token_ids[-1] if ended_by_token else None
        emitted, stopped = self.stops.push(text)
        if stopped:
            out.finish_reason, out.stop_reason = "stop", self.stops.matched
        elif news.finish_reason is not None:
            emitted += self.stops.finish()
        out.text += emitted
        return emitted


class LLM:
    """A model in memory, planned to fit. Close it, or use it as a context manager.

    `model`: a name (pulled if the store lacks it) or a path. The keywords are those of `chandra plan`: device, host,
    disk, budget, ctx, parallel, objective, kv_type, layers, quant, reserve. `prefix_caching`: whether a prompt's cache
    is kept, while there is room, for prompts that begin alike. `progress` is called with (phase, done, total). Raises
    the errors of `errors.py`: ModelNotFound, DoesNotFit, CheckpointError, …

    Several threads may call: what they ask for is computed together, by one of them at a time.
    """

    def __init__(
        self,
        model: str | Path | StoredModel = DEFAULT_MODEL,
        *,
        prefix_caching: bool = True,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        started = time.monotonic()
        try:
            request = PlanRequest(**options)
        except TypeError as error:
            known = ", ".join(PlanRequest.__dataclass_fields__)
            raise RequestError(f"LLM: {error}", f"options: {known}") from error
        self._runtime: Runtime = load(model, request, Settings.from_env(), progress, prefix_caching)
        self.load_seconds = time.monotonic() - started
        self._inboxes: dict[int, deque[Output]] = {}  # by sequence: what is new for whoever asked for it

    @property
    def plan(self) -> Plan:
        return self._runtime.plan

    @property
    def tokenizer(self) -> Tokenizer:
        return self._runtime.tokenizer

    @property
    def engine(self) -> Engine:
        return self._runtime.engine

    @property
    def name(self) -> str:
        return self._runtime.name

    @property
    def runtime(self) -> Runtime:
        return self._runtime

    def memory(self) -> tuple[MemoryRow, ...]:
        """Predicted against actual bytes, per device and kind, with high-water marks."""
        return self._runtime.memory()

    def pressure(self) -> tuple[Step, ...]:
        """The last steps taken under memory pressure, and back."""
        return tuple(self._runtime.pressure.steps)

    def close(self) -> None:
        self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (a text, or token ids).

        Raises RequestError, or ContextOverflow for one too long, before anything is computed. An answer that fails on
        the way has its `error`, and the others go on; where all fail, the first error is raised.
        """
        listed = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        ids = [self._ids(prompt) for prompt in listed]  # type: ignore[arg-type]
        return self._complete(texts, ids, sampling_params, continues=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several. A message is {"role": …, "content": …}."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Sequence[Message]] = [messages] if single else messages  # type: ignore[list-item, assignment]
        texts = [self.render(conversation) for conversation in conversations]
        ids = [self.tokenizer.encode_chat(text) for text in texts]
        return self._complete(texts, ids, sampling_params, continues=False)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[Chunk]:
        """Generate piece by piece, for a prompt or (a list of messages) a conversation. Dropping the iterator ends
        the request. Raises the error of an answer that fails."""
        params = sampling_params or SamplingParams()
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            ids, continues = self.tokenizer.encode_chat(self.render(prompt)), False  # type: ignore[arg-type]
        else:
            ids, continues = self._ids(prompt), True  # type: ignore[arg-type]
        yield from self._stream(ids, params, continues)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation. Raises TemplateError."""
        return self._runtime.template.render(messages)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _stream(self, ids: list[int], params: SamplingParams, continues: bool) -> Iterator[Chunk]:
        started, first = time.monotonic(), 0.0
        for _, out, news, text in self._serve(self._begin([ids], [params], continues)):
            if out.error is not None:
                raise out.error
            first = first or time.monotonic()
            ended = out.finish_reason is not None
            stats = self._stats(len(ids), len(out.token_ids), started, first) if ended else None
            yield Chunk(out.index, text, news.token_ids, news.logprobs, out.finish_reason, stats)

    def _complete(
        self,
        texts: Sequence[str | None],
        prompts: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        continues: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts with {len(sampling_params)} sampling_params")
        results = [RequestOutput(text, ids, []) for text, ids in zip(texts, prompts, strict=True)]
        started = time.monotonic()
        answers = self._begin(prompts, sampling_params, continues)
        for number, answer in answers.values():
            results[number].outputs.append(answer.output)
        for number, output, news, _ in self._serve(answers):
            result = results[number]
            if news.prompt_logprobs is not None:
                result.prompt_logprobs = list(news.prompt_logprobs)
            if result.stats is None or output.finish_reason is not None:
                result.stats = self._progress(result, started)
        errors = [output.error for result in results for output in result.outputs]
        if errors and errors[0] is not None and all(errors):
            raise errors[0]
        return results

    def _begin(
        self, prompts: Sequence[list[int]], sampling_params: Sequence[SamplingParams], continues: bool
    ) -> dict[int, tuple[int, _Answer]]:
        """Queue prompts, if all of them can be served; by sequence the prompt's number and its answer."""
        for number, wanted in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                self.engine.check(*wanted)
            except RequestError as error:
                which = f"prompt {number}: " if len(prompts) > 1 else ""
                raise type(error)(which + error.message, error.hint) from None
        answers, inbox = {}, deque[Output]()
        with self._runtime.lock:
            for number, (ids, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                for index, seq_id in enumerate(self.engine.add(ids, params)):
                    answers[seq_id] = number, _Answer(self.tokenizer, params, CompletionOutput(index), continues)
                    self._inboxes[seq_id] = inbox
        return answers

    def _serve(self, answers: dict[int, tuple[int, _Answer]]) -> Iterator[tuple[int, CompletionOutput, Output, str]]:
        """Compute until all are answered: the prompt's number, the answer so far, what is new and its text. What that
        computes of others' answers goes to those who wait for them."""
        sequences, lock = list(answers), self._runtime.lock
        try:
            while answers:
                inbox = self._inboxes[sequences[0]]
                with lock:
                    for news in () if inbox else self._runtime.step():
                        self._inboxes.get(news.seq_id, inbox).append(news)
                while inbox:
                    news = inbox.popleft()
                    if news.seq_id not in answers:  # a stop string has cut it
                        continue
                    number, answer = answers[news.seq_id]
                    text = answer.take(news)
                    if answer.output.finish_reason is not None:
                        del answers[news.seq_id]
                        with lock:
                            self.engine.finish(news.seq_id)
                    yield number, answer.output, news, text
        finally:
            with lock:
                for seq_id in sequences:
                    self.engine.abort(seq_id)
                    del self._inboxes[seq_id]

    def _progress(self, result: RequestOutput, started: float) -> Stats:
        """The first call notes when the first token came; later ones how long it went on."""
        first = started + result.stats.prompt_seconds if result.stats else time.monotonic()
        generated = sum(len(output.token_ids) for output in result.outputs)
        return self._stats(len(result.prompt_token_ids), generated, started, first)

    def _stats(self, prompt_tokens: int, generated: int, started: float, first: float) -> Stats:
        return Stats(prompt_tokens, generated, first - started, time.monotonic() - first, self.load_seconds)


__all__ = ["DEFAULT_MODEL", "LLM", "Chunk", "CompletionOutput", "RequestOutput", "Stats"]

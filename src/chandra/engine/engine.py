"""The engine: sequences in, tokens out, one step at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from chandra.config import SamplingParams
from chandra.engine.config import EngineConfig
from chandra.engine.model_runner import Forward, ModelRunner, Sampled
from chandra.engine.sampler import TokenLogprobs, derive_seed
from chandra.engine.scheduler import Chunk, Scheduler
from chandra.engine.sequence import FinishReason, Sequence
from chandra.errors import BudgetExceeded, ChandraError, ContextOverflow, RequestError, UsageError
from chandra.kvcache import BlockManager, KVPool, SwapSpace


@dataclass(frozen=True)
class Output:
    """News of one sequence. A token that stopped it is the last of `token_ids`."""

    seq_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of token_ids, if asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first token; the first entry is None
    error: ChandraError | None = None


@dataclass(frozen=True)
class Counters:
    """What the engine has done (totals) and is doing."""

    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of these, found
    preemptions: int
    swapped_out_blocks: int
    swapped_out_bytes: int
    swapped_in_blocks: int
    swapped_in_bytes: int
    running: int
    waiting: int
    cache_usage: float  # share of the fullest layer group's blocks that sequences hold
    finished: dict[FinishReason, int] = field(default_factory=dict)
    pressure: dict[str, int] = field(default_factory=dict)  # steps taken under memory pressure, by action


class Engine:
    """Generates for many sequences at once. Not safe to share between threads.

    `vocab_size` bounds token ids; `eos_ids` end a sequence unless its parameters say otherwise. With `swap`, what a
    preempted sequence had computed is kept there as long as there is room.
    """

    def __init__(
        self,
        decoder: Forward,
        pool: KVPool,
        config: EngineConfig,
        vocab_size: int,
        eos_ids: Iterable[int] = (),
        swap: SwapSpace | None = None,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.context_len = _usable_context(pool, config)
        max_blocks = -(-self.context_len // pool.block_size)
        self.pool = pool
        self.pressure_steps: Counter[str] = Counter()
        self.blocks = BlockManager(
            pool.groups, pool.num_blocks, pool.block_size, max_blocks, config.prefix_caching, swap
        )
        self.scheduler = Scheduler(config, self.blocks)
        self.runner = ModelRunner(decoder, pool, self.blocks, config)
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._finished: Counter[FinishReason] = Counter()

    def add(self, prompt: Iterable[int], params: SamplingParams, salt: bytes = b"") -> list[int]:
        """Queue a request; the ids of its `params.n` sequences. `salt` keeps the prefix cache of adapters apart.

        Raises RequestError for a token that does not exist, and ContextOverflow for a prompt that can never fit.
        """
        ids = self.check(prompt, params)
        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        leader: Sequence | None = None
        added = []
        for index in range(params.n):
            seeded = derive_seed(seed, index)
            sequence = Sequence(self._next_id, ids.astype(np.int32), params, seeded, stop_ids, salt, leader)
            self._sequences[sequence.id] = sequence
            self.scheduler.add(sequence)
            leader = leader or sequence
            self._next_id += 1
            added.append(sequence.id)
        self._prompt_tokens += len(ids)
        return added

    def step(self) -> list[Output]:
        """Compute one batch. Nothing to do: an empty list."""
        chunks = self.scheduler.schedule()
        results = self.runner.run(chunks)
        return self.commit(chunks, results)

    def commit(self, chunks: list[Chunk], results: list[Sampled]) -> list[Output]:
        """Write a step's results into the sequences, end those that are done and tell what is new."""
        outputs = [self._give_up(sequence) for sequence in self.scheduler.stuck]
        for (sequence, start, end, _), result in zip(chunks, results, strict=True):
            if result.error is None:  # else its blocks are not fit to be shared
                sequence.num_computed = end
                self.blocks.commit(sequence.id, sequence.tokens, end)
                if start < sequence.prompt_len <= end:
                    self.scheduler.release_followers(sequence)
            if end == sequence.num_tokens or result.error is not None:
                outputs.append(self._advance(sequence, result))
        return outputs

    def finish(self, seq_id: int, reason: FinishReason = "stop") -> None:
        """End a sequence now, for example because a stop string has come; nothing more is heard of it.

        A sequence that has already ended is let be.
        """
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._finished[reason] += 1

    def abort(self, seq_id: int) -> None:
        """End a sequence that nobody wants any more."""
        self.finish(seq_id, "abort")

    def has_work(self) -> bool:
        return bool(self._sequences)

    def counters(self) -> Counters:
        swap = self.blocks.swap
        return Counters(
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_queries=self.blocks.queries,
            prefix_hits=self.blocks.hits,
            preemptions=self.scheduler.preemptions,
            swapped_out_blocks=swap.out_blocks if swap else 0,
            swapped_out_bytes=swap.out_bytes if swap else 0,
            swapped_in_blocks=swap.in_blocks if swap else 0,
            swapped_in_bytes=swap.in_bytes if swap else 0,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            cache_usage=self.blocks.usage,
            finished=dict(self._finished),
            pressure=dict(self.pressure_steps),
        )

    def check(self, prompt: Iterable[int], params: SamplingParams) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The token ids of a request that `add` would take. Raises as that does."""
        ids = np.fromiter(prompt, dtype=np.int64)
        if not len(ids):
            raise RequestError("the prompt is empty", "send at least one token")
        known = range(self.vocab_size)
        for token_id in (int(ids.min()), int(ids.max()), *params.logit_bias, *params.stop_token_ids):
            if token_id not in known:
                raise RequestError(f"token {token_id} does not exist", f"token ids go from 0 to {self.vocab_size - 1}")
        if len(ids) + (params.max_tokens != 0) > self.context_len:
            raise ContextOverflow(
                f"the prompt has {len(ids)} tokens, the context length is {self.context_len}",
                "shorten the prompt, or plan with a longer context (num_ctx)",
            )
        return ids

    def _advance(self, sequence: Sequence, result: Sampled) -> Output:
        token_id = result.token_id
        if token_id is not None:
            sequence.append(token_id)
            self._generated_tokens += 1
        reason = self._finish_reason(sequence, result)
        first = sequence.num_generated <= 1 and sequence.prompt_logprobs is not None
        output = Output(
            sequence.id,
            () if token_id is None else (token_id,),
            reason,
            () if result.logprobs is None else (result.logprobs,),
            tuple(sequence.prompt_logprobs or ()) if first else None,
            result.error,
        )
        if reason is not None:
            self.finish(sequence.id, reason)
        return output

    def _give_up(self, sequence: Sequence) -> Output:
        """End a sequence that can no longer go on, though nothing else is in its way."""
        error = BudgetExceeded(
            f"a request of {sequence.num_tokens} tokens no longer fits: memory pressure has left the KV cache"
            f" {min(a.limit for a in self.blocks.allocators)} blocks of {self.blocks.block_size} tokens",
            hint="free memory and send it again, or send a shorter one",
        )
        self.finish(sequence.id, "error")
        return Output(sequence.id, finish_reason="error", error=error)

    def _finish_reason(self, sequence: Sequence, result: Sampled) -> FinishReason | None:
        limit = sequence.params.max_tokens
        if result.error is not None:
            return "error"
        if result.token_id in sequence.stop_ids:
            return "stop"
        if sequence.num_tokens >= self.context_len or (limit is not None and sequence.num_generated >= limit):
            return "length"
        return None


def _usable_context(pool: KVPool, config: EngineConfig) -> int:
    """Tokens that one sequence alone can reach in this pool. Raises UsageError if a window group is too small."""
    context = config.context_len
    for group, blocks in zip(pool.groups, pool.num_blocks, strict=True):
        if group.window is None:
            context = min(context, blocks * pool.block_size)
    for group, blocks in zip(pool.groups, pool.num_blocks, strict=True):
        needed = group.max_blocks(context, config.chunk, pool.block_size)
        if blocks < needed:
            raise UsageError(
                f"a window of {group.window} with chunks of {config.chunk} needs {needed} KV blocks, not {blocks}",
                "give the KV cache more blocks, or choose smaller chunks",
            )
    return context

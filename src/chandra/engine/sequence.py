"""One sequence of tokens that the engine is generating."""

from __future__ import annotations

from enum import Enum
from typing import Literal

import numpy as np

from chandra.config import SamplingParams
from chandra.engine.sampler import TokenLogprobs
from chandra.ops.contracts import IntArray

FinishReason = Literal["stop", "length", "abort", "error"]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what was generated after it.

    `leader` is the first answer to the same request, until it has computed the prompt whose blocks this one shares.
    """

    def __init__(
        self,
        seq_id: int,
        prompt: IntArray,
        params: SamplingParams,
        seed: int,
        stop_ids: frozenset[int],
        salt: bytes = b"",
        leader: Sequence | None = None,
    ) -> None:
        self.id = seq_id
        self.params = params
        self.seed = seed
        self.stop_ids = stop_ids
        self.banned = tuple(sorted(stop_ids))  # while fewer than min_tokens have come
        self.salt = salt
        self.leader = leader
        self.state = State.WAITING
        self.prompt_len = len(prompt)
        self.num_tokens = len(prompt)
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None and leader is None:
            self.prompt_logprobs = [None]
        self._tokens: IntArray = np.empty(len(prompt) + 64, dtype=np.int32)
        self._tokens[: len(prompt)] = prompt

    @property
    def tokens(self) -> IntArray:
        """All tokens so far, `(num_tokens,)`."""
        return self._tokens[: self.num_tokens]

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def next_scored(self) -> int:
        """The first position whose logits are wanted for prompt logprobs; prompt_len - 1 when there are none (left)."""
        return self.prompt_len - 1 if self.prompt_logprobs is None else len(self.prompt_logprobs) - 1

    @property
    def held_back(self) -> bool:
        """Whether it waits for its leader to compute the prompt they share."""
        return self.leader is not None and self.leader.state is not State.FINISHED

    def append(self, token_id: int) -> None:
        if self.num_tokens == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.empty_like(self._tokens)))
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

"""Runs one step: chunks to a ragged batch, the decoder, and a token for every chunk that ends its sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np

from chandra.engine.config import EngineConfig
from chandra.engine.sampler import Row, TokenLogprobs, logprobs_of, sample
from chandra.engine.scheduler import Chunk
from chandra.engine.sequence import Sequence
from chandra.errors import NumericError
from chandra.kvcache import BatchView, BlockManager, KVPool
from chandra.ops.contracts import ForwardBatch, IntArray, KVView


class Forward(Protocol):
    """What a step needs of a decoder."""

    def forward(self, batch: ForwardBatch, kv: KVView) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits `(r, vocab)` of the batch's logit rows."""
        ...


class Sampled:
    """What a step brought for one sequence."""

    __slots__ = ("error", "logprobs", "token_id")

    def __init__(self) -> None:
        self.token_id: int | None = None
        self.logprobs: TokenLogprobs | None = None
        self.error: NumericError | None = None


class ModelRunner:
    """Owns the arrays that describe a step; they are as large as a step can be and are reused."""

    def __init__(self, decoder: Forward, pool: KVPool, blocks: BlockManager, config: EngineConfig) -> None:
        self._decoder = decoder
        self._blocks = blocks
        self._view = BatchView(pool, config.max_num_seqs, blocks.max_blocks, config.chunk)
        self._count: IntArray = np.arange(max(config.context_len, config.chunk) + 1, dtype=np.int32)
        self._tokens: IntArray = np.empty(config.chunk, dtype=np.int32)
        self._positions: IntArray = np.empty(config.chunk, dtype=np.int32)
        self._starts: IntArray = np.zeros(config.max_num_seqs + 1, dtype=np.int32)
        self._contexts: IntArray = np.empty(config.max_num_seqs, dtype=np.int32)
        self._rows: IntArray = np.empty(config.max_logit_rows, dtype=np.int32)

    def run(self, chunks: Seq[Chunk]) -> list[Sampled]:
        """Compute the chunks and sample."""
        if not chunks:
            return []
        batch = self._batch(chunks)
        self._view.prepare([self._blocks.tables[c.sequence.id] for c in chunks], batch.positions, batch.query_start)
        logits = self._decoder.forward(batch, self._view)
        results, row = [], 0
        for chunk in chunks:
            wanted = len(chunk.scored)
            results.append(self._sample(chunk, logits[row : row + wanted]))
            row += wanted
        return results

    def _batch(self, chunks: Seq[Chunk]) -> ForwardBatch:
        count, tokens, positions = self._count, self._tokens, self._positions
        row, rows = 0, 0
        for index, chunk in enumerate(chunks):
            sequence, start, end, scored = chunk
            stop = row + end - start
            tokens[row:stop] = sequence.tokens[start:end]
            positions[row:stop] = count[start:end]
            self._starts[index + 1] = stop
            self._contexts[index] = end
            first = row + scored.start - start
            self._rows[rows : rows + len(scored)] = count[first : first + len(scored)]
            row, rows = stop, rows + len(scored)
        size = len(chunks)
        return ForwardBatch(
            tokens[:row], positions[:row], self._starts[: size + 1], self._contexts[:size], self._rows[:rows]
        )

    def _sample(self, chunk: Chunk, logits: np.ndarray[Any, np.dtype[np.float32]]) -> Sampled:
        """logits: one row for each of `chunk.scored`."""
        result, sequence = Sampled(), chunk.sequence
        try:
            self._score_prompt(chunk, logits)
            if chunk.end == sequence.num_tokens and sequence.params.max_tokens != 0:
                self._next_token(result, sequence, logits[-1])
        except NumericError as error:
            result.error = error
        return result

    def _score_prompt(self, chunk: Chunk, logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        sequence = chunk.sequence
        if sequence.prompt_logprobs is None:
            return
        for position, row in zip(chunk.scored, logits, strict=True):
            if sequence.next_scored <= position < sequence.prompt_len - 1:
                token_id = int(sequence.tokens[position + 1])
                sequence.prompt_logprobs.append(logprobs_of(row, token_id, sequence.params.prompt_logprobs or 0))

    def _next_token(self, result: Sampled, sequence: Sequence, row: Row) -> None:
        params, generated = sequence.params, sequence.num_generated
        raw = row.copy() if params.logprobs is not None else row
        banned = sequence.banned if generated < params.min_tokens else ()
        result.token_id = sample(row, params, sequence.tokens, generated, sequence.seed, banned)
        if params.logprobs is not None:
            result.logprobs = logprobs_of(raw, result.token_id, params.logprobs)

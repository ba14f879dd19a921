"""Which tokens of which sequences are computed in the next step.

Continuous batching (Yu et al., Orca, 2022) with chunked prefill (Agrawal et al., Sarathi-Serve, 2024): every running
sequence that decodes gets its one row, and prompts fill up the rest of the step in chunks. Sequences are served in
order of arrival. When blocks run out, the latest arrival gives its own back: they wait in swap space, or are computed
again later. The earliest can always go on, because a sequence that does not fit alone is never accepted.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from chandra.engine.config import EngineConfig
from chandra.engine.sequence import Sequence, State
from chandra.kvcache import BlockManager

_by_id = attrgetter("id")


class Chunk(NamedTuple):
    """Tokens `start:end` of a sequence, to be computed in one step. `scored`: positions whose logits are wanted, which
    are those that predict its prompt, if asked for, and the last token there is."""

    sequence: Sequence
    start: int
    end: int
    scored: range


class Scheduler:
    """The waiting and the running sequences, both in order of arrival."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.chunk = config.chunk  # less under memory pressure
        self.stuck: list[Sequence] = []  # those that do not even fit alone, since the cache was made smaller
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._chosen: dict[int, Chunk] = {}
        self._tokens_left = 0
        self._rows_left = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_id)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most one per sequence: at most `chunk` tokens, `max_logit_rows` logits."""
        self._chosen, self.stuck = {}, []
        self._tokens_left, self._rows_left = self.chunk, self.config.max_logit_rows
        preemptions = self.preemptions
        prefilling = [s for s in self.running if s.num_tokens - s.num_computed > 1]
        for sequence in [s for s in self.running if s.num_tokens - s.num_computed == 1]:
            self._place(sequence)
        for sequence in prefilling:
            self._place(sequence)
        if preemptions == self.preemptions:
            self._admit()
        return list(self._chosen.values())

    def give_way(self, swap: bool, earliest: bool = False) -> bool:
        """Preempt the latest arrival that holds blocks, to swap space if `swap`. False if there is none, or only the
        earliest and that is not to be touched."""
        if not any(s.id in self.blocks.tables for s in self.waiting) and len(self.running) <= (not earliest):
            return False
        self._preempt(self._latest(), swap)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, whatever its state, and free its blocks."""
        (self.running if sequence.state is State.RUNNING else self.waiting).remove(sequence)
        sequence.state = State.FINISHED
        self.blocks.free(sequence.id)

    def release_followers(self, leader: Sequence) -> None:
        """Let the sequences that share the leader's prompt begin with its blocks."""
        for sequence in self.waiting:
            if sequence.leader is leader:
                sequence.leader = None
                sequence.num_computed = self.blocks.fork(leader.id, sequence.id, sequence.num_tokens)

    def _admit(self) -> None:
        for sequence in self._admissible():
            if len(self.running) == self.config.max_num_seqs or not self._tokens_left or not self._rows_left:
                return
            swapped = sequence.id in self.blocks.swapped
            if not swapped and sequence.id not in self.blocks.tables:
                self._start(sequence)
            # room for the whole of it, and for each running sequence to go on: else it would soon be preempted again
            room = self.blocks.has_room(sequence.id, sequence.num_tokens, self.chunk, len(self.running))
            if self.running and not room:
                return
            if swapped:
                self._swap_in(sequence)
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_by_id)
            sequence.state = State.RUNNING
            self._place(sequence)

    def _swap_in(self, sequence: Sequence) -> None:
        """Bring it back, at the cost of those that only hold a prompt; where even that does not do, it starts anew."""
        while not self.blocks.swap_in(sequence.id):
            holder = next((s for s in reversed(self.waiting) if s.id in self.blocks.tables), None)
            self.blocks.free((holder or sequence).id)
            if holder is None:
                self._start(sequence)
                return

    def _start(self, sequence: Sequence) -> None:
        reuse = sequence.prompt_logprobs is None
        sequence.num_computed = self.blocks.allocate(sequence.id, sequence.tokens, sequence.salt, reuse)

    def _admissible(self) -> Iterator[Sequence]:
        return (s for s in tuple(self.waiting) if not s.held_back)

    def _place(self, sequence: Sequence) -> None:
        """Choose the sequence's next chunk, at the cost of later arrivals if need be."""
        if sequence.state is not State.RUNNING:  # preempted in this step
            return
        end = self._chunk_end(sequence)
        if end == sequence.num_computed:
            return
        while not self.blocks.append(sequence.id, end):
            victim = self._latest()
            if victim is self.running[0]:
                self.stuck.append(victim)
            self._preempt(victim)
            if victim is sequence:
                return
        start, first = sequence.num_computed, sequence.next_scored
        scored = range(max(first, start) if first < sequence.prompt_len - 1 else sequence.num_tokens - 1, end)
        self._chosen[sequence.id] = Chunk(sequence, start, end, scored)
        self._tokens_left -= end - start
        self._rows_left -= len(scored)

    def _chunk_end(self, sequence: Sequence) -> int:
        """Where the chunk ends: at a block boundary if the prompt goes on, so that windows stay within their blocks."""
        start, size = sequence.num_computed, self.blocks.block_size
        end = min(sequence.num_tokens, start + self._tokens_left)
        if sequence.next_scored < sequence.prompt_len - 1:
            end = min(end, max(start, sequence.next_scored) + self._rows_left)
        if end < sequence.num_tokens and end // size * size > start:
            end = end // size * size
        return end if self._rows_left else start

    def _latest(self) -> Sequence:
        """The latest arrival that holds blocks; those that do not run yet come first."""
        holding = (s for s in reversed(self.waiting) if s.id in self.blocks.tables)
        return next(holding, self.running[-1])

    def _preempt(self, sequence: Sequence, swap: bool = True) -> None:
        if sequence.state is State.WAITING:
            self.blocks.free(sequence.id)
            return
        if not (swap and self.blocks.swap_out(sequence.id, sequence.tokens)):
            self.blocks.free(sequence.id)
        self.preemptions += 1
        self.running.remove(sequence)
        sequence.state = State.WAITING
        self.add(sequence)
        chunk = self._chosen.pop(sequence.id, None)
        if chunk is not None:
            self._tokens_left += chunk.end - chunk.start
            self._rows_left += len(chunk.scored)

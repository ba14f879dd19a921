"""The limits of an engine, as the plan sets them."""

from __future__ import annotations

from dataclasses import dataclass

from chandra.errors import UsageError


@dataclass(frozen=True)
class EngineConfig:
    """`context_len`: tokens of one sequence, prompt and answer. `chunk`: tokens of one step at most, all sequences
    together. `max_logit_rows`: rows of logits of one step at most. Raises UsageError if they contradict each other."""

    context_len: int
    max_num_seqs: int
    chunk: int
    max_logit_rows: int
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.context_len < 1 or self.max_num_seqs < 1:
            raise UsageError("context length and number of sequences must be positive")
        if min(self.chunk, self.max_logit_rows) < self.max_num_seqs:
            raise UsageError(
                f"{self.max_num_seqs} sequences at once need a chunk and as many rows of logits of at least that size"
                f" (chunk {self.chunk}, rows {self.max_logit_rows})",
                "raise them, or allow fewer sequences",
            )

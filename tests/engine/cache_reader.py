"""A decoder that is a pure function of what stands in the cache, so that a wrong table changes the text."""

from __future__ import annotations

from typing import Any

import numpy as np

from chandra.engine import Engine, EngineConfig
from chandra.kvcache import KVPool, LayerGroup, SwapSpace
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.ops.contracts import ForwardBatch, KVView
from chandra.ops.reference import ReferenceBackend

VOCAB, SIZE = 97, 4
FULL, WINDOW = LayerGroup((0,), 1, 1), LayerGroup((1,), 1, 1, window=9)


class Host(ReferenceBackend):
    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        return np.full(shape, -1, dtype)

    def trim(self, array: np.ndarray[Any, Any], rows: int) -> bool:
        array[rows:] = -1
        return True


class CacheReader:
    """Writes each token into the cache of its two layers; logits depend on all tokens the row sees there."""

    def __init__(self, max_rows: int, max_logit_rows: int) -> None:
        self.limits = (max_rows, max_logit_rows)
        self.steps: list[list[int]] = []  # rows of each sequence, by step
        self.poison: int | None = None  # a row whose last token is this one gets NaN

    def forward(self, batch: ForwardBatch, kv: KVView) -> np.ndarray[Any, np.dtype[np.float32]]:
        assert len(batch.token_ids) <= self.limits[0]
        assert len(batch.logit_rows) <= self.limits[1]
        self.steps.append(np.diff(batch.query_start).tolist())
        for layer in (0, 1):
            kv.layer(layer).k.reshape(-1)[kv.tables(layer).slots] = batch.token_ids
        owners = np.repeat(np.arange(len(batch.context_lens)), np.diff(batch.query_start))
        assert (batch.context_lens == batch.positions[batch.query_start[1:] - 1] + 1).all()
        out = np.empty((len(batch.logit_rows), VOCAB), np.float32)
        for index, row in enumerate(batch.logit_rows):
            seen = [self._seen(kv, layer, owners[row], int(batch.positions[row])) for layer in (0, 1)]
            assert -1 not in [*seen[0], *seen[1]]
            assert seen[0][-len(seen[1]) :] == seen[1]
            out[index] = logits_after(seen[0])
            if seen[0][-1] == self.poison:
                out[index, 5] = np.nan
        return out

    def _seen(self, kv: KVView, layer: int, sequence: int, position: int) -> list[int]:
        start = max(0, position - 8) if layer == 1 else 0
        where = np.arange(start, position + 1)
        blocks = kv.tables(layer).block_table[sequence, where // SIZE]
        assert (blocks >= 0).all()
        return [int(t) for t in kv.layer(layer).k.reshape(-1)[blocks * SIZE + where % SIZE]]


def logits_after(tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The logits of this decoder after these tokens."""
    state = np.random.default_rng([len(tokens), *tokens])
    return (state.standard_normal(VOCAB) * 3).astype(np.float32)


def make_engine(
    full: int = 60,
    window: int = 40,
    context: int = 64,
    seqs: int = 4,
    chunk: int = 16,
    rows: int = 0,
    slots: int = 0,
    **config: Any,
) -> tuple[Engine, CacheReader]:
    ledger = Ledger([Device("cpu", "cpu", 1 << 30)])
    host: Any = {"cpu": Host()}
    pool = KVPool([FULL, WINDOW], [full, window], SIZE, "f32", host, ledger)
    swap = SwapSpace(pool, [slots, slots], host, ledger) if slots else None
    decoder = CacheReader(chunk, rows or seqs)
    limits = EngineConfig(context, seqs, chunk, rows or seqs, **config)
    return Engine(decoder, pool, limits, VOCAB, eos_ids=(0,), swap=swap), decoder

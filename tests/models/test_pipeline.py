"""Micro-batches: the same bits as the whole, and devices that really work at once."""

from __future__ import annotations

from threading import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kit import CPU, DenseKV
from test_loader import checkpoint

from chandra.backends.virtual.backend import VirtualBackend
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.models import Backends, Decoder, load_decoder
from chandra.models.pipeline import split

LENGTHS = [9, 1, 14, 1, 1, 6]
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, 96, n)] for i, n in enumerate(LENGTHS)]


def decoder(stages: list[VirtualBackend], micro_rows: int) -> tuple[Decoder, DenseKV]:
    spec, source = checkpoint()
    ledger = Ledger([CPU, *(stage.device for stage in stages)])
    places = Backends(stages[0], (stages[0], stages[1], stages[1], stages[2]), stages[0])
    made = load_decoder(
        source, spec, places, ledger, context_length=64, max_rows=64, max_logit_rows=64, micro_rows=micro_rows
    )
    return made, DenseKV(spec, stages[0], len(PROMPTS), 32)


def virtual(kind: type[VirtualBackend] = VirtualBackend) -> list[VirtualBackend]:
    return [kind(Device(f"virtual:{i}", "virtual", 1 << 28)) for i in range(3)]


def logits(made: Decoder, kv: DenseKV, all_logits: bool) -> list[Any]:
    """A prefill of all prompts, then a step in which every sequence has one more token."""
    first = kv.batch([(i, prompt, 0) for i, prompt in enumerate(PROMPTS)], all_logits)
    out = [made.forward(first, kv).copy()]
    second = kv.batch([(i, [5 + i], len(prompt)) for i, prompt in enumerate(PROMPTS)], True)
    return [*out, made.forward(second, kv).copy()]


@pytest.mark.parametrize("micro_rows", [1, 3, 16])
@pytest.mark.parametrize("all_logits", [True, False])
def test_parts_give_the_bits_of_the_whole(micro_rows: int, all_logits: bool) -> None:
    whole = logits(*decoder(virtual(), 0), all_logits)
    for one, other in zip(whole, logits(*decoder(virtual(), micro_rows), all_logits), strict=True):
        assert np.array_equal(one, other)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 9))
def test_parts_are_the_batch(lengths: list[int], least: int) -> None:
    spec, _ = checkpoint()
    kv = DenseKV(spec, virtual()[0], len(lengths), 16)
    batch = kv.batch([(i, list(range(n)), 2) for i, n in enumerate(lengths)])
    parts = split(batch, kv, least)
    rows = [(int(t), int(p)) for part in parts for t, p in zip(part.batch.token_ids, part.batch.positions, strict=True)]
    if len(batch.token_ids) < least:
        assert parts == []
        return
    assert rows == list(zip(batch.token_ids.tolist(), batch.positions.tolist(), strict=True))
    assert np.array_equal(np.concatenate([part.tables(0).slots for part in parts]), kv.tables(0).slots)
    for part in parts:
        inner, tables = part.batch, part.tables(0)
        assert part.tables(1) is tables
        assert len(inner.token_ids) >= least
        assert inner.query_start[0] == 0
        assert inner.query_start[-1] == len(inner.token_ids)
        for i, (start, stop) in enumerate(zip(inner.query_start, inner.query_start[1:], strict=False)):
            assert inner.context_lens[i] == inner.positions[stop - 1] + 1
            block = tables.block_table[i, inner.positions[start] // kv.block_size]
            assert block == tables.slots[start] // kv.block_size


def test_devices_work_at_once() -> None:
    meeting = Barrier(2, timeout=20)

    class Meeting(VirtualBackend):
        """The second device in its first part and the first device in its second part wait for each other."""

        seen = 0

        def attention(self, *arguments: Any, **more: Any) -> None:
            self.seen += 1
            if (self.device.name, self.seen) in (("virtual:0", 2), ("virtual:1", 1)):
                meeting.wait()
            super().attention(*arguments, **more)

    made, kv = decoder(virtual(Meeting), 12)
    made.forward(kv.batch([(i, prompt, 0) for i, prompt in enumerate(PROMPTS)]), kv)
    assert not meeting.broken


def test_an_error_in_a_stage_ends_the_step() -> None:
    class Failing(VirtualBackend):
        def attention(self, *arguments: Any, **more: Any) -> None:
            if self.device.name == "virtual:1":
                raise RuntimeError("lost")
            super().attention(*arguments, **more)

    made, kv = decoder(virtual(Failing), 4)
    with pytest.raises(RuntimeError, match="lost"):
        made.forward(kv.batch([(i, prompt, 0) for i, prompt in enumerate(PROMPTS)]), kv)

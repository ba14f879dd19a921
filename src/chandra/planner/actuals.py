"""What runs took beside the rows of their plans: it corrects what later plans say of the process.

Each run notes, once it has ended, what is then known better: the bytes of the process before there was a model, the
bytes that stayed when all of the model was gone, those of a GPU's context. The notes lie in the file of the
calibration, which begins without any.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from chandra.memory.device import Device, format_size
from chandra.memory.host import resident_bytes, trim_heap
from chandra.memory.ledger import Kind, Ledger
from chandra.memory.plan import Plan
from chandra.planner.kernels import scratch_held

FILE = "calibration.json"
RECENT = 8  # runs that count
ASSUMED = 2  # runs that the assumption weighs as much as
ODD = 2  # runs with more than one and a half times the assumption and SPAN that do not count
SPAN = 8 << 20

# Bytes, measured: a process with nothing but modules; for each entry of the vocabulary; with each further device; what
# it grows by when it computes (stacks of threads, code of kernels, what malloc keeps), for GPUs with torch.
BASE, TOKEN, EACH = 40 << 20, 18, 1 << 20
GROWTH = {"cpu": 10 << 20, "cuda": 210 << 20}


@dataclass(frozen=True)
class Actual:
    """Bytes that the last of `count` runs took for one thing, the latest one on `date`."""

    date: str = ""
    count: int = 0
    seen: tuple[int, ...] = ()

    def expected(self, assumed: int) -> int:
        """Bytes to plan with: never less than a recent run took, and the assumption counts the less the more runs there
        were. The largest of values far over it do not count: one run among other things (a notebook, a test)
        spoils no plan, but what happens again is true here."""
        far = 3 * assumed // 2 + SPAN
        seen = [n for n in self.seen if n <= far] + sorted(n for n in self.seen if n > far)[:-ODD]
        most = max(seen, default=assumed)
        return max(most, (ASSUMED * assumed + len(seen) * most) // (ASSUMED + len(seen)))


class Actuals(dict[str, Actual]):
    """By what was measured: "base", "growth cpu", "growth cuda", "context cuda:0"."""

    @classmethod
    def read(cls, home: Path) -> Actuals:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            notes = json.loads((home / FILE).read_text(encoding="utf-8"))["actuals"]
            known = {k: Actual(str(n["date"]), int(n["count"]), tuple(map(int, n["seen"]))) for k, n in notes.items()}
            return cls({name: actual for name, actual in known.items() if actual.seen})
        return cls()

    def of(self, name: str, assumed: int) -> int:
        """Bytes to plan with."""
        return self.get(name, Actual()).expected(assumed)

    def process(self, devices: Sequence[Device], taken: int, vocab_size: int) -> int:
        """Bytes of the host's process when it computes with these devices. `taken`: what it has by now, its vocabulary
        read; 0: it is another one. What it grows by depends on what a run is asked for: runs only ever raise that."""
        kind = _kind(devices)
        growth = max(GROWTH[kind], self.of(f"growth {kind}", GROWTH[kind]))
        return growth + EACH * (len(devices) - 1) + (taken or self.of("base", BASE) + TOKEN * vocab_size)

    def note(self, home: Path, values: Mapping[str, int]) -> None:
        """Keep what a run has shown, if there is a calibration to keep it with."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        for name, nbytes in values.items():
            before = self.get(name, Actual())
            self[name] = Actual(date, before.count + 1, (*before.seen, nbytes)[-RECENT:])
        with suppress(OSError, ValueError):
            document = json.loads((home / FILE).read_text(encoding="utf-8"))
            document["actuals"] = {name: asdict(actual) for name, actual in self.items()}
            written = home / f"{FILE}.{os.getpid()}"
            written.write_text(json.dumps(document, indent=1), encoding="utf-8")
            written.replace(home / FILE)

    def __str__(self) -> str:
        what = ", ".join(f"{name} {format_size(max(actual.seen))}" for name, actual in self.items())
        return f"{max(a.count for a in self.values())} runs until {max(a.date for a in self.values())}: at most {what}"


def _kind(devices: Iterable[Device]) -> str:
    """What a process with these devices is like."""
    return "cuda" if {"cuda", "assumed"} & {device.kind for device in devices} else "cpu"


_observed = 0  # runs of this process: what the first one has brought into it is there for the others


def observe(home: Path, vocab_size: int) -> Callable[[Plan, Ledger], None]:
    """Look at a process that has everything but the model, whose run begins. Call the result when the model is gone
    again: it notes what has stayed, and what the contexts of GPUs took. In a process that had other runs, or torch for
    some reason of its own, only the latter says anything about others."""
    global _observed
    _observed += 1
    run, alone, taken = _observed, _observed == 1 and "torch" not in sys.modules, sum(resident_bytes())

    def end(plan: Plan, ledger: Ledger) -> None:
        trim_heap()
        rows = [row for row in ledger.rows() if row.kind is Kind.RUNTIME and "/" not in row.device]
        values = {f"context {row.device}": row.reserved for row in rows if plan.device(row.device).kind == "cuda"}
        if alone and run == _observed and not plan.convert:
            more = EACH * (len(plan.devices) - 1) + scratch_held()
            values |= {
                "base": taken - TOKEN * vocab_size,
                f"growth {_kind(plan.devices)}": sum(resident_bytes()) - taken - more,
            }
        Actuals.read(home).note(home, values)

    return end

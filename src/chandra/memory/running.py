"""Which models run: every process that has one loaded says so in a small file, which `chandra ps` reads."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "run"  # in the store's folder
_EVERY = 1.0  # seconds between two writings
_numbers = itertools.count()


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind on one device: what the plan said, what is reserved now, and the most there ever was."""

    device: str
    kind: str
    predicted: int
    actual: int
    peak: int


@dataclass(frozen=True)
class Running:
    """A loaded model. `began`: of its process, in clock ticks since boot, which tells it from a later one of the same
    id; `loaded`, `updated`: Unix time; `sequences`: running and waiting now; `tokens`: generated so far; `pressure`:
    the last steps taken under memory pressure, and back, in words."""

    pid: int
    began: int
    model: str
    format: str
    context: int
    parallel: int
    loaded: float
    updated: float
    sequences: int
    tokens: int
    rows: tuple[MemoryRow, ...]
    pressure: tuple[str, ...] = ()


class StateFile:
    """Tells about one model of this process. A folder that cannot be written is no error: then nobody is told."""

    def __init__(self, home: Path) -> None:
        self._path = home / FOLDER / f"{os.getpid()}.{next(_numbers)}.json"
        self._next = 0.0

    def tell(self, describe: Callable[[], Running], now: bool = False) -> bool:
        """Write what is asked of `describe`, at most once a second unless it is to be `now`; whether it was asked."""
        moment = time.monotonic()
        if moment < self._next and not now:
            return False
        self._next = moment + _EVERY
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".new")
            written.write_text(json.dumps(asdict(describe())), encoding="utf-8")
            written.replace(self._path)
        return True

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def began(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def running(home: Path) -> tuple[Running, ...]:
    """The loaded models, the first loaded first. Files of processes that are gone are removed."""
    found = []
    for path in (home / FOLDER).glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(MemoryRow(**row) for row in fields.pop("rows"))
            state = Running(**fields | {"rows": rows, "pressure": tuple(fields["pressure"])})
            if began(state.pid) == state.began:
                found.append(state)
                continue
        path.unlink(missing_ok=True)
    return tuple(sorted(found, key=lambda state: state.loaded))

"""The ledger: every long-lived byte is reserved here before it exists."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from chandra.errors import BudgetExceeded
from chandra.memory.device import Device, format_size


class Kind(StrEnum):
    """What memory is used for."""

    WEIGHTS = "weights"
    KV = "kv"
    WORKSPACE = "workspace"
    STAGING = "staging"
    LOADING = "loading"  # a tensor on its way into memory; given back before there is a cache
    GRAPHS = "graphs"
    ADAPTERS = "adapters"
    RUNTIME = "runtime"
    PAGE_CACHE = "page cache"
    SWAP = "swap"


@dataclass(frozen=True)
class Row:
    """Bytes reserved on one device for one kind, now and at the highest."""

    device: str
    kind: Kind
    reserved: int
    peak: int


@dataclass(eq=False)
class Reservation:
    """Bytes that may be allocated. Give them back with `release`, twice is harmless, or at the end of a `with`."""

    ledger: Ledger
    device: str
    kind: Kind
    nbytes: int

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self.ledger._change(self.device, self.kind, -self.nbytes)
        self.nbytes = 0

    def resize(self, nbytes: int, over: bool = False) -> None:
        """Grow or shrink in place. Raises BudgetExceeded and changes nothing if the device has no room, unless this
        only takes what another reservation has just given back and may go `over` the cap for it."""
        self.ledger._change(self.device, self.kind, nbytes - self.nbytes, over)
        self.nbytes = nbytes


@dataclass(eq=False)
class Ledger:
    """One per process: reservations by device and kind, and the cap of each device. Safe to share between threads."""

    devices: Iterable[Device]
    _caps: dict[str, int] = field(init=False)
    _reserved: dict[tuple[str, Kind], int] = field(default_factory=dict, init=False)
    _peak: dict[tuple[str, Kind], int] = field(default_factory=dict, init=False)
    _highest: dict[str, int] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._caps = {device.name: device.cap for device in self.devices}

    @property
    def names(self) -> tuple[str, ...]:
        """The devices' names."""
        return tuple(self._caps)

    def reserve(self, device: str, kind: Kind, nbytes: int) -> Reservation:
        """Set bytes aside. Raises BudgetExceeded, with the table, if they would go over the device's cap."""
        self._change(device, kind, nbytes)
        return Reservation(self, device, kind, nbytes)

    def set_cap(self, device: str, nbytes: int) -> None:
        """Change a device's cap at run time. Below what is reserved, `free` is negative until memory is given back."""
        with self._lock:
            self._caps[device] = nbytes

    def free(self, device: str) -> int:
        """Bytes of the device that nothing is reserved for; negative: so many over its cap."""
        with self._lock:
            return self._caps[device] - self._used(device)

    def highest(self, device: str) -> int:
        """The most bytes that were ever reserved on the device at once."""
        return self._highest.get(device, 0)

    def rows(self) -> tuple[Row, ...]:
        with self._lock:
            return tuple(Row(d, k, n, self._peak[d, k]) for (d, k), n in sorted(self._reserved.items()))

    def table(self) -> str:
        """The rows as text."""
        lines = [f"{'device':<12} {'kind':<12} {'reserved':>12} {'peak':>12}"]
        lines += [
            f"{r.device:<12} {r.kind:<12} {format_size(r.reserved):>12} {format_size(r.peak):>12}" for r in self.rows()
        ]
        return "\n".join(lines)

    def _used(self, device: str) -> int:
        return sum(n for (d, _), n in self._reserved.items() if d == device)

    def _change(self, device: str, kind: Kind, delta: int, over: bool = False) -> None:
        with self._lock:
            used, cap = self._used(device), self._caps[device]
            if delta <= 0 or over or used + delta <= cap:
                key = (device, kind)
                self._reserved[key] = self._reserved.get(key, 0) + delta
                self._peak[key] = max(self._peak.get(key, 0), self._reserved[key])
                self._highest[device] = max(self._highest.get(device, 0), used + delta)
                return
        raise BudgetExceeded(
            f"{device}: {format_size(delta)} more for {kind} would go over the cap"
            f" ({format_size(used)} of {format_size(cap)} reserved)",
            table=self.table(),
            hint="raise the budget, or plan with a shorter context or a smaller format",
        )

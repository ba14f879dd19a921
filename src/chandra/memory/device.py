"""Devices, sizes and what a device can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from chandra.errors import UsageError

DeviceKind = Literal["cpu", "cuda", "virtual"]

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")})
_UNITS.update({f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")})
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)\s*$", re.IGNORECASE)
_CANONICAL = {unit.lower(): scale for unit, scale in _UNITS.items()}


def parse_size(text: str) -> int:
    """Bytes of "6GiB" (2^30), "6GB" (10^9), "512MiB" or a plain number. Raises UsageError."""
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"not a size: {text!r}", "write a number and a unit, for example 6GiB (2^30) or 6GB (10^9)")
    return int(float(match[1]) * _CANONICAL[match[2].lower()])


def format_size(nbytes: float) -> str:
    """Bytes for people, in binary units: 6.00 GiB, 512 MiB, 3.1 KiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


@dataclass(frozen=True)
class Device:
    """A place that holds and computes layers.

    `name` is `cpu`, `cuda:0`, `virtual:0`; `cap` is the bytes Chandra may use there. Bandwidths are bytes per second:
    `bandwidth` of its memory, `link` to the host (None: the host itself, or unlimited).
    """

    name: str
    kind: DeviceKind
    cap: int
    bandwidth: float | None = None
    link: float | None = None

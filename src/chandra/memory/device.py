"""Devices, sizes and what a device can do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chandra.errors import UsageError

DeviceKind = Literal["cpu", "cuda", "virtual", "assumed"]

_SCALES = {"b": 1, "": 1}
_SCALES.update({f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")})
_SCALES.update({f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")})
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|b|)\s*", re.IGNORECASE)

# Memory and memory bandwidth of well-known GPUs (datasheets); link: PCIe 3.0 x16 about 12 GB/s effective, 4.0 about 24.
KNOWN_GPUS = {
    "t4": ("16GB", "320GB/s", "12GB/s"),
    "rtx2060": ("6GiB", "336GB/s", "12GB/s"),
    "rtx3060": ("12GiB", "360GB/s", "24GB/s"),
    "rtx3090": ("24GiB", "936GB/s", "24GB/s"),
    "rtx4060": ("8GiB", "272GB/s", "12GB/s"),
    "rtx4090": ("24GiB", "1008GB/s", "24GB/s"),
    "h100": ("80GB", "3350GB/s", "48GB/s"),
}


def parse_size(text: str) -> int:
    """Bytes of "6GiB" (2^30), "6GB" (10^9), "512MiB" or a plain number. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"not a size: {text!r}", "write a number and a unit, for example 6GiB (2^30) or 6GB (10^9)")
    return int(float(match[1]) * _SCALES[match[2].lower()])


def parse_rate(text: str) -> float:
    """Bytes per second of "12GB/s". Raises UsageError."""
    if not text.lower().endswith("/s"):
        raise UsageError(f"not a rate: {text!r}", "write a size per second, for example 12GB/s")
    return float(parse_size(text[:-2]))


def format_size(nbytes: float) -> str:
    """Bytes for people, in binary units: 6.00 GiB, 512 MiB, 3.1 KiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if abs(value) >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


@dataclass(frozen=True)
class Device:
    """A place that holds and computes layers.

    `name` is `cpu`, `cuda:0`, `virtual:0`, or `gpu:0` for one that is only assumed (to plan for a machine that is not
    this one). `cap` is the bytes Chandra may use there. Bandwidths are bytes per second: `bandwidth` of its memory,
    `link` to the host (None: unlimited, or not known).
    """

    name: str
    kind: DeviceKind
    cap: int
    bandwidth: float | None = None
    link: float | None = None

    def simulated(self) -> bool:
        """Whether its speed is slowed down to what was asked for."""
        return self.kind == "virtual" and not (self.bandwidth is None and self.link is None)


@dataclass(frozen=True)
class DeviceRequest:
    """One `--device`, not yet matched with what the machine has. Fields that were not given are None."""

    name: str | None
    kind: DeviceKind | None
    cap: int | None = None
    bandwidth: float | None = None
    link: float | None = None


def parse_device(text: str) -> DeviceRequest:
    """`cuda:0=6GiB`, `cuda:1`, `virtual:6GiB,link=12GB/s,bw=336GB/s`, `16GiB` (any GPU of that size), `rtx2060`.

    Raises UsageError.
    """
    head, *settings = [part.strip() for part in text.split(",")]
    request = _parse_head(head, text)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "link":
            request = replace(request, link=parse_rate(value))
        elif key == "bw":
            request = replace(request, bandwidth=parse_rate(value))
        else:
            raise UsageError(f"unknown setting {key!r} in device {text!r}", "the settings are link=RATE and bw=RATE")
    if request.cap is not None and request.cap <= 0:
        raise UsageError(f"device {text!r} has no memory")
    return request


def _parse_head(head: str, text: str) -> DeviceRequest:
    if head.lower() in KNOWN_GPUS:
        cap, bandwidth, link = KNOWN_GPUS[head.lower()]
        return DeviceRequest(head.lower(), "assumed", parse_size(cap), parse_rate(bandwidth), parse_rate(link))
    if match := re.fullmatch(r"virtual:(.+)", head):
        return DeviceRequest(None, "virtual", parse_size(match[1]))
    if match := re.fullmatch(r"(cuda:\d+|cuda|cpu)(?:=(.+))?", head):
        name = "cuda:0" if match[1] == "cuda" else match[1]
        return DeviceRequest(name, "cpu" if name == "cpu" else "cuda", parse_size(match[2]) if match[2] else None)
    if _SIZE.fullmatch(head):
        return DeviceRequest(None, None, parse_size(head))
    raise UsageError(
        f"not a device: {text!r}",
        f"write cuda:0=6GiB, 16GiB, virtual:6GiB,link=12GB/s or one of {', '.join(KNOWN_GPUS)}",
    )


def number_devices(requests: Sequence[DeviceRequest]) -> tuple[str, ...]:
    """A name for each request: its own, or `virtual:0`, `gpu:1`, … by position; twice the same gets `cuda:0/1`."""
    names: list[str] = []
    for index, request in enumerate(requests):
        name = request.name or f"{'virtual' if request.kind == 'virtual' else 'gpu'}:{index}"
        count = sum(n.split("/")[0] == name for n in names)
        names.append(f"{name}/{count}" if count else name)
    return tuple(names)

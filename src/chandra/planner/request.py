"""What a user asks for, in the one syntax of command line, environment, library and server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from chandra.config import Settings
from chandra.errors import DeviceError, UsageError
from chandra.kvcache.layout import KV_TYPES
from chandra.memory.device import Device, DeviceRequest, format_size, number_devices, parse_device, parse_size
from chandra.memory.host import memory_available, resident_bytes
from chandra.memory.plan import Objective
from chandra.planner.planner import Constraints

HOST_MARGIN = 0.03  # share of the host's free memory that is left to the rest of the machine


@dataclass(frozen=True)
class PlanRequest:
    """The options as they were written; None is "not said". See `chandra plan --help` for their meaning.

    Sizes are texts such as "6GiB", or bytes; `device` and `layers` may be one text or several.
    """

    device: tuple[str, ...] = ()
    host: str | None = None
    disk: str | None = None
    swap: str | None = None
    budget: str | None = None
    ctx: int | None = None
    parallel: int | None = None
    objective: str | None = None
    kv_type: str | None = None
    layers: tuple[str, ...] = ()
    quant: str | None = None
    reserve: str | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("device", "layers"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("host", "disk", "swap", "budget", "reserve"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))

    def with_defaults(self, settings: Settings) -> PlanRequest:
        """What was not said is taken from the environment."""
        said_where = self.device or self.host or self.budget
        asked = replace(self, ctx=self.ctx or settings.context, parallel=self.parallel or settings.parallel)
        asked = replace(asked, kv_type=self.kv_type or settings.kv_type)
        if said_where:
            return asked
        return replace(asked, device=settings.devices, host=settings.host, budget=settings.budget)

    def constraints(self) -> Constraints:
        """Raises UsageError for values that cannot be meant."""
        objectives = get_args(Objective)
        if self.objective is not None and self.objective not in objectives:
            raise UsageError(f"--objective {self.objective}", f"choose one of {', '.join(objectives)}")
        if self.kv_type is not None and self.kv_type not in KV_TYPES:
            raise UsageError(f"--kv-type {self.kv_type}", f"choose one of {', '.join(KV_TYPES)}")
        for name in ("ctx", "parallel", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} is not a positive number")
        return Constraints(
            context=self.ctx,
            parallel=self.parallel,
            objective=self.objective or "quality",  # type: ignore[arg-type]
            kv_type=self.kv_type,
            format=self.quant,
            chunk=self.chunk,
            layers=parse_layers(self.layers),
            reserve=parse_size(self.reserve) if self.reserve else 0,
            swap=parse_size(self.swap) if self.swap else None,
            disk=parse_size(self.disk) if self.disk else 0,
        )

    def may_use_gpus(self) -> bool:
        """Whether the GPUs of this machine are meant, by name or because nothing else is said."""
        kinds = [parse_device(text).kind for text in self.device]
        return "cuda" in kinds or not (kinds or self.host)

    def devices(self, present: Sequence[Device]) -> tuple[Device, ...]:
        """The devices to plan for, the host ("cpu") last. `present`: the GPUs of this machine.

        Raises UsageError, and DeviceError for a GPU that is not there.
        """
        requests = [parse_device(text) for text in self.device]
        if self.budget and (requests or self.host):
            raise UsageError("--budget is the only device; it cannot stand beside --device or --host")
        host = [request for request in requests if request.kind == "cpu"]
        gpus = [request for request in requests if request.kind != "cpu"]
        cap = parse_size(self.host) if self.host else host[0].cap if host else None
        if self.budget and present:
            gpus = [DeviceRequest(present[0].name, "cuda", parse_size(self.budget))]
        elif self.budget:
            cap = parse_size(self.budget)
        elif not requests and not self.host:
            return (*present, Device("cpu", "cpu", host_cap()))
        matched = [_match(request, name, present) for request, name in zip(gpus, number_devices(gpus), strict=True)]
        for device in present:
            cut = sum(d.cap for d in matched if d.kind == "cuda" and d.name.split("/")[0] == device.name)
            if cut > device.cap:
                raise UsageError(
                    f"{device.name} is cut into {format_size(cut)}", f"it has {format_size(device.cap)}: give it less"
                )
        return (*matched, Device("cpu", "cpu", cap or host_cap()))


def host_cap() -> int:
    """Bytes of host memory Chandra may use when nobody says: what is free now and what this process holds already."""
    anonymous, _ = resident_bytes()
    return anonymous + int((1 - HOST_MARGIN) * memory_available())


def _match(request: DeviceRequest, name: str, present: Sequence[Device]) -> Device:
    if request.kind == "virtual":
        assert request.cap is not None
        return Device(name, "virtual", request.cap, request.bandwidth, request.link)
    if request.kind == "cuda":
        physical = next((d for d in present if d.name == request.name), None)
        if physical is None:
            have = ", ".join(d.name for d in present) or "none"
            other = "for a plan of another machine write the GPU's size or chip: 6GiB, rtx2060"
            raise DeviceError(f"there is no device {request.name}", f"GPUs here: {have}; {other}")
        return replace(physical, name=name, cap=min(request.cap or physical.cap, physical.cap))
    assert request.cap is not None
    return Device(name, "assumed", request.cap, request.bandwidth, request.link)


def parse_layers(texts: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """`cuda:0=0-19` or `cpu=3` -> inclusive ranges by device. Raises UsageError."""
    out: dict[str, list[tuple[int, int]]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+)=(\d+)(?:-(\d+))?", text)
        if match is None:
            raise UsageError(f"not a range of layers: {text!r}", "write DEVICE=FIRST-LAST, for example cuda:0=0-19")
        out.setdefault(match[1], []).append((int(match[2]), int(match[3] or match[2])))
    return out

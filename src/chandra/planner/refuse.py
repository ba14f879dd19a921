"""Nothing fits: what would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from chandra.errors import DoesNotFit
from chandra.memory.device import Device, format_size
from chandra.planner.cost import Machine
from chandra.planner.planner import Constraints, search
from chandra.planner.sizes import PlannableModel

MOST = 1 << 44  # bytes: no device is larger


def does_not_fit(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> DoesNotFit:
    """The error, with the smallest changes that would make a plan: to what was asked for, or to the memory."""
    asked = ", ".join(f"{d.name} {format_size(d.cap)}" for d in devices)
    changes = [*smaller_requests(model, devices, machine, c), *more_memory(model, devices, machine, c)]
    kept = f", even as {model.variants[-1].label}" if c.format is None and len(model.variants) > 1 else ""
    return DoesNotFit(
        f"{model.name} does not fit in {asked}{kept}",
        f"it would {', or '.join(changes[:4])}" if changes else "choose a smaller model, or fewer constraints",
    )


def smaller_requests(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> list[str]:
    """One constraint of the user at a time, loosened as little as helps."""

    def fits(**changes: object) -> bool:
        return search(model, devices, machine, replace(c, **changes)) is not None  # type: ignore[arg-type]

    out = []
    if c.context is not None:
        context = largest(lambda n: fits(context=256 * n), c.context // 256)
        out += [f"with --ctx {256 * context}"] if context else []
    if c.kv_type not in (None, "q8_0", "q4_0") and fits(kv_type=None):
        out.append("with --kv-type q8_0")
    if (c.parallel or 1) > 1:
        parallel = largest(lambda n: fits(parallel=n), c.parallel or 1)
        out += [f"with --parallel {parallel}"] if parallel else []
    if c.format is not None:
        found = search(model, devices, machine, replace(c, format=None))
        out += [f"with --quant {found.candidate.sizes.label}"] if found else []
    out += ["without --layers"] if c.layers and fits(layers={}) else []
    out += ["without --chunk"] if c.chunk and fits(chunk=None) else []
    out += ["without --swap"] if c.swap and fits(swap=0) else []
    out += ["without --reserve"] if c.reserve and fits(reserve=0) else []
    return out


def more_memory(model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints) -> list[str]:
    """For each device, how large it would have to be, those that lack least first; or for all of them together."""
    lacks = []
    for index, device in enumerate(devices):
        if any(same_kind(device, other) for other in devices[:index]):
            continue

        def fits(cap: int, index: int = index) -> bool:
            return search(model, with_cap(devices, index, cap), machine, c) is not None

        cap = smallest_cap(fits, device.cap)
        if cap is not None:
            lacks.append((cap - device.cap, f"with {format_size(cap)} on {device.name}"))
    if not c.disk:
        total = model.variants[-1].packed.total
        if search(model, devices, machine, replace(c, disk=total)):
            lacks.append((MOST, f"slowly, with --disk {format_size(total).replace(' ', '')}"))
    if not lacks:

        def all_fit(more: int) -> bool:
            larger = [replace(device, cap=device.cap + more) for device in devices]
            return search(model, larger, machine, c) is not None

        more = smallest_cap(all_fit, 0)
        lacks += [(more, f"with {format_size(more)} more on every device")] if more else []
    return [text for _, text in sorted(lacks)]


def same_kind(a: Device, b: Device) -> bool:
    return replace(a, name="") == replace(b, name="")


def with_cap(devices: Sequence[Device], index: int, cap: int) -> list[Device]:
    return [replace(device, cap=cap) if i == index else device for i, device in enumerate(devices)]


def smallest_cap(fits: Callable[[int], bool], cap: int) -> int | None:
    """The least multiple of 64 MiB above `cap` that fits (within 1 %), or None. More memory never fits worse."""
    unit = 64 << 20
    if not fits(MOST):
        return None
    low, high = cap, cap + unit
    while not fits(high):
        low, high = high, 2 * high
    while high - low > max(unit, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return -(-high // unit) * unit


def largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number in 1..below - 1 that fits, or 0."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

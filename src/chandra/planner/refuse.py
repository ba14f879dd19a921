"""Nothing fits: what would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    found = lacking(devices, len(devices), lambda larger: search(model, larger, machine, c) is not None)
    lacks = [(more, f"with {format_size(device.cap)} on {device.name}") for more, device, _ in found]
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


def lacking(
    devices: Sequence[Device], count: int, fits: Callable[[Sequence[Device]], bool]
) -> Iterator[tuple[int, Device, Sequence[Device]]]:
    """For one device of each kind among the first `count`: the bytes it lacks for what is wanted to fit, the device
    with them, and all devices then."""
    for index, device in enumerate(devices[:count]):

        def larger(cap: int, index: int = index) -> list[Device]:
            return [replace(d, cap=cap) if i == index else d for i, d in enumerate(devices)]

        if not any(replace(d, name="") == replace(device, name="") for d in devices[:index]):
            cap = smallest_cap(lambda cap, larger=larger: fits(larger(cap)), device.cap)  # type: ignore[misc]
            if cap is not None:
                yield cap - device.cap, larger(cap)[index], larger(cap)


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

"""Plans and memory as tables that people can read at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from chandra.memory.device import Device, format_size
from chandra.memory.ledger import Kind
from chandra.memory.plan import Plan
from chandra.memory.running import MemoryRow

BAR = 30  # characters
EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(used: int, cap: int, before: int = 0) -> str:
    """A bar as long as the share of `cap` that is used, shifted by what lies before it."""
    start, end = (min(8 * BAR, round(8 * BAR * n / max(cap, 1))) for n in (before, before + used))
    start -= start % 8
    text = " " * (start // 8) + "█" * ((end - start) // 8) + EIGHTHS[(end - start) % 8].strip()
    return (text if text.strip() or not used else " " * (start // 8) + "▏").ljust(BAR)[:BAR]


def plan_table(plan: Plan) -> str:
    """Devices and kinds with bars, the decision in words, counterfactuals and warnings."""
    w, speed = plan.workload, plan.speed
    cache = f"{plan.kv_type} cache"
    lines = [f"{plan.model}   {plan.format}   context {w.context} x {w.parallel}   {cache}   for {w.objective}", ""]
    for device in plan.devices:
        lines += _device_lines(plan, device)
    lines += [
        f"load {speed.load:.1f} s   first token {speed.first_token:.2f} s after a prompt of {w.prompt}   "
        f"{speed.decode:.3g} tokens/s"
        + (f"   {speed.total:.3g} tokens/s from {w.parallel} sequences" if w.parallel > 1 else ""),
        "",
        *(f"  {decision}" for decision in plan.decisions),
    ]
    lines += ["", *(f"what if: {text}" for text in plan.counterfactuals)] if plan.counterfactuals else []
    lines += ["", *(f"warning: {text}" for text in plan.warnings)] if plan.warnings else []
    return "\n".join(lines)


def _device_lines(plan: Plan, device: Device) -> list[str]:
    """The device as a whole, then each kind where it lies in the bar above."""
    rows = [row for row in plan.predictions if row.device == device.name]
    used = plan.predicted(device.name)
    cap = format_size(device.cap)
    lines = [f"{device.name:<12}│{bar(used, device.cap)}│ {format_size(used):>9} of {cap}  {used / device.cap:.0%}"]
    before = 0
    for row in sorted(rows, key=lambda row: (row.kind == Kind.LOADING, -row.nbytes)):
        if row.kind == Kind.LOADING:  # over before the cache is there: it adds nothing to what comes later
            before = max(0, used - row.nbytes)
        lines.append(f"  {row.kind:<10}│{bar(row.nbytes, device.cap, before)}│ {format_size(row.nbytes):>9}")
        before += row.nbytes
    return [*lines, ""]


def compare_table(plans: Sequence[tuple[str, int, Plan | None]]) -> str:
    """One line for each (format, context): where the layers lie and how fast that is."""
    head = f"{'FORMAT':<8} {'CONTEXT':>8} {'CACHE':>6} {'ON GPU':>9} {'MEMORY':>10} {'FIRST':>8} {'TOKENS/S':>9}"
    lines = [head]
    for label, context, plan in plans:
        if plan is None:
            lines.append(f"{label:<8} {context:>8} {'-':>6} {'does not fit':>20}")
            continue
        apart = {part.name.removesuffix(".experts") for part in plan.experts}
        on_gpu = sum(part.placement == "resident" and part.name not in apart for part in plan.layers)
        memory = format_size(sum(plan.predicted(device.name) for device in plan.devices))
        lines.append(
            f"{label:<8} {context:>8} {plan.kv_type:>6} {f'{on_gpu} of {len(plan.layers)}':>9} {memory:>10}"
            f" {plan.speed.first_token:>6.2f} s {plan.speed.decode:>9.3g}"
        )
    return "\n".join(lines)


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Predicted against actual bytes."""
    lines = [f"{'DEVICE':<12} {'KIND':<12} {'PREDICTED':>12} {'ACTUAL':>12} {'HIGHEST':>12}"]
    for row in rows:
        cells = [format_size(row.predicted), format_size(row.actual), format_size(row.peak)]
        lines.append(f"{row.device:<12} {row.kind:<12} " + " ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)

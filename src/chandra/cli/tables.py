"""Plans and memory as tables that people can read at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from chandra.memory.device import format_size
from chandra.memory.plan import Plan
from chandra.runtime import MemoryRow

BAR = 24  # characters


def bar(used: int, cap: int) -> str:
    """A bar that is full when `used` reaches `cap`."""
    filled = min(BAR, -(-BAR * used // max(cap, 1)))
    return "█" * filled + "░" * (BAR - filled)


def plan_table(plan: Plan) -> str:
    """Devices and kinds with bars, the decision in words, counterfactuals and warnings."""
    w, speed = plan.workload, plan.speed
    lines = [f"{plan.model}  {plan.format}  context {w.context} x {w.parallel}  for {w.objective}", ""]
    for device in plan.devices:
        rows = [row for row in plan.predictions if row.device == device.name]
        if not rows:
            continue
        used = sum(row.nbytes for row in rows)
        lines.append(f"{device.name:<12} {bar(used, device.cap)} {format_size(used):>10} of {format_size(device.cap)}")
        for row in rows:
            lines.append(f"  {row.kind:<10} {bar(row.nbytes, device.cap)} {format_size(row.nbytes):>10}")
    lines += ["", *(f"- {decision}" for decision in plan.decisions), ""]
    lines.append(
        f"load {speed.load:.1f} s   first token {speed.first_token:.2f} s ({w.prompt} tokens)"
        f"   {speed.decode:.1f} tokens/s alone"
        + (f"   {speed.total:.1f} tokens/s of {w.parallel}" if w.parallel > 1 else "")
    )
    lines += [f"what if: {text}" for text in plan.counterfactuals]
    lines += [f"warning: {text}" for text in plan.warnings]
    return "\n".join(lines)


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Predicted against actual bytes."""
    lines = [f"{'DEVICE':<12} {'KIND':<12} {'PREDICTED':>12} {'ACTUAL':>12} {'HIGHEST':>12}"]
    for row in rows:
        cells = [format_size(row.predicted), format_size(row.actual), format_size(row.peak)]
        lines.append(f"{row.device:<12} {row.kind:<12} " + " ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)

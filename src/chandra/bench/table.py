"""All results of a folder in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chandra.memory.device import format_size


def table(folder: Path) -> str:
    """One line for each part."""
    lines = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        part = json.loads(path.read_text(encoding="utf-8"))
        lines.append(_line(part["part"], part["result"]))
    return "\n".join(lines)


def _line(part: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{part}: {found['error'].splitlines()[0]}"
    if part == "device":
        rates = [f"{key} {found[key] / 1e9:.0f} G/s" for key in ("copy", "link", "matmul")]
        return f"{found['name']}: {', '.join(rates)}; context {format_size(found['context'])}"
    if part == "kernels":
        return f"kernels: {len(found['checks'])} checks, {len(found['failed'])} failed"
    if part == "equality":
        return f"the GPU says what the CPU says: {found['equal']}"
    return "  ".join([f"{part}:", *_rates(found), *_memory(found.get("memory", {}))])


def _rates(found: dict[str, Any]) -> list[str]:
    out = []
    for key, value in found.items():
        if key.startswith(("decode", "prefill")):
            shares = [f"{100 * v:.0f} %{k.removeprefix('of')}" for k, v in value.items() if k.startswith("of ") and v]
            out.append(f"{key} {value['tokens/s']:.1f} tok/s" + (f" ({', '.join(shares)})" if shares else ""))
    return out


def _memory(found: dict[str, Any]) -> list[str]:
    return [f"{d} {format_size(m['peak'])} of {format_size(m['planned'])}" for d, m in found.items()]

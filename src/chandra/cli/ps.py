"""`chandra ps`: what runs, and predicted against actual memory. `chandra doctor`: what this machine computes with."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from chandra.cli.tables import memory_table
from chandra.config import Settings
from chandra.errors import DeviceError
from chandra.memory.device import format_size
from chandra.memory.host import memory_available, memory_limit, usable_cores
from chandra.memory.running import Running, running
from chandra.ops.registry import kernels


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register `ps` and `doctor` on an argparse subparsers action."""
    ps = commands.add_parser("ps", parents=[common], help="list running models and their memory")
    ps.add_argument("--verbose", action="store_true", help="every device and kind")
    ps.add_argument("--json", action="store_true", help="print all that is known as JSON")
    ps.set_defaults(run=_ps)
    doctor = commands.add_parser("doctor", parents=[common], help="show devices, limits and kernels of this machine")
    doctor.set_defaults(run=_doctor)


def _ps(arguments: argparse.Namespace) -> int:
    found = running(Settings.from_env().home)
    if arguments.json:
        print(json.dumps([asdict(state) for state in found], indent=1))
        return 0
    print(
        f"{'PID':>8} {'MODEL':<24} {'FORMAT':<8} {'CONTEXT':>10} {'SEQUENCES':>9} {'TOKENS':>9}  {'LOADED':<10} MEMORY"
    )
    for state in found:
        told = [f"{'':>9}memory pressure: {step}" for step in state.pressure]
        print(_line(state), *(told if arguments.verbose else told[-1:]), sep="\n")
        if arguments.verbose:
            print(memory_table(state.rows), end="\n\n")
    return 0


def _line(state: Running) -> str:
    minutes = max(0, round((time.time() - state.loaded) / 60))
    used = [row for row in state.rows if row.kind == "all"]
    memory = ", ".join(f"{r.device} {format_size(r.actual)} of {format_size(r.predicted)} planned" for r in used)
    context = f"{state.context} x {state.parallel}"
    return (
        f"{state.pid:>8} {state.model:<24} {state.format:<8} {context:>10} {state.sequences:>9} {state.tokens:>9}"
        f"  {f'{minutes} min ago':<10} {memory}"
    )


def _doctor(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    import chandra.backends.cpu.kernels
    import chandra.backends.cuda.kernels  # noqa: F401
    from chandra.backends.cpu import _cpu
    from chandra.backends.cuda.driver import usable_gpus
    from chandra.planner.actuals import Actuals
    from chandra.planner.calibrate import calibrated

    settings = Settings.from_env()
    print(f"cpu          {usable_cores()} cores, {_cpu.isa()} kernels (the best here: {_cpu.best_isa()})")
    print(f"host memory  {format_size(memory_available())} free of {format_size(memory_limit())}")
    try:
        gpus = [f"{gpu.name}  {format_size(gpu.cap)} free" for gpu in usable_gpus()]
    except DeviceError as error:
        gpus = [str(error)]
    print("gpus         " + "\n             ".join(gpus or ["none"]))
    print(f"store        {settings.home}")
    print(f"calibration  {calibrated(settings) or 'none yet: it is made at the first use, or by `chandra calibrate`'}")
    print(f"process      {Actuals.read(settings.home) or 'as assumed: no run has ended yet'}")
    table: dict[tuple[str, ...], list[str]] = {}
    for kernel in kernels():
        table.setdefault((kernel.op, kernel.device, kernel.name, kernel.target()), []).append(kernel.format)
    print(f"\n{'OP':<10} {'DEVICE':<8} {'KERNEL':<16} {'RUNS AS':<10} FORMATS")
    for (op, device, name, target), formats in table.items():
        print(f"{op:<10} {device:<8} {name:<16} {target:<10} {' '.join(formats)}")
    return 0

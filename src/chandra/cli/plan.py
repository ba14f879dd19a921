"""`chandra plan MODEL` and `chandra calibrate`: what would happen, before it does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chandra.checkpoint import open_checkpoint
from chandra.cli.export import EXPORTS
from chandra.cli.options import add_memory_options, memory_request
from chandra.cli.store import open_store
from chandra.cli.tables import compare_table, plan_table
from chandra.config import Settings
from chandra.errors import DoesNotFit
from chandra.memory.device import Device, format_size
from chandra.memory.plan import Plan
from chandra.models import read_spec
from chandra.planner import (
    Constraints,
    Machine,
    PlannableModel,
    PlanRequest,
    cached_rate,
    calibrate,
    discover,
    plan,
    plannable,
    plannable_config,
)
from chandra.planner.explain import counterfactuals
from chandra.store import Entry, Store

COMPARED = (2048, 4096, 8192, 16384, 32768)  # contexts


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register `plan` and `calibrate` on an argparse subparsers action."""
    planner = commands.add_parser(
        "plan",
        parents=[common],
        help="show what goes where and how fast it will be, without loading or fetching anything",
        description="Plan a model of the catalog, of the store, or of a path. Exit code 3: nothing fits.",
    )
    planner.add_argument("model", help="a name such as gemma:2b, or the path of a file or folder")
    planner.add_argument("--prompt", type=int, metavar="TOKENS", help="prompt that the first token is predicted for")
    planner.add_argument("--compare", action="store_true", help="a table of formats and contexts instead of one plan")
    planner.add_argument("--json", action="store_true", help="the plan as JSON (see docs/plan.md)")
    planner.add_argument("--export", choices=tuple(EXPORTS), help="the plan in the words of another engine")
    add_memory_options(planner)
    planner.set_defaults(run=_plan)
    calibration = commands.add_parser("calibrate", parents=[common], help="measure what this machine can do")
    calibration.add_argument("--quick", action="store_true", help="a few formats only, in under a second")
    calibration.add_argument("--json", action="store_true", help="print the figures as JSON")
    calibration.set_defaults(run=_calibrate)


@dataclass(frozen=True)
class Question:
    """What is to be planned, for which devices."""

    model: PlannableModel
    devices: Sequence[Device]
    machine: Machine
    constraints: Constraints

    def answer(self, explain: bool = False) -> Plan:
        made = plan(self.model, self.devices, self.machine, self.constraints)
        if not explain:
            return made
        texts = counterfactuals(self.model, self.devices, self.machine, self.constraints, made)
        return replace(made, counterfactuals=texts)


def _plan(arguments: argparse.Namespace) -> int:
    settings = Settings.from_env()
    request = PlanRequest(**memory_request(arguments)).with_defaults(settings)
    store = open_store(settings)
    model, source = describe_model(store, arguments.model, request.quant)
    devices, machine = discover(request, settings, vocab_size=model.spec.vocab_size)
    constraints = request.constraints()
    if constraints.disk and store.has(arguments.model):
        with closing(open_checkpoint(Path(source))) as checkpoint:
            machine = replace(machine, cached=cached_rate(checkpoint))
    if arguments.prompt:
        constraints = replace(constraints, prompt=arguments.prompt)
    question = Question(model, devices, machine, constraints)
    if arguments.compare:
        print(compare_table(compared(question)))
        return 0
    made = question.answer(explain=not arguments.export)
    if arguments.export:
        print(EXPORTS[arguments.export](made, source))
    elif arguments.json:
        print(json.dumps(asdict(made), indent=1))
    else:
        print(plan_table(made))
    return 0


def describe_model(store: Store, name: str, quant: str | None) -> tuple[PlannableModel, str]:
    """The model of a stored name, a path, or the catalog, and what other engines would call it.

    Nothing is fetched. Raises ModelNotFound.
    """
    entry = None if store.has(name) else store.catalog_entry(name)
    if entry is not None:
        return plannable_config(entry.name, entry.config, quant or _only_format(entry)), entry.hub or entry.name
    stored = store.resolve(name)
    checkpoint = open_checkpoint(stored.path)
    try:
        return plannable(stored.name, read_spec(checkpoint), checkpoint, quant), str(stored.path)
    finally:
        checkpoint.close()


def _only_format(entry: Entry) -> str | None:
    """The format, where the catalog has but one file, or the user's tag names one."""
    return entry.quant if entry.packages or entry.name.lower().endswith(entry.quant.lower()) else None


def compared(question: Question) -> list[tuple[str, int, Plan | None]]:
    """A plan for each format and context that the constraints leave open."""
    longest, c = question.model.spec.max_position, question.constraints
    contexts = [c.context] if c.context else sorted({min(longest, n) for n in COMPARED})
    out: list[tuple[str, int, Plan | None]] = []
    for sizes in question.model.variants:
        if c.format is not None and c.format.lower() != sizes.label.lower():
            continue
        for context in contexts:
            wanted = replace(question, constraints=replace(c, context=context, format=sizes.label))
            try:
                out.append((sizes.label, context, wanted.answer()))
            except DoesNotFit:
                out.append((sizes.label, context, None))
    return out


def _calibrate(arguments: argparse.Namespace) -> int:
    machine = calibrate(Settings.from_env(), quick=arguments.quick)
    host = machine.host
    if arguments.json:
        print(json.dumps(asdict(machine), indent=1))
        return 0
    print(f"{'FORMAT':<8} {'DECODE READS':>14} {'PREFILL':>18}")
    for name, rate in host.rates:
        print(f"{name:<8} {format_size(rate.bandwidth) + '/s':>14} {rate.macs / 1e9:>8.1f} G macs/s")
    print(f"a layer takes {1e6 * host.layer_overhead:.0f} us besides; the disk reads {format_size(machine.disk)}/s")
    return 0

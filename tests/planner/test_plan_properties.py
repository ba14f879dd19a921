"""What every plan keeps, over thousands of random models, machines and wishes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest
from planner_models import random_constraints, random_devices, random_machine, random_model

from chandra.errors import DoesNotFit, UsageError
from chandra.kvcache.layout import group_layers
from chandra.memory.device import Device
from chandra.memory.plan import Plan
from chandra.models import workspace_bytes
from chandra.planner import Constraints, Machine, PlannableModel, plan
from chandra.planner.planner import check, search

Case = tuple[random.Random, PlannableModel, list[Device], Machine, Constraints]


def seeds(quick: int, thorough: int) -> list[object]:
    """A few seeds for every run, and many for the slow one."""
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, thorough))]


def cases(first: int, count: int, divided: int = 1) -> Iterator[Case]:
    """Random models, devices with a part of their memory, machines and constraints that contradict nothing; each with
    the source of its randomness, seeded with `first` and on."""
    for seed in range(first, first + count):
        rng = random.Random(seed)
        model = random_model(rng)
        devices = [replace(device, cap=device.cap // divided) for device in random_devices(rng, model)]
        machine, c = random_machine(rng, devices), random_constraints(rng, model, devices)
        try:
            check(model, devices, c)
        except UsageError:
            continue
        yield rng, model, devices, machine, c


def bytes_of(made: Plan, model: PlannableModel) -> dict[str, int]:
    """Bytes on each device, from the plan's parts and the limits that the engine will allocate by."""
    used: dict[str, int] = defaultdict(int)
    sizes = next(v for v in model.variants if v.label == made.format)
    small, small_experts = sizes.packed.small, sizes.packed.small_experts  # stays where it is used
    copied: dict[str, list[float]] = defaultdict(list)
    read: dict[str, list[float]] = defaultdict(list)
    used["cpu"] = 1 << 20  # the process
    for part in made.parts():
        if part.placement in ("resident", "host"):
            used[part.device] += part.nbytes
            continue
        if part.name in ("embedding", "head"):
            used[part.device] += sizes.packed.small_head if part.name == "head" else 0
            continue
        index = int(part.name.split(".")[1])
        stays = small_experts[index] if part.name.endswith("experts") else small[index]
        used[part.device] += int(stays)
        used["cpu"] += int(part.nbytes - stays) if part.placement == "stream" else 0
        (copied if part.placement == "stream" else read)[part.device].append(part.nbytes - stays)
    for name, layers in copied.items():
        used[name] += int(2 * max(layers))
    for name, layers in read.items():
        used["cpu"] += int(min(2, len(layers)) * max(layers)) if name == "cpu" else int(2 * max(layers))
        used[name] += 0 if name == "cpu" else int(max(layers))
    attention = [layer.attention for layer in model.spec.layers]
    groups = group_layers(attention, [part.device for part in made.layers])
    for group, blocks in zip(groups, made.num_blocks, strict=True):
        used[group.device] += blocks * made.block_size * group.token_bytes(made.kv_type)
    for name in {part.device for part in made.parts()} | {"cpu"}:
        held = [i for i, part in enumerate(made.layers) if part.device == name]
        held += [int(part.name.split(".")[1]) for part in made.experts if part.device == name]
        rows = made.max_logit_rows if made.head.device == name else 0
        used[name] += workspace_bytes(model.spec, held, made.chunk, rows)
    return used


def check_plan(made: Plan, model: PlannableModel, c: Constraints) -> None:
    used = bytes_of(made, model)
    for device in made.devices:
        assert not used[device.name] or used[device.name] + c.reserve <= device.cap
        assert made.predicted(device.name) >= used[device.name]
    assert c.swap is None or made.swap_bytes == c.swap
    assert 0 <= sum(row.nbytes for row in made.predictions if row.kind == "swap") <= made.swap_bytes
    for value, wanted in (
        (made.workload.context, c.context),
        (made.workload.parallel, c.parallel),
        (made.kv_type, c.kv_type),
        (made.format, c.format),
        (made.chunk, c.chunk),
        (made.workload.objective, c.objective),
    ):
        assert wanted is None or value == wanted
    for name, spans in c.layers.items():
        given = {i for first, last in spans for i in range(first, last + 1)}
        assert {i for i, part in enumerate(made.layers) if part.device == name} == given
    on_disk = sum(part.nbytes for part in made.parts() if part.placement == "disk")
    assert on_disk <= c.disk
    assert min(made.chunk, made.max_logit_rows) >= made.max_num_seqs >= made.workload.parallel
    check_layers(made, model)


def check_layers(made: Plan, model: PlannableModel) -> None:
    """Every layer once, in order, all bytes accounted for, and the layers of a device in one run."""
    assert [part.name for part in made.layers] == [f"layers.{i}" for i in range(model.spec.num_layers)]
    sizes = next(v for v in model.variants if v.label == made.format)
    assert sum(part.nbytes for part in made.parts()) == sizes.packed.total
    runs = [made.layers[0].device]
    for part in made.layers[1:]:
        if part.device != runs[-1]:
            runs.append(part.device)
    assert len(runs) == len(set(runs))
    assert {part.device for part in made.parts()} <= {device.name for device in made.devices}


@pytest.mark.parametrize("seed", seeds(3, 12))
def test_plans_keep_budgets_and_constraints(seed: int) -> None:
    made = 0
    for _, model, devices, machine, c in cases(1000 * seed, 50):
        if search(model, devices, machine, c) is not None:
            check_plan(plan(model, devices, machine, c), model, c)
            made += 1
    assert made > 10


@pytest.mark.parametrize("seed", seeds(2, 8))
def test_more_memory_is_never_worse(seed: int) -> None:
    for rng, model, devices, machine, c in cases(5000 + 1000 * seed, 25):
        before = search(model, devices, machine, c)
        index = rng.randrange(len(devices))
        more = list(devices)
        more[index] = replace(devices[index], cap=int(devices[index].cap * rng.uniform(1, 2)))
        after = search(model, more, machine, c)
        if before is not None:
            assert after is not None
            *rank, cost = before.score
            assert (*after.score[:-1], after.score[-1] * (1 - 1e-9)) <= (*rank, cost)


@pytest.mark.parametrize("seed", seeds(1, 5))
def test_the_bound_that_prunes_is_a_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search finds what trying every candidate finds."""
    from chandra.planner import planner

    for _, model, devices, machine, c in cases(9000 + 1000 * seed, 25):
        pruned = search(model, devices, machine, c)
        with monkeypatch.context() as patch:
            patch.setattr(planner, "least_cost", lambda total, places, bounds: 0 * bounds)  # noqa: ARG005
            full = search(model, devices, machine, c)
        assert (pruned is None) == (full is None)
        if pruned is not None and full is not None:
            assert pruned.score == pytest.approx(full.score)


@pytest.mark.parametrize("seed", seeds(1, 5))
def test_refusals_name_a_change_that_helps(seed: int) -> None:
    refused = 0
    for _, model, devices, machine, c in cases(20000 + 1000 * seed, 25, divided=4):
        if search(model, devices, machine, c) is None:
            with pytest.raises(DoesNotFit, match="it would") as refusal:
                plan(model, devices, machine, c)
            assert refusal.value.exit_code == 3
            refused += 1
    assert refused > 2

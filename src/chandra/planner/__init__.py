"""Plans: from headers, devices and a workload to what goes where, how large it will be and how fast it will run."""

from __future__ import annotations

from collections.abc import Sequence

from chandra.memory.device import Device
from chandra.memory.plan import Plan
from chandra.planner.actuals import observe
from chandra.planner.assemble import assemble
from chandra.planner.calibrate import cached_rate, calibrate, discover
from chandra.planner.cost import ASSUMED_HOST, Machine, Profile, Rate, machine_with
from chandra.planner.planner import Constraints, check, search
from chandra.planner.request import PlanRequest
from chandra.planner.sizes import PlannableModel, plannable, plannable_config, tensor_formats

__all__ = [
    "ASSUMED_HOST",
    "Constraints",
    "Machine",
    "PlanRequest",
    "PlannableModel",
    "Profile",
    "Rate",
    "cached_rate",
    "calibrate",
    "discover",
    "machine_with",
    "observe",
    "plan",
    "plannable",
    "plannable_config",
    "tensor_formats",
]


def plan(model: PlannableModel, devices: Sequence[Device], machine: Machine, constraints: Constraints) -> Plan:
    """The best plan that keeps the constraints. `devices` includes the host, named "cpu". A device that
    `machine` has no profile for gets that of its datasheet.

    Pure: reads no weights, allocates nothing. Raises UsageError for constraints that contradict each other or the
    model, and DoesNotFit, naming the smallest changes that would fit.
    """
    check(model, devices, constraints)
    machine = machine_with(machine, devices)
    found = search(model, devices, machine, constraints)
    if found is None:
        from chandra.planner.refuse import does_not_fit

        raise does_not_fit(model, devices, machine, constraints)
    return assemble(found, devices, constraints.reserve)

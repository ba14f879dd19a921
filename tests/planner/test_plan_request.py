"""From options to devices and constraints."""

from __future__ import annotations

import pytest

from chandra.config import Settings
from chandra.errors import DeviceError, UsageError
from chandra.memory.device import Device
from chandra.planner import PlanRequest

GIB = 1 << 30
CUDA = (Device("cuda:0", "cuda", 20 * GIB, 1e12, 2e10),)


def test_one_text_is_a_device_and_bytes_are_a_size() -> None:
    request = PlanRequest(device="virtual:6GiB,link=12GB/s", host=2 * GIB)  # type: ignore[arg-type]
    first, host = request.devices(())
    assert (first.name, first.kind, first.cap, first.link) == ("virtual:0", "virtual", 6 * GIB, 12e9)
    assert (host.name, host.cap) == ("cpu", 2 * GIB)


def test_a_gpu_is_capped_and_cut() -> None:
    cut = PlanRequest(device=("cuda:0=6GiB", "cuda:0=4GiB"), host="8GiB").devices(CUDA)
    assert [(d.name, d.cap) for d in cut] == [("cuda:0", 6 * GIB), ("cuda:0/1", 4 * GIB), ("cpu", 8 * GIB)]
    assert PlanRequest(device=("cuda:0=60GiB",)).devices(CUDA)[0].cap == 20 * GIB
    with pytest.raises(UsageError, match="cut into"):
        PlanRequest(device=("cuda:0=16GiB", "cuda:0=16GiB")).devices(CUDA)
    with pytest.raises(DeviceError, match="cuda:1"):
        PlanRequest(device=("cuda:1",)).devices(CUDA)


def test_a_budget_is_the_only_device() -> None:
    assert PlanRequest(budget="4GiB").devices(())[-1].cap == 4 * GIB
    assert PlanRequest(budget="4GiB").devices(CUDA)[0].cap == 4 * GIB
    with pytest.raises(UsageError, match="--budget"):
        PlanRequest(budget="4GiB", host="1GiB").devices(())


def test_the_environment_fills_what_was_not_said() -> None:
    settings = Settings.from_env({"CHANDRA_CTX": "2048", "CHANDRA_BUDGET": "4GiB", "CHANDRA_KV_TYPE": "q8_0"})
    filled = PlanRequest(ctx=512).with_defaults(settings)
    assert (filled.ctx, filled.budget, filled.kv_type) == (512, "4GiB", "q8_0")
    assert PlanRequest(host="1GiB").with_defaults(settings).budget is None


@pytest.mark.parametrize(
    "options",
    [{"objective": "fast"}, {"kv_type": "int3"}, {"ctx": 0}, {"parallel": -1}, {"layers": ("0-3",)}, {"reserve": "x"}],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PlanRequest(**options).constraints()  # type: ignore[arg-type]


def test_ranges_are_read() -> None:
    constraints = PlanRequest(layers=("cuda:0=0-19", "cpu=20"), disk="1GiB").constraints()
    assert constraints.layers == {"cuda:0": [(0, 19)], "cpu": [(20, 20)]}
    assert constraints.disk == GIB

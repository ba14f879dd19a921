"""Sizes, devices, limits and the ledger."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.errors import BudgetExceeded, UsageError
from chandra.memory.device import Device, format_size, number_devices, parse_device, parse_rate, parse_size
from chandra.memory.host import memory_available, memory_limit, resident_bytes, usable_cores
from chandra.memory.ledger import Kind, Ledger


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 << 30), ("6GB", 6_000_000_000), ("512mib", 512 << 20), ("1.5 GiB", 3 << 29), ("42", 42)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "6 gigs", "1e9", "nan", "6GiB/s"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.integers(0, 1 << 45))
def test_sizes_for_people_are_near_the_truth(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.05, abs=1)


def test_devices() -> None:
    device = parse_device("virtual:6GiB,link=12GB/s,bw=336GB/s")
    assert (device.kind, device.cap, device.link, device.bandwidth) == ("virtual", 6 << 30, 12e9, 336e9)
    assert parse_device("cuda:1=8GB").cap == 8_000_000_000
    assert parse_device("rtx2060").bandwidth == parse_rate("336GB/s")
    names = number_devices([parse_device(text) for text in ("cuda:0=6GiB", "cuda:0=6GiB", "virtual:1GiB", "16GiB")])
    assert len(set(names)) == 4
    for wrong in ("cuda", "cuda:0=0GiB", "virtual:", "gpu", "virtual:1GiB,speed=3", "virtual:1GiB,link=3"):
        if wrong == "cuda":
            assert parse_device(wrong).name == "cuda:0"
            continue
        with pytest.raises(UsageError):
            parse_device(wrong)


def test_the_host_is_what_the_system_says() -> None:
    anonymous, mapped = resident_bytes()
    assert 0 < anonymous + mapped < memory_limit()
    assert 0 < memory_available() <= memory_limit()
    assert usable_cores() >= 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 60), st.booleans()), max_size=30))
def test_reservations_never_pass_the_cap(requests: list[tuple[Kind, int, bool]]) -> None:
    ledger = Ledger([Device("cpu", "cpu", 100)])
    held: list[int] = []
    for kind, nbytes, keep in requests:
        try:
            reservation = ledger.reserve("cpu", kind, nbytes)
        except BudgetExceeded:
            assert sum(held) + nbytes > 100
            continue
        assert sum(held) + nbytes <= 100
        if keep:
            held.append(nbytes)
        else:
            reservation.release()
            reservation.release()
        assert ledger.free("cpu") == 100 - sum(held)
        assert sum(row.reserved for row in ledger.rows()) == sum(held)


def test_resizing_over_the_cap_changes_nothing() -> None:
    ledger = Ledger([Device("cpu", "cpu", 100)])
    reservation = ledger.reserve("cpu", Kind.KV, 60)
    with pytest.raises(BudgetExceeded):
        reservation.resize(101)
    assert reservation.nbytes == 60
    reservation.resize(10)
    assert ledger.free("cpu") == 90
    assert ledger.rows()[0].peak == 60


def test_threads_may_share_a_ledger() -> None:
    ledger = Ledger([Device("cpu", "cpu", 1 << 40)])

    def churn() -> None:
        for _ in range(500):
            ledger.reserve("cpu", Kind.KV, 3).release()

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.free("cpu") == 1 << 40

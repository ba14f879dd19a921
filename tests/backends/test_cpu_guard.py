"""Mapped files that shrink: what is guarded reads as zeros, anything else ends the process as it always did."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chandra.backends.cpu import _cpu

PAGE = mmap.PAGESIZE


def mapped(path: Path, pages: int) -> mmap.mmap:
    path.write_bytes(b"x" * pages * PAGE)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_what_is_lost_reads_as_zeros_and_is_known(tmp_path: Path) -> None:
    first, second = mapped(tmp_path / "first", 8), mapped(tmp_path / "second", 8)
    guards = [_cpu.Guard(memoryview(each)) for each in (first, second)]
    os.truncate(tmp_path / "first", 3 * PAGE)
    assert not guards[0].lost  # nothing has been touched
    assert bytes(first[2 * PAGE : 3 * PAGE]) == b"x" * PAGE
    assert not guards[0].lost
    assert np.frombuffer(first, np.uint8)[5 * PAGE :].sum() == 0
    assert guards[0].lost
    assert bytes(first[: 3 * PAGE]) == b"x" * 3 * PAGE
    assert bytes(second[:]) == b"x" * 8 * PAGE
    assert not guards[1].lost
    guards.clear()
    assert not _cpu.Guard(memoryview(second)).lost


def test_a_guarded_file_stays_mapped(tmp_path: Path) -> None:
    file = mapped(tmp_path / "file", 2)
    guard = _cpu.Guard(memoryview(file))
    with pytest.raises(BufferError):
        file.close()
    del guard
    file.close()


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_other_faults_go_where_they_went(tmp_path: Path, guarded: bool, traced: bool) -> None:
    path = tmp_path / "file"
    code = f"""
import faulthandler, mmap, os
{"faulthandler.enable()" if traced else ""}
from chandra.backends.cpu import _cpu
other = mmap.mmap(-1, mmap.PAGESIZE)
guard = _cpu.Guard(memoryview(other))
with open({str(path)!r}, "w+b") as file:
    file.truncate(4 * mmap.PAGESIZE)
    mapped = mmap.mmap(file.fileno(), 0)
    mine = _cpu.Guard(memoryview(mapped)) if {guarded} else None
    file.truncate(0)
    print(mapped[mmap.PAGESIZE])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if guarded else -signal.SIGBUS)
    assert ("Bus error" in done.stderr) == (traced and not guarded)

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from chandra.backends.cpu import _cpu

CSRC = Path(__file__).parents[2] / "src" / "chandra" / "backends" / "cpu" / "csrc"  # an installed package has none
STRESS = Path(__file__).parent / "pool_stress.cpp"


@pytest.mark.parametrize(("flags", "mode"), [(["-O2"], "fork"), (["-O1", "-g", "-fsanitize=thread"], "threads")])
def test_pool_under_stress(tmp_path: Path, flags: list[str], mode: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and the kernel sources")
    binary = tmp_path / "stress"
    sources = [str(STRESS), str(CSRC / "pool.cpp")]
    subprocess.run(
        [compiler, "-std=c++20", *flags, "-iquote", str(CSRC), *sources, "-o", str(binary), "-pthread"], check=True
    )
    done = subprocess.run([binary, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads_can_be_set() -> None:
    default = _cpu.threads()
    try:
        _cpu.set_threads(3)
        assert _cpu.threads() == 3
    finally:
        _cpu.set_threads(0)
    assert _cpu.threads() == default >= 1


def test_unknown_isa_is_refused() -> None:
    before = _cpu.isa()
    with pytest.raises(ValueError, match="no instruction set is called sse9"):
        _cpu.set_isa("sse9")
    assert _cpu.isa() == before

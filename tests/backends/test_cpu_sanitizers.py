"""The matrix products under sanitizers: they take half a minute each to compile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "src" / "chandra" / "backends" / "cpu" / "csrc"  # an installed package has none
STRESS = Path(__file__).parent / "linear_stress.cpp"
SOURCES = ("activations", "isa", "linear", "linear_kernels", "pack", "pool", "slab", "weight")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_products_while_weights_are_repacked(tmp_path: Path, sanitizers: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and the kernel sources")
    binary = tmp_path / "stress"
    sources = [str(STRESS), *(str(CSRC / f"{name}.cpp") for name in SOURCES)]
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, "-Wno-psabi", f"-I{CSRC}", *sources, "-o", str(binary), "-pthread"], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

"""The C++ under sanitizers: all kernels of every instruction set this machine has, and products during a repacking.

The module is built with a sanitizer (minutes) and the tests of the kernels run with it, in a process that has the
sanitizer's runtime from its start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "src" / "chandra" / "backends" / "cpu" / "csrc"  # an installed package has none
STRESS = HERE / "linear_stress.cpp"
STRESSED = ("activations", "isa", "linear", "linear_kernels", "pack", "pool", "slab", "weight")
KERNELS = ("test_cpu_linear.py", "test_cpu_linear_ops.py", "test_cpu_attention.py", "test_bound_weights.py")
TESTS = (*KERNELS, "../text/test_vocabulary.py")
RUNTIMES = {"thread": ("libtsan.so",), "address,undefined": ("libasan.so", "libstdc++.so.6")}
OPTIONS = {
    # Python itself is not instrumented: what happens there is no race of ours, and its leaks are none of ours
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "PYTHONMALLOC": "malloc",  # arrays then end where the sanitizer sees it
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
RUN = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("chandra.backends.cpu._cpu", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.modules[spec.name].set_threads(int(sys.argv[2]))
sys.exit(pytest.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None or not CSRC.exists():
        pytest.skip("needs g++ and the kernel sources")
    return found


def build(sanitizers: str, folder: Path) -> Path:
    """The module, built with sanitizers."""
    settings = (f"build-dir={folder / 'build'}", f"cmake.define.CHANDRA_SANITIZE={sanitizers}", "install.strip=false")
    options = [option for setting in settings for option in ("-C", setting)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "-q", "--no-deps", "-w", str(folder), *options], check=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if "/_cpu." in name), folder))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", list(RUNTIMES))
def test_all_kernels(tmp_path: Path, compiler: str, sanitizers: str) -> None:
    module = build(sanitizers, tmp_path)
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[sanitizers]
    ]
    environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(runtimes)}
    command = [sys.executable, "-c", RUN, str(module), "2", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [str(HERE / name) for name in TESTS]
    done = subprocess.run([*command, *tests], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", list(RUNTIMES))
def test_products_while_weights_are_repacked(tmp_path: Path, compiler: str, sanitizers: str) -> None:
    """Without Python, whose lock puts in order what would race."""
    binary = tmp_path / "stress"
    sources = [str(STRESS), *(str(CSRC / f"{name}.cpp") for name in STRESSED)]
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    subprocess.run(
        [compiler, *flags, "-Wno-psabi", "-iquote", str(CSRC), *sources, "-o", str(binary), "-pthread"], check=True
    )
    done = subprocess.run([binary], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

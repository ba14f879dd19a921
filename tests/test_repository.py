"""Gates on the repository itself: size, what the documents name, what may not be committed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "chandra"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_PACKAGE, MAX_FILE, MAX_FUNCTION = 14300, 400, 60  # lines; of the package only those of code


def test_package_stays_small() -> None:
    assert sum(map(_code_lines, SOURCES)) <= MAX_PACKAGE


def _code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text = path.read_text()
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in documentation)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path}:{node.name}"


def _definitions(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return names


def test_every_function_that_the_architecture_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 10
    missing = [f"{file}:{name}" for file, name in named if name not in _definitions(PACKAGE / file)]
    assert not missing


# Memory is made by the ledger's side of the house (backends, the pool through them) and nowhere else, but for these
# functions, each with the row of the ledger that pays for what it makes.
MAKES_MEMORY = ("backends/", "bench/", "ops/reference.py", "memory/", "quant/", "planner/")  # of quant see "loading"
PAID_BY = {
    ("engine/model_runner.py", "__init__"): "workspace: kvcache.index_bytes",
    ("engine/sequence.py", "__init__"): "workspace: kvcache.index_bytes",
    ("engine/sequence.py", "append"): "workspace: kvcache.index_bytes",
    ("kvcache/block_manager.py", "__init__"): "workspace: kvcache.index_bytes",
    ("kvcache/block_manager.py", "swap_in"): "workspace: kvcache.index_bytes",
    ("kvcache/block_manager.py", "swap_out"): "workspace: kvcache.index_bytes",
    ("kvcache/view.py", "__init__"): "workspace: kvcache.index_bytes",
    ("models/decoder.py", "_rehearse"): "workspace: kvcache.index_bytes",
    ("models/decoder.py", "forward"): "nothing: it has no rows",
    ("models/transforms.py", "convert"): "loading: models.transforms.loading_bytes",
    ("store/download.py", "read_page"): "nothing: a page of a source, before there is a model",
}
ALLOCATORS = {"empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "memmap"}


def _makes_memory(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.value.id in ("np", "torch") and node.func.attr in ALLOCATORS
    return isinstance(node.func, ast.Name) and node.func.id == "bytearray"


def test_nobody_makes_memory_that_no_row_of_the_ledger_pays_for() -> None:
    found = set()
    for path in SOURCES:
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(MAKES_MEMORY):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and any(map(_makes_memory, ast.walk(node))):
                    found.add((name, node.name))
    assert found == PAID_BY.keys()


@pytest.mark.parametrize("module", ["chandra", "chandra.cli", "chandra.llm", "chandra.backends.cpu", "chandra.quant"])
def test_torch_is_not_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_no_weights_and_no_build_products_are_tracked() -> None:
    tracked = _tracked()
    assert not [
        p for p in tracked if p.suffix in {".gguf", ".safetensors", ".pth", ".bin", ".whl", ".so", ".o", ".pyc"}
    ]
    assert not [p for p in tracked if p.is_file() and p.stat().st_size > 1_000_000]

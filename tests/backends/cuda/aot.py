"""Compile Triton kernels for GPUs that are not there, exactly as they would be launched.

Runs in a process without TRITON_INTERPRET: `launches` collects what wrappers launch on tensors of the host.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that one program may take
TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel takes: shared memory in bytes, registers per thread, bytes spilled to local memory."""

    kernel: str
    capability: int
    shared: int
    registers: int
    local: int
    warps: int


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside, kernels are recorded instead of run."""
    recorded: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in self.arg_names}
        recorded.append(Launch(self, arguments, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield recorded
    finally:
        JITFunction.run = original


def compiled(launch: Launch, capability: int) -> Figures:
    """Compile down to machine code. Raises what the compiler raises."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            aligned = value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and special and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    usage = _usage(binary.asm["cubin"])
    name = launch.kernel.__name__
    return Figures(name, capability, binary.metadata.shared, usage["REG"], usage["STACK"], binary.metadata.num_warps)


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}

"""The GPUs of this machine, asked of NVIDIA's driver: neither torch nor a context on the device is needed for that.

CUDA driver API: https://docs.nvidia.com/cuda/cuda-driver-api; memory in use: NVML, https://docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

import ctypes
import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from chandra.errors import DeviceError
from chandra.lazy import torch
from chandra.memory.device import KNOWN_GPUS, Device, parse_rate

MIN_CAPABILITY = (7, 5)
_TRACES = ("/dev/nvidia0", "/proc/driver/nvidia/version")  # that a machine with an NVIDIA GPU has
_NO_DEVICE, _OLD_DRIVER = 100, (35, 803, 804)  # CUresult
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute
_CPU_ONLY = "or run with --device cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU. `bus` is its PCI address; `total` is bytes of its memory."""

    index: int
    name: str
    bus: str
    capability: tuple[int, int]
    total: int

    def in_use(self) -> int | None:
        """Bytes of its memory that are taken, by all processes; None if the driver does not tell."""
        nvml = _library("libnvidia-ml.so.1")
        if nvml is None or nvml.nvmlInit_v2():
            return None
        handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(self.bus.encode(), ctypes.byref(handle)):
            return None
        if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return memory[0] - memory[1]


def usable_gpus() -> tuple[Device, ...]:
    """The GPUs of this machine that kernels can run on, with what is free of them as cap; () where there are none.

    Raises DeviceError if there are GPUs and none of them can be used, saying why.
    """
    gpus = find_gpus()
    if gpus:
        check_software()
    able = [gpu for gpu in gpus if gpu.capability >= MIN_CAPABILITY]
    if gpus and not able:
        old = gpus[0]
        raise DeviceError(
            f"cuda:0: {old.name} has compute capability {old.capability[0]}.{old.capability[1]}, kernels need 7.5",
            f"GPUs from the Turing generation on are supported (T4, GTX 16, RTX 20 and later); {_CPU_ONLY}",
        )
    return tuple(_device(gpu) for gpu in able)


def _device(gpu: Gpu) -> Device:
    """With the bandwidths of its datasheet, if it is well known."""
    name = gpu.name.lower().replace(" ", "")
    rates = next((values[1:] for key, values in KNOWN_GPUS.items() if key in name), ())
    return Device(f"cuda:{gpu.index}", "cuda", gpu.total - (gpu.in_use() or 0), *map(parse_rate, rates))


@cache
def find_gpus() -> tuple[Gpu, ...]:
    """All GPUs the driver shows this process. Raises DeviceError if there is a GPU, but no driver that works."""
    cuda = _library("libcuda.so.1")
    if cuda is None:
        if any(Path(trace).exists() for trace in _TRACES):
            raise DeviceError(
                "there is an NVIDIA GPU, but no CUDA driver (libcuda.so.1)",
                f"install NVIDIA's driver (in a container: start it with access to GPUs), {_CPU_ONLY}",
            )
        return ()
    if status := cuda.cuInit(0):
        if status == _NO_DEVICE:
            return ()
        reason = "is too old or does not match the kernel's" if status in _OLD_DRIVER else "does not start"
        raise DeviceError(
            f"the CUDA driver {reason} (error {status})", f"`nvidia-smi` says more; reinstall the driver, {_CPU_ONLY}"
        )
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return tuple(_describe(cuda, index) for index in range(count.value))


def _describe(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetPCIBusId(bus, len(bus), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(index, name.value.decode(), bus.value.decode(), (capability[0], capability[1]), total.value)


def check_software() -> None:
    """Raise DeviceError if torch or Triton are not such that they can use the driver (imports torch)."""
    built_for = torch.version.cuda
    if built_for is None:
        raise DeviceError(
            f"there is a GPU, but torch {torch.__version__} is built without CUDA",
            f"install torch's CUDA build (see pytorch.org/get-started), {_CPU_ONLY}",
        )
    version = ctypes.c_int()
    cuda = _library("libcuda.so.1")
    if cuda is not None and not cuda.cuDriverGetVersion(ctypes.byref(version)):
        driver = version.value // 1000, version.value % 1000 // 10
        if driver[0] < int(built_for.split(".")[0]):  # within a major version any minor one works
            raise DeviceError(
                f"the driver knows CUDA {driver[0]}.{driver[1]}, torch is built for CUDA {built_for}",
                f"update NVIDIA's driver, or install a torch built for CUDA {driver[0]}, {_CPU_ONLY}",
            )
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("there is a GPU, but Triton is not installed", f"`pip install triton`, {_CPU_ONLY}")


def _library(name: str) -> ctypes.CDLL | None:
    with suppress(OSError):
        return ctypes.CDLL(name)
    return None

"""What the backend asks of torch besides tensors: pinned memory, copies beside computation, recorded calls, caps.

`Accelerator` is torch's CPU, where everything happens at once and in order; Triton's interpreter runs on it.
`CudaAccelerator` is a GPU.
"""

from __future__ import annotations

import mmap
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from chandra.backends.cuda.driver import check_software, find_gpus
from chandra.errors import BudgetExceeded, DeviceError
from chandra.lazy import torch
from chandra.memory.device import parse_size
from chandra.ops.contracts import Copied, Copy, HostBytes

Ops = Callable[[], None]


class _Copying:
    """A copy that is under way on a stream of a GPU. What it meets there is raised by whatever asks the GPU next."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def done(self) -> None:
        with guard(str(self._device)):
            self._event.synchronize()


def asked(message: str) -> int:
    """Bytes that torch could not allocate, by its message; 0 where it does not say."""
    found = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", message)
    return parse_size(found[1]) if found else 0


@contextmanager
def guard(device: str) -> Iterator[None]:
    """Turn torch's and Triton's errors on a GPU into those a user can act on. `device`: as the plan names it."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        triton = said.startswith("Triton Error [CUDA]")
        if isinstance(error, torch.OutOfMemoryError) or (triton and "out of memory" in said):
            raise BudgetExceeded(
                f"{device}: out of memory: {said}",
                hint="raise the device's budget, or plan with a shorter context or a smaller format",
                device=device,
                nbytes=asked(str(error)),
            ) from error
        if triton or isinstance(error, torch.AcceleratorError):
            raise DeviceError(
                f"{device} is lost: {said}", "load the model again; `nvidia-smi` shows whether the GPU still answers"
            ) from error
        raise


class Accelerator:
    """torch's CPU. `half` is the 16-bit type to compute with."""

    capability = (8, 0)

    def __init__(self, half: str = "float16") -> None:
        self.device = torch.device("cpu")
        self.half: torch.dtype = getattr(torch, half)

    def use(self) -> None:
        """Make it the device that this thread's kernels run on."""

    def host_buffer(self, nbytes: int) -> HostBytes:
        """Host memory of whole pages, from which copies are fast."""
        return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]

    def copy(self, source: torch.Tensor, out: torch.Tensor, beside: bool = False) -> Copy:  # noqa: ARG002
        """Begin a copy between host and device, after the computation that was issued before: in its order, or beside
        what is issued from now on."""
        out.copy_(source)
        return Copied()

    def settle(self) -> None:
        """Wait until everything issued is done."""

    def release_unused(self) -> None:
        """Give the device's memory that is free, but kept, back to the system."""

    def record(self, ops: Ops) -> Callable[[Ops], None]:  # noqa: ARG002
        """What does the work of ops that would make the same calls as these, which have run before."""
        return lambda same: same()

    def taken(self) -> int:
        """Bytes of the device that are in use, by anyone."""
        return 0

    def context_bytes(self) -> int:
        """Bytes that merely using the device has taken: the context, kernels, libraries. Corrects by them what may be
        allocated."""
        return 0

    def allocated_peak(self) -> int:
        """The most bytes of the device that torch's allocator has had."""
        return 0

    def limit(self, nbytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Let this process allocate so many bytes more of the device; call the result to take that back."""
        return lambda: None


class CudaAccelerator(Accelerator):
    """A GPU. Raises DeviceError if it is not there or cannot be used."""

    # One allocator and one context of a GPU for the whole process: bytes allowed, bytes in use before there was either.
    _limits: dict[int, int] = {}  # noqa: RUF012
    _before: dict[int, int | None] = {}  # noqa: RUF012

    def __init__(self, index: int) -> None:
        gpus = find_gpus()
        if index >= len(gpus):
            raise DeviceError(f"there is no GPU cuda:{index}", f"GPUs of this machine: {len(gpus)}")
        check_software()
        self.gpu = gpus[index]
        self.capability = self.gpu.capability
        self.device = torch.device("cuda", index)
        self._before.setdefault(index, self.gpu.in_use())
        self.half = torch.bfloat16 if self.capability >= (8, 0) else torch.float16
        with guard(f"cuda:{index}"):
            old = "_cuda_cudaCachingAllocator_set_allocator_settings"  # before torch 2.10
            configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(torch._C, old)
            configure("expandable_segments:True")  # else blocks waste up to 2 MiB
            self.use()
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            torch.zeros(1, device=self.device)

    def use(self) -> None:
        torch.cuda.set_device(self.device)

    def host_buffer(self, nbytes: int) -> HostBytes:
        """Pinned, or, where the system does not let this process pin so much, plain."""
        buffer = super().host_buffer(nbytes)
        cudart, address = torch.cuda.cudart(), buffer.ctypes.data  # type: ignore[no-untyped-call]
        if not int(cudart.cudaHostRegister(address, max(1, nbytes), 0)):
            weakref.finalize(buffer.base, cudart.cudaHostUnregister, address)
        return buffer

    def copy(self, source: torch.Tensor, out: torch.Tensor, beside: bool = False) -> Copy:
        computing = torch.cuda.current_stream(self.device)
        stream = self._copies if beside else computing
        if beside:
            stream.wait_stream(computing)
        with torch.cuda.stream(stream):
            out.copy_(source, non_blocking=True)
            return _Copying(stream.record_event(), self.device)

    def settle(self) -> None:
        with guard(str(self.device)):
            torch.cuda.synchronize(self.device)

    def release_unused(self) -> None:
        with guard(str(self.device)):
            torch.cuda.empty_cache()

    def record(self, ops: Ops) -> Callable[[Ops], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            ops()
        return lambda _: graph.replay()

    def taken(self) -> int:
        in_use = self.gpu.in_use()
        if in_use is None:
            free, total = torch.cuda.mem_get_info(self.device)
            in_use = total - free
        return in_use

    def context_bytes(self) -> int:
        before = self._before[self.gpu.index]
        ours = 0 if before is None else self.taken() - before - int(torch.cuda.memory_reserved(self.device))
        taken = max(0, ours)
        limit = self._limits.get(self.gpu.index) or self.gpu.total + taken  # nobody's: everything
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit - taken) / self.gpu.total), self.device)
        return taken

    def allocated_peak(self) -> int:
        return int(torch.cuda.max_memory_reserved(self.device))

    def limit(self, nbytes: int) -> Callable[[], None]:
        self._allow(nbytes)
        return lambda: self._allow(-nbytes)

    def _allow(self, nbytes: int) -> None:
        self._limits[self.gpu.index] = self._limits.get(self.gpu.index, 0) + nbytes
        self.context_bytes()

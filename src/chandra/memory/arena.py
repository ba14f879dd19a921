"""Counting the bytes that live on a device."""

from __future__ import annotations

import threading

from chandra.errors import BudgetExceeded
from chandra.memory.device import Device, format_size


class Arena:
    """Counts the bytes that live on a device and refuses those over its cap."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.used = 0
        self.peak = 0
        self._lock = threading.RLock()  # arrays may be collected while it is held

    def take(self, nbytes: int) -> None:
        """Count bytes, or give them back if negative. Raises BudgetExceeded, and takes nothing, if there is no room."""
        with self._lock:
            if nbytes > 0 and self.used + nbytes > self.device.cap:
                raise BudgetExceeded(
                    f"{self.device.name}: {format_size(nbytes)} more do not fit"
                    f" ({format_size(self.used)} of {format_size(self.device.cap)} in use)",
                    hint="raise the device's budget, or plan with a shorter context or a smaller format",
                    device=self.device.name,
                    nbytes=nbytes,
                )
            self.used += nbytes
            self.peak = max(self.peak, self.used)

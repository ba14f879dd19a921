"""Every exception a user can see. Each says what is wrong and what to do next.

`exit_code` is what the command line returns: 1 failed, 2 wrong usage, 3 does not fit.
"""

from __future__ import annotations


class ChandraError(Exception):
    """Base of all errors Chandra raises on purpose: a message, and a hint that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(ChandraError):
    """A wrong argument, option or environment value."""

    exit_code = 2


class RequestError(UsageError):
    """A request that cannot be served as asked: a sampling value out of range, an unknown field."""


class ContextOverflow(RequestError):
    """The prompt does not fit the context length."""


class CheckpointError(ChandraError):
    """A model file that is damaged, truncated, hostile or inconsistent."""


class UnsupportedError(ChandraError):
    """A well-formed model, format or feature that Chandra does not support."""


class TokenizerError(ChandraError):
    """A tokenizer that is missing, damaged or inconsistent with the model."""


class TemplateError(ChandraError):
    """A chat template that fails, loops, writes without end or reaches for the system."""


class StoreError(ChandraError):
    """The store cannot be read or written."""


class ModelNotFound(StoreError):
    """No such model in the store or at its source."""


class DownloadError(StoreError):
    """A transfer failed; what arrived is kept and the next try resumes."""


class DigestMismatch(DownloadError):
    """The bytes that arrived are not the bytes that were promised."""


class DiskFull(StoreError):
    """No space left for a download or a conversion."""


class DeviceError(ChandraError):
    """A device that is missing, lost or unsupported."""


class BudgetExceeded(ChandraError):
    """A reservation over a device's cap. `table` holds the ledger's rows at that moment; `device` and `nbytes` say
    what was asked for, where that is known."""

    exit_code = 3

    def __init__(self, message: str, table: str = "", hint: str = "", device: str = "", nbytes: int = 0) -> None:
        super().__init__(message, hint)
        self.table, self.device, self.nbytes = table, device, nbytes

    def __str__(self) -> str:
        return "\n".join(part for part in (self.message, self.table, self.hint) if part)


class DoesNotFit(ChandraError):
    """No plan fits the budget; the hint names the smallest change that would."""

    exit_code = 3


class NumericError(ChandraError):
    """The model computed NaN or infinite logits."""


class Aborted(ChandraError):
    """A request that was cancelled before it finished."""

"""The architectures, and which of them a file asks for."""

from __future__ import annotations

from chandra.errors import UnsupportedError
from chandra.models.arch import falcon, gemma, gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3moe
from chandra.models.arch.base import Arch, Name, NameTable

__all__ = ["ARCHS", "Arch", "Name", "NameTable", "arch_of_gguf", "arch_of_model_type"]

_MODULES = (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, falcon, mixtral, qwen3moe)
ARCHS: dict[str, Arch] = {module.ARCH.name: module.ARCH for module in _MODULES}


def arch_of_model_type(model_type: object) -> Arch:
    """The architecture of a `config.json`. Raises UnsupportedError."""
    for arch in ARCHS.values():
        if model_type in arch.model_types:
            return arch
    raise unsupported(model_type)


def arch_of_gguf(name: object, experts: bool) -> Arch:
    """The architecture of a GGUF file's `general.architecture`. Raises UnsupportedError."""
    for arch in ARCHS.values():
        if arch.gguf is not None and (name, experts) == (arch.gguf, arch.experts):
            return arch
    raise unsupported(name)


def unsupported(name: object) -> UnsupportedError:
    return UnsupportedError(f"the architecture {str(name)[:80]!r} is not supported", f"supported: {', '.join(ARCHS)}")

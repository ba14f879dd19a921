"""Repositories of the Hugging Face Hub."""

from __future__ import annotations

from chandra.errors import UnsupportedError
from chandra.store.download import Progress
from chandra.store.manifests import StoredModel


def fetch(repo: str, quant: str, name: str, progress: Progress) -> StoredModel:
    """The GGUF file of `quant`, or the safetensors folder, of a repository."""
    del quant, name, progress
    raise UnsupportedError(f"{repo}: models of the Hub cannot be pulled yet")

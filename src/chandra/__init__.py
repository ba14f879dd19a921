"""Chandra runs and serves language models inside the memory you have.

>>> from chandra import LLM, SamplingParams
>>> with LLM("smollm2:135m") as llm:
...     print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from chandra.config import SamplingParams
    from chandra.llm import LLM


def __getattr__(name: str) -> Any:
    """Loads `LLM` and `SamplingParams` on first use, so that `import chandra.errors` does not load an engine."""
    if name == "LLM":
        from chandra.llm import LLM

        return LLM
    if name == "SamplingParams":
        from chandra.config import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'chandra' has no attribute {name!r}")

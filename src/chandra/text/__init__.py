"""Between text and token ids: tokenizers, streaming text and stop strings. Chat templates: `text.template`."""

from __future__ import annotations

from chandra.text.detokenizer import StopMatcher, StreamDetokenizer
from chandra.text.sources import load_tokenizer
from chandra.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "StreamDetokenizer", "Tokenizer", "load_tokenizer"]

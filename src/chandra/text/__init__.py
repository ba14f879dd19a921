"""Between text and token ids: tokenizers, chat templates, streaming text and stop strings."""

from __future__ import annotations

from chandra.text.detokenizer import StopMatcher, StreamDetokenizer
from chandra.text.sources import load_tokenizer
from chandra.text.template import ChatTemplate, has_template
from chandra.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopMatcher", "StreamDetokenizer", "Tokenizer", "has_template", "load_tokenizer"]
